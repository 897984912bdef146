"""The doctor names everything, survives broken packages, and fails only for what is required."""

import importlib
import json
import sys

import pytest
import torch

from megatron_ptrl import doctor, ops
from megatron_ptrl.config import DoctorConfig
from megatron_ptrl.errors import InputError

NAMES = {
    *("python", "cores", "memory", "OMP_NUM_THREADS", "torch", "GPUs", "C++ compiler", "nvcc", "megatron-core"),
    *("kernels", "transformer-engine", "apex", "flash-attn", "numpy", "tokenizers", "jsonargparse", "tqdm", "psutil"),
    *("matplotlib", "tensorboard", "pyarrow", "zstandard", "wandb"),
    *("datatrove", "aiohttp", "rapidfuzz", "math-verify", "sentencex", "scipy", "lm-eval", "nltk punkt_tab"),
}


def by_name() -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examine()}


def test_every_item_is_named_and_what_is_missing_has_its_price():
    findings = by_name()
    assert set(findings) == NAMES
    assert [f.name for f in findings.values() if not f.present and not f.cost] == []
    lines = doctor.render(list(findings.values())).splitlines()
    assert len(lines) == len(NAMES)
    assert len({line.index(f.detail) for line, f in zip(lines, findings.values(), strict=True)}) == 1


def test_missing_optional_package_tells_cost_and_command(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    doctor.run(DoctorConfig())
    line = next(line for line in capsys.readouterr().out.splitlines() if "pyarrow" in line)
    assert line.startswith("- ")
    assert "not installed; without it: no Parquet input; get it: pip install pyarrow" in line


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("datatrove", "neither ptrl think nor ptrl segment; get it: pip install 'megatron-ptrl[tpt,seg]'"),
        ("math_verify", "verify.math has to be false"),
        ("scipy", "no ptrl report --scaling; get it: pip install 'megatron-ptrl[eval]'"),
        ("nltk", "split.sentences has to be sentencex in ptrl segment; get it: pip install 'megatron-ptrl[seg]'"),
    ],
)
def test_what_a_stage_lacks_is_named_with_its_extra(monkeypatch, package, line):
    monkeypatch.setitem(sys.modules, package, None)
    findings = [f for f in [*doctor._extras(), doctor._punkt_tab()] if not f.present]
    assert f"not installed; without it: {line}" in doctor.render(findings)


def test_punkt_learns_where_its_data_are_not_installed(monkeypatch):
    import nltk

    def absent(name):
        raise LookupError(name)

    monkeypatch.setattr(nltk.data, "find", absent)
    found = doctor._punkt_tab()
    assert not found.present and "learns its abbreviations" in found.cost
    assert found.fix == "python -m nltk.downloader punkt_tab"


def test_missing_required_package_is_an_error(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match="required and missing: tokenizers"):
        doctor.run(DoctorConfig())
    assert "MISSING  tokenizers" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libcudart.so.12: cannot open shared object file"),
        ModuleNotFoundError("No module named 'einops'", name="einops"),
        OSError("undefined symbol: cudnnCreate"),
        RuntimeError("no driver"),
    ],
)
def test_broken_package_is_reported_with_its_message(monkeypatch, error):
    real = importlib.import_module

    def broken(name, *rest):
        if name == "flash_attn":
            raise error
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", broken)
    finding = next(finding for finding in doctor._packages() if finding.name == "flash-attn")
    assert not finding.present
    assert finding.detail.startswith("broken: ") and str(error) in finding.detail


def test_untested_megatron_core_is_said(monkeypatch):
    import megatron.core

    monkeypatch.setattr(megatron.core, "__version__", "0.99.0")
    finding = doctor._megatron_core()
    assert finding.present
    assert finding.detail == "0.99.0, not tested here: 0.16.1 is"


def test_missing_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    finding = next(finding for finding in doctor._compilers() if finding.name == "C++ compiler")
    assert not finding.present
    assert finding.detail == "no-such-compiler is not there"


def test_kernels_that_are_not_there_or_turned_off(monkeypatch, tmp_path):
    monkeypatch.delenv("MEGATRON_PTRL_KERNELS", raising=False)
    monkeypatch.setattr(ops, "load_kernels", lambda: False)
    monkeypatch.setattr(ops, "LIBRARY", tmp_path / "_C.so")
    assert doctor._kernels().detail == "_C.so was not built"
    (tmp_path / "_C.so").touch()
    assert "does not load" in doctor._kernels().detail
    monkeypatch.setenv("MEGATRON_PTRL_KERNELS", "0")
    assert doctor._kernels().fix == "unset MEGATRON_PTRL_KERNELS"


@pytest.mark.skipif(not ops.load_kernels(), reason="the kernels were not built")
def test_kernels_say_which_devices_they_serve(monkeypatch):
    serves = {"CPU", "CUDA"}
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, device: device in serves)
    assert doctor._kernels().detail == "_C.so loads, for CPU and CUDA"
    serves.remove("CUDA")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "for CPU; not CUDA: torch is a CPU build" in doctor._kernels().detail
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor, "_nvcc", lambda: "no-such-nvcc")
    assert "for CPU; not CUDA: there is no nvcc" in doctor._kernels().detail
    monkeypatch.setattr(doctor, "_nvcc", lambda: sys.executable)
    assert doctor._kernels().fix.startswith("MEGATRON_PTRL_CUDA=1 pip install")


def test_json_is_one_object_a_line(capsys):
    doctor.run(DoctorConfig(json=True))
    assert {json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()} == NAMES
