"""The operators: registration, and the torch fallback against the kernels."""

import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from megatron_ptrl import ops

pytestmark = [
    pytest.mark.skipif(not ops.load_kernels(), reason="the kernels were not built"),
    pytest.mark.usefixtures("device"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def shards(dtype: torch.dtype, count: int = 3, rows: int = 11, columns: int = 600) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    z = torch.randn(rows, count * columns) * 3
    z[1] = torch.randint(3, z[1].shape).float()
    z[2, :columns] = -torch.inf
    z[3] = -0.0
    target = torch.randint(columns, 2 * columns, (rows,))
    target[4] = -100
    return list(z.to(dtype).chunk(count, -1)), target


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [0, 7])
def test_registration(dtype, top_k):
    (*_, z), target = shards(dtype, rows=5)
    target = torch.where(target < 0, target, target % 590)
    library = torch.ops.megatron_ptrl
    opcheck(library.reward_shaped_ce_stats.default, (z, target, 0, 590, top_k, True, -100))
    numbers, keys = ops.reward_shaped_ce_stats(z, target, 0, 590, top_k, True, -100)
    joined = (numbers[None], keys[None], target, 0.5, 0.1, -0.1, -100)
    opcheck(library.reward_shaped_ce_combine.default, joined)
    _, coefficients, _ = ops.reward_shaped_ce_combine(*joined)
    opcheck(library.reward_shaped_ce_grad.default, (z, target, torch.rand(5), coefficients, 0, 590))
    opcheck(library.reward_shaped_ce_grad_.default, (z.clone(), target, torch.rand(5), coefficients, 0, 590))
    shaping = (590, top_k, True, 0.5, 0.1, -0.1, -100)
    opcheck(library.reward_shaped_ce_one_pass_.default, (z.clone(), target, torch.rand(5), *shaping))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [0, 1, 100, 1000])
@pytest.mark.parametrize("vocab_size", [1800, 1300, 1234])
def test_the_fallback_computes_the_same(dtype, top_k, vocab_size):
    parts, target = shards(dtype)
    target %= vocab_size
    target[4] = -100
    upstream = torch.rand(len(target))
    found = {}
    for name, stats, combine, grad in (
        ("kernels", ops.reward_shaped_ce_stats, ops.reward_shaped_ce_combine, ops.reward_shaped_ce_grad),
        ("torch", ops._stats, ops._combine, ops._grad),
    ):
        places = [(600 * i, min(max(vocab_size - 600 * i, 0), 600)) for i in range(3)]
        pairs = [stats(z, target, *place, top_k, True, -100) for z, place in zip(parts, places, strict=True)]
        numbers, keys = (torch.stack(each) for each in zip(*pairs, strict=True))
        loss, coefficients, token_stats = combine(numbers, keys, target, -0.25, 0.1, -0.05, -100)
        gradients = [grad(z, target, upstream, coefficients, *place) for z, place in zip(parts, places, strict=True)]
        kept = [i for i in range(len(target)) if i != 4]
        found[name] = [keys[:, kept].float().sort().values, loss, coefficients, token_stats, *gradients]
    for i, (kernels, fallback) in enumerate(zip(found["kernels"], found["torch"], strict=True)):
        # The gradients, from the fifth on, may round to either neighbour.
        rtol = 1e-5 if i < 4 else 2 * torch.finfo(dtype).eps + 1e-5
        torch.testing.assert_close(kernels, fallback, rtol=rtol, atol=2e-6)


# 5 x 40000: a row is cut into segments. 70 x 40000: it is not, but its gradient is written in three tiles.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, columns", [(11, 600), (5, 40_000), (70, 40_000), (0, 8)])
@pytest.mark.parametrize("top_k, ignore_index", [(0, None), (7, -100), (100, -100)])
def test_one_pass_is_the_three_operators_bit_for_bit(device, dtype, rows, columns, top_k, ignore_index):
    if device != "cpu":
        pytest.skip("sums in an order of its own on a GPU")
    torch.manual_seed(1)
    wider = (torch.randn(rows, columns + 3) * 3).to(dtype)
    z, target, upstream = wider[:, :columns], torch.randint(columns - 5, (rows,)), torch.rand(rows)
    if ignore_index is not None:
        target[::4] = ignore_index
        z[::4] = torch.nan
    rewards, ranked, outside = (-0.25, 0.1, -0.05), columns - 5, wider[:, columns:].clone()
    numbers, keys = ops.reward_shaped_ce_stats(z, target, 0, ranked, top_k, True, ignore_index)
    loss, coefficients, stats = ops.reward_shaped_ce_combine(numbers[None], keys[None], target, *rewards, ignore_index)
    gradient = ops.reward_shaped_ce_grad(z, target, upstream, coefficients, 0, ranked)
    found = ops.reward_shaped_ce_one_pass_(z, target, upstream, ranked, top_k, True, *rewards, ignore_index)
    assert torch.equal(found[0], loss) and torch.equal(found[1], stats) and torch.equal(z, gradient)
    assert torch.equal(wider[:, columns:], outside)
    assert rows == 0 or (loss.any() and gradient.isfinite().all())


def test_the_result_does_not_depend_on_the_number_of_threads():
    z, target = torch.randn(3, 100_000).bfloat16(), torch.randint(100_000, (3,))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(ops.reward_shaped_ce_stats(z, target, 0, 99_000, 100, True, None))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(found[0][0], other[0]) and torch.equal(found[0][1], other[1])


def test_a_target_that_is_no_token_gives_nan():
    z, target = torch.randn(5, 300), torch.tensor([-1, 300, 290, 2**40, 3])
    for stats, combine in (
        (ops.reward_shaped_ce_stats, ops.reward_shaped_ce_combine),
        (ops._stats, ops._combine),
    ):
        numbers, keys = stats(z, target, 0, 280, 7, True, -100)
        loss = combine(numbers[None], keys[None], target, -0.25, 0.1, -0.05, -100)[0]
        assert loss.isnan().tolist() == [True, True, True, True, False]


def test_wrong_arguments_name_the_tensor():
    z, target, numbers = torch.zeros(3, 10), torch.zeros(2, dtype=torch.int64), torch.zeros(1, 3, 5)
    with pytest.raises(RuntimeError, match=r"target has shape \[2\], expected \(rows\) = \[3\]"):
        ops.reward_shaped_ce_stats(z, target, 0, 10, 0, False, None)
    with pytest.raises(RuntimeError, match=r"numbers has shape \[1, 3, 5\], expected"):
        ops.reward_shaped_ce_combine(numbers, torch.zeros(1, 3, 0), torch.zeros(3).long(), 0.0, 0.0, 0.0, None)
    with pytest.raises(RuntimeError, match=r"grad_loss has shape \[2\], expected \(rows\) = \[3\]"):
        ops.reward_shaped_ce_one_pass_(z, torch.zeros(3).long(), torch.zeros(2), 10, 0, False, 0.0, 0.0, 0.0, None)
    with pytest.raises(RuntimeError, match="logits has strides"):
        ops.reward_shaped_ce_stats(z.t(), torch.zeros(10).long(), 0, 3, 0, False, None)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )


LOSS = """
import sys, torch
from megatron_ptrl import RewardShaping, ops, reward_shaped_cross_entropy
{before}
z = torch.linspace(-3, 3, 600).view(2, 300).requires_grad_()
for _ in range(2):
    loss = reward_shaped_cross_entropy(z, torch.tensor([1, 299]), RewardShaping(-0.25, 0.1, -0.1, 20))
loss.sum().backward()
print(loss.tolist(), z.grad.abs().sum().item())
"""


def test_the_fallback_is_announced_once_unless_asked_for():
    kernels = python(LOSS.format(before=""))
    asked = python(LOSS.format(before=""), MEGATRON_PTRL_KERNELS="0")
    missing = python(LOSS.format(before="ops.LIBRARY = ops.LIBRARY.with_name('absent.so')"))
    assert kernels.stderr == asked.stderr == ""
    assert missing.stderr.count("absent.so was not built; install a C++ compiler") == 1
    assert asked.stdout == missing.stdout
    values = [[float(x.strip("[],")) for x in run.stdout.split()] for run in (kernels, asked)]
    torch.testing.assert_close(*map(torch.tensor, values))


def test_kernels_older_than_their_sources_are_announced(tmp_path):
    library, source = tmp_path / "megatron_ptrl" / "_C.so", tmp_path / "csrc" / "draw_cpu.cpp"
    for path in (library, source):
        path.parent.mkdir()
    shutil.copy(ops.LIBRARY, library)
    source.touch()
    code = LOSS.format(before=f"from pathlib import Path; ops.LIBRARY = Path({str(library)!r})")
    os.utime(library, (0, 0))
    assert python(code).stderr.count("_C.so is older than csrc/draw_cpu.cpp") == 1
    os.utime(source, (0, 0))
    assert python(code).stderr == ""


def test_the_package_imports_without_torch():
    python("import sys, megatron_ptrl; megatron_ptrl.RewardShaping(); assert 'torch' not in sys.modules")
    python("import sys; from megatron_ptrl import TokenStats; assert 'megatron.core' not in sys.modules")


def test_the_fallback_in_place_writes_over_its_input(monkeypatch):
    (*_, z), target = shards(torch.float32)
    target = torch.where(target < 0, target, target % 600)
    numbers, keys = ops.reward_shaped_ce_stats(z, target, 0, 600, 0, False, -100)
    coefficients = ops.reward_shaped_ce_combine(numbers[None], keys[None], target, 0.0, 0.0, 0.0, -100)[1]
    upstream = torch.rand(len(target))
    expected, again = ops._grad(z, target, upstream, coefficients, 0, 600), z.clone()
    monkeypatch.setattr(ops, "load_kernels", lambda: False)
    with warnings.catch_warnings(action="error"):
        ops.reward_shaped_ce_grad_(z, target, upstream, coefficients, 0, 600)
        ops.reward_shaped_ce_one_pass_(again, target, upstream, 600, 0, False, 0.0, 0.0, 0.0, -100)
    assert torch.equal(z, expected)
    torch.testing.assert_close(again, expected)
