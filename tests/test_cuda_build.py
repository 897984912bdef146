"""What nvcc makes of the CUDA kernels: every GPU generation named in setup.py, no spills, registers within budget."""

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from megatron_ptrl import ops

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("/usr/local/cuda/bin/nvcc") or shutil.which("nvcc")
# Registers a thread, and what they allow: 5 blocks of 256 threads a multiprocessor for the two passes over the logits,
# 4 for the one pass, whose shared memory leaves no room for more.
BUDGET = {"stats_kernel": 48, "top_k_kernel": 48, "combine_kernel": 80, "grad_kernel": 48, "one_pass_kernel": 64}


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
@pytest.mark.parametrize(
    "architecture", [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)]
)
def test_no_spills_and_registers_within_budget(architecture, tmp_path):
    source = ROOT / "csrc" / "reward_shaped_ce_cuda.cu"
    flags = ["-std=c++17", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Xptxas=-v"]
    include = [f"-I{path}" for path in include_paths()]
    cubin = tmp_path / "kernels.cubin"
    done = subprocess.run(
        [NVCC, "-cubin", f"-arch=sm_{architecture}", *flags, *include, str(source), "-o", str(cubin)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pattern = r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    found = re.findall(pattern, done.stderr, flags=re.S)
    counts: Counter[str] = Counter()
    for entry, stores, loads, registers in found:
        name = next(name for name in BUDGET if name in entry)
        counts[name] += 1
        assert int(stores) == int(loads) == 0, f"{entry} spills"
        assert int(registers) <= BUDGET[name], f"{entry} takes {registers} registers"
    expected = {"stats_kernel": 12, "top_k_kernel": 3, "combine_kernel": 3, "grad_kernel": 3, "one_pass_kernel": 12}
    assert counts == expected
    assert cubin.stat().st_size > 0


@pytest.mark.skipif(not ops.load_kernels(), reason="the kernels were not built")
def test_the_library_depends_on_libtorch_and_on_no_cuda_library():
    """libtorch is what brings libtorch_cuda into reach; anything of CUDA would keep it from loading without."""
    if shutil.which("readelf") is None:
        pytest.skip("there is no readelf")
    listed = subprocess.run(["readelf", "-d", str(ops.LIBRARY)], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.+)\]", listed)
    assert "libtorch.so" in needed
    assert not [name for name in needed if "cuda" in name]


def build_decision(monkeypatch: pytest.MonkeyPatch, cuda: str | None, nvcc: str | None, **environment: str) -> bool:
    """What setup.py decides."""
    for name in ("MEGATRON_PTRL_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    names: dict = {"__name__": "setup", "__file__": str(ROOT / "setup.py")}
    exec((ROOT / "setup.py").read_text().rsplit("\nsetup(", 1)[0], names)
    names["find_nvcc"] = lambda: nvcc
    monkeypatch.setattr(torch.version, "cuda", cuda)
    return names["wants_cuda"]()


def test_cuda_is_built_where_it_can_be_of_use(monkeypatch):
    assert build_decision(monkeypatch, "13.0", "nvcc")
    assert not build_decision(monkeypatch, "13.0", None)
    assert not build_decision(monkeypatch, None, "nvcc")
    assert build_decision(monkeypatch, None, "nvcc", TORCH_CUDA_ARCH_LIST="9.0")
    assert build_decision(monkeypatch, None, "nvcc", MEGATRON_PTRL_CUDA="1")
    assert not build_decision(monkeypatch, "13.0", "nvcc", MEGATRON_PTRL_CUDA="0")
    with pytest.raises(SystemExit, match="there is no nvcc"):
        build_decision(monkeypatch, "13.0", None, MEGATRON_PTRL_CUDA="1")
    with pytest.raises(SystemExit, match="expected auto, 0 or 1"):
        build_decision(monkeypatch, "13.0", "nvcc", MEGATRON_PTRL_CUDA="yes")
