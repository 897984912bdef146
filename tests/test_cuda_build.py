"""What nvcc makes of the CUDA kernels: every GPU generation named in setup.py, no spills, registers within budget."""

import re
import shutil
import subprocess
from collections import Counter
from typing import NamedTuple

import pytest
import torch
from cubins import NVCC, ROOT, SOURCES, Cubins

from megatron_ptrl import ops


class Budget(NamedTuple):
    kernels: int  # instances of the template
    registers: int  # of a thread


# 5 blocks of 256 threads a multiprocessor for the passes over logits and over tokens, 4 for the one pass, whose shared
# memory leaves no room for more.
BUDGET = {
    "reward_shaped_ce_cuda": {
        "stats_kernel": Budget(12, 48),
        "top_k_kernel": Budget(3, 48),
        "combine_kernel": Budget(3, 80),
        "grad_kernel": Budget(3, 48),
        "one_pass_kernel": Budget(12, 64),
    },
    "remit_weights_cuda": {
        "gap_sums_kernel": Budget(1, 48),
        "finish_sums_kernel": Budget(1, 48),
        "weights_kernel": Budget(1, 48),
    },
}


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "architecture", [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)]
)
def test_no_spills_and_registers_within_budget(cubins: Cubins, source, architecture):
    cubin, told = cubins.compiled(source, architecture)
    pattern = r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    counts: Counter[str] = Counter()
    for entry, stores, loads, registers in re.findall(pattern, told, flags=re.S):
        name = next(name for name in BUDGET[source] if name in entry)
        counts[name] += 1
        assert int(stores) == int(loads) == 0, f"{entry} spills"
        assert int(registers) <= BUDGET[source][name].registers, f"{entry} takes {registers} registers"
    assert counts == {name: budget.kernels for name, budget in BUDGET[source].items()}
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
