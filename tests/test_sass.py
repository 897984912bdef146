"""The machine code of the CUDA kernels: wide accesses, no local memory, nothing whose result depends on an order."""

from typing import NamedTuple

import pytest
from cubins import NVCC, SOURCES, Cubins, nvdisasm

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="there is no nvcc"),
    pytest.mark.skipif(nvdisasm() is None, reason="there is no nvdisasm (package nvidia-cuda-nvdisasm)"),
]
ARCHITECTURES = [90, pytest.param(100, marks=pytest.mark.slow)]
BFLOAT16 = "BFloat16"  # in the mangled names of that template


class Expected(NamedTuple):
    loads: int  # 16-byte loads, at least
    stores: int  # 16-byte stores, at least
    exponentials: int  # ex2 instructions, exactly
    in_a_row: int  # of these the most that no branch separates, at least


# Of the kernels for bf16, 8 logits in 16 bytes. stats: 8 in the inner loop, 8 at edges, 3 that rescale. grad: 4 loads.
EXPECTED = {
    "stats_kernel": Expected(loads=2, stores=0, exponentials=19, in_a_row=8),
    "grad_kernel": Expected(loads=4, stores=4, exponentials=32, in_a_row=8),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_no_local_memory_and_no_atomics_on_floats(cubins: Cubins, source, architecture):
    kernels = cubins.instructions(source, architecture)
    for name, stretches in kernels.items():
        opcodes = [opcode for stretch in stretches for opcode in stretch]
        assert "EXIT" in opcodes, f"{name} was not understood"
        assert not [opcode for opcode in opcodes if opcode.startswith(("LDL", "STL"))], f"{name} uses local memory"
        atomics = [opcode for opcode in opcodes if opcode.startswith(("ATOM", "RED"))]
        floats = [opcode for opcode in atomics if {"F16", "F32", "F64", "CAS"} & set(opcode.split("."))]
        assert not floats, f"{name} adds floats in any order: {floats}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", EXPECTED)
def test_wide_accesses_and_one_exponential_a_logit(cubins: Cubins, kernel, architecture):
    every = cubins.instructions("reward_shaped_ce_cuda", architecture)
    chosen = {name: stretches for name, stretches in every.items() if kernel in name and BFLOAT16 in name}
    assert chosen, f"no {kernel} for {BFLOAT16}"
    expected = EXPECTED[kernel]
    for name, stretches in chosen.items():
        opcodes = [opcode for stretch in stretches for opcode in stretch]
        exponentials = [stretch.count("MUFU.EX2") for stretch in stretches]
        assert wide(opcodes, "LDG") >= expected.loads, name
        assert wide(opcodes, "STG") >= expected.stores, name
        assert sum(exponentials) == expected.exponentials, name
        assert max(exponentials) >= expected.in_a_row, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_of_remit_come_sixteen_bytes_at_a_time(cubins: Cubins, architecture):
    """Two log-probabilities, and segments, which take two."""
    kernels = cubins.instructions("remit_weights_cuda", architecture)
    for kernel, stores in (("gap_sums_kernel", 0), ("weights_kernel", 1)):
        (stretches,) = (stretches for name, stretches in kernels.items() if kernel in name)
        opcodes = [opcode for stretch in stretches for opcode in stretch]
        assert wide(opcodes, "LDG") == 4 and wide(opcodes, "STG") == stores


def wide(opcodes: list[str], access: str) -> int:
    return sum(opcode.startswith(f"{access}.") and "128" in opcode.split(".") for opcode in opcodes)
