"""The source of the CUDA kernels, run by an emulation of thread blocks: no GPU needed, and none replaced.

The same bar as for every other implementation, against fp64, on rows that lead the selection astray.
"""

import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accuracy import PLAIN, SHAPINGS, assert_as_accurate, eager_and_exact
from emulated import DTYPES, SANITIZE, Emulated, compile_kernels
from test_reward_shaped_ce import RANKED, check, logits_and_target
from torch import Tensor

from megatron_ptrl import RewardShaping, ops, reward_shaped_cross_entropy

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
# One tile of the emulated blocks is 64 x 16 bytes of a row; their buffers hold four, and up to 256 keys are ranked in
# the same read.
TILE = 512


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    prebuilt = os.environ.get("PTRL_EMULATED_KERNELS")
    return Emulated(Path(prebuilt) if prebuilt else compile_kernels(tmp_path_factory.mktemp("emulated")))


@pytest.fixture(autouse=True)
def installed(kernels: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.install(monkeypatch)


def hard_rows(columns: int, dtype: torch.dtype) -> Tensor:
    """Ties, stale bounds, full buffers, nothing to rank."""
    torch.manual_seed(columns)
    column = torch.arange(columns)
    normal = torch.randn(columns) * 2
    rows = [
        normal,
        normal * 4,
        torch.full((columns,), 1.5),
        column * 2e-3,  # each tile above the one before: every buffer fills
        column * -2e-3,
        torch.where(column % 7 == 0, 3.0, -20.0),
        normal.floor(),
        # Distinct values fill the buffer in the first tile; the equal ones after it make them stale.
        torch.where(column < TILE, torch.where(column % 8 == 0, -30.0, -20 + 0.03 * column), torch.tensor(5.0)),
        torch.where(column < columns // 2, -torch.inf, normal),
        torch.where(column % 2 == 0, 0.0, -0.0),
        torch.where((column >= columns // 2) & (column < columns // 2 + 30), 8 + normal, normal - 6),
    ]
    return torch.stack(rows).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shaping", SHAPINGS)
def test_every_template(dtype, shaping):
    check(*logits_and_target(6, 1037, dtype), replace(shaping, top_k=20))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [1, 60, 256, 257])
@pytest.mark.parametrize("columns", [1, 37, 513, 5003])
def test_hard_rows(columns, top_k, dtype):
    z = hard_rows(columns, dtype)
    check(z, torch.arange(len(z)) * 997 % columns, replace(RANKED, top_k=top_k))


def sharded(z: Tensor, target: Tensor, upstream: Tensor, shaping: RewardShaping, tp: int, vocab_size: int):
    """Loss and gradient of `tp` shards, joined as ranks would."""
    columns = z.shape[-1] // tp
    places = [(columns * i, min(max(vocab_size - columns * i, 0), columns)) for i in range(tp)]
    parts = z.chunk(tp, -1)
    pairs = [ops.reward_shaped_ce_stats(part, target, *place, shaping.top_k, True, -100)
             for part, place in zip(parts, places, strict=True)]  # fmt: skip
    numbers, keys = (torch.stack(each) for each in zip(*pairs, strict=True))
    constants = (shaping.beta, shaping.lambda_head, shaping.lambda_tail, -100)
    loss, coefficients, _ = ops.reward_shaped_ce_combine(numbers, keys, target, *constants)
    for part, place in zip(parts, places, strict=True):
        before = part.clone()
        gradient = ops.reward_shaped_ce_grad(part, target, upstream, coefficients, *place)
        assert torch.equal(part, before)
        ops.reward_shaped_ce_grad_(part, target, upstream, coefficients, *place)  # a view with gaps between its rows
        assert torch.equal(part, gradient)
    return loss, z


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tp, columns", [(1, 1500), (2, 1203), (3, 601), (3, 40)])
def test_shards(tp, columns, dtype):
    """Odd widths: every shard but the first starts where no 16 bytes can be loaded. The last one ends in padding."""
    for top_k in (1, 33, min(300, tp * columns - 20)):
        shaping = replace(RANKED, top_k=top_k)
        z = hard_rows(tp * columns, dtype)
        vocab_size = tp * columns - 13
        z[:, vocab_size:] += 9  # the largest logits are padding, which must not be ranked
        target = torch.arange(len(z)) * 997 % vocab_size
        target[8] = vocab_size - 1  # the first half of that row is -inf
        upstream = torch.linspace(-1, 1, len(z)) + 0.05
        eager, exact = eager_and_exact(z, target, upstream, shaping, vocab_size)
        ignored = target.clone()
        ignored[3] = -100
        for pair in (eager, exact):
            for value in pair:
                value[3] = 0
        loss, gradient = sharded(z.clone(), ignored, upstream, shaping, tp, vocab_size)
        assert_as_accurate(loss, eager[0], exact[0])
        assert_as_accurate(gradient, eager[1], exact[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [0, 100, 300])
def test_the_order_in_which_threads_run_changes_no_bit(kernels, dtype, top_k):
    z, target = hard_rows(2600, dtype), torch.arange(11)
    found = []
    for seed in range(4):
        kernels.seed(seed)
        found.append(ops.reward_shaped_ce_stats(z, target, 0, 2600, top_k, True, None))
    for numbers, keys in found[1:]:
        assert torch.equal(numbers, found[0][0]) and torch.equal(keys, found[0][1])
    # Keys and ties are exact; what else is said of a row agrees with torch operators.
    numbers, keys = ops._stats(z, target, 0, 2600, top_k, True, None)
    torch.testing.assert_close(found[0][0], numbers, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[0][0][:, 5], numbers[:, 5])
    assert torch.equal(found[0][1].float().sort().values, keys.float().sort().values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_alignment_and_strides_change_no_bit(dtype):
    z, target = logits_and_target(12, 777, dtype)
    upstream = torch.rand(12)
    shaping = replace(RANKED, top_k=40)

    def value_and_gradient(logits: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        leaf = logits.detach().requires_grad_()
        loss = reward_shaped_cross_entropy(leaf, target.view(shape), shaping)
        loss.backward(upstream.view(shape))
        return loss.detach().reshape(-1), leaf.grad.reshape(12, -1)

    expected = value_and_gradient(torch.zeros(12, 784, dtype=dtype)[:, :777].copy_(z), (12,))
    for offset in range(8):
        cut = torch.zeros(12, 801, dtype=dtype)[:, offset : offset + 777].copy_(z)
        swapped = cut.view(3, 4, 777).transpose(0, 1).clone(memory_format=torch.preserve_format).transpose(0, 1)
        for same, shape in ((cut, (12,)), (swapped, (3, 4)), (cut.unflatten(0, (2, 3, 2)), (2, 3, 2))):
            found = value_and_gradient(same, shape)
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("shaping", [PLAIN, replace(RANKED, top_k=40), replace(RANKED, top_k=290)])
def test_not_a_number_and_infinity_give_nan(shaping):
    z = torch.zeros(4, 300)
    z[0] = -torch.inf
    z[1, 5] = torch.nan
    z[2, 5] = torch.inf
    z[3] = torch.nan
    target = torch.zeros(4, dtype=torch.int64)
    leaf = z.requires_grad_()
    loss = reward_shaped_cross_entropy(leaf, target, shaping)
    loss.sum().backward()
    assert loss.isnan().all() and leaf.grad.isnan().any(-1).all()


def test_a_target_that_is_no_token_gives_nan(kernels):
    """Before the first column, behind the last one of all shards, and among those that pad the vocabulary."""
    z, target = logits_and_target(5, 300, torch.float32)
    target[:4] = torch.tensor([-1, 300, 290, 2**40])
    shards = z.clone().chunk(2, -1)
    pairs = [kernels.stats(part, target, 150 * i, 150 - 20 * i, 40, True, -100) for i, part in enumerate(shards)]
    numbers, keys = (torch.stack(each) for each in zip(*pairs, strict=True))
    loss, coefficients, _ = kernels.combine(numbers, keys, target, -0.25, 0.1, -0.05, -100)
    kernels.stretch(0)
    one_pass = kernels.one_pass_(z, target, torch.ones(5), 280, 40, True, -0.25, 0.1, -0.05, -100)[0]
    gradients = [kernels.grad(part, target, torch.ones(5), coefficients, 0, 150) for part in shards]
    for found in (loss, one_pass, z[:, 0], *(each[:, 0] for each in gradients)):
        assert found.isnan().tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_further_apart_than_an_int_counts(kernels, dtype):
    """Two rows of memory that is never touched between them."""
    z, target = logits_and_target(2, 600, dtype)
    apart = torch.empty(2**31 + 1000, dtype=dtype).as_strided((2, 600), (2**31 + 8, 1)).copy_(z)
    constants, upstream = (-0.25, 0.1, -0.05, None), torch.ones(2)
    found = []
    for rows in (z, apart):
        numbers, keys = kernels.stats(rows, target, 0, 600, 40, True, None)
        _, coefficients, _ = kernels.combine(numbers[None], keys[None], target, *constants)
        kernels.grad_(rows, target, upstream, coefficients, 0, 600)
        found.append((numbers, keys, rows))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("shaping", SHAPINGS)
def test_extreme_rows(shaping):
    z, target = logits_and_target(6, 900, torch.float32)
    z[0] = z[0].sign() * 1e4
    z[1] *= 1000
    z[2, :800], target[2] = -torch.inf, 850
    z[3], target[3] = 0.0, 3
    z[3, 3] = 24.6  # 1 - p_x = 1e-7
    z[4, target[4]] = -65.0  # p_x = 1e-30
    z[5], target[5] = -100.0, 9
    z[5, 9] = 100.0  # every other token underflows
    check(z, target, shaping if shaping.top_k <= 900 else replace(shaping, top_k=100))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_of_many_equal_terms_does_not_pile_up(kernels, dtype):
    """The same e^(z - max) hundreds of times in one thread, beside a target so likely that the loss is their sum."""
    z, target = torch.full((1, 32768), math.log(0.9931182)).to(dtype), torch.tensor([5])
    z[0, : 64 * 16 // z.element_size()] = 0  # the first logits of each thread: its maximum
    z[0, 5] = 17
    numbers, keys = kernels.stats(z, target, 0, 32768, 0, False, None)
    loss, *_ = kernels.combine(numbers[None], keys[None], target, 0.0, 0.0, 0.0, None)
    others = torch.cat([z[0, :5], z[0, 6:]]).double() - 17
    assert abs(loss.item() / torch.log1p(others.exp().sum()).item() - 1) < 2e-6


@pytest.mark.skipif("PTRL_EMULATED_KERNELS" in os.environ, reason="runs these tests with sanitizers")
def test_under_sanitizers(tmp_path):
    library = compile_kernels(tmp_path, SANITIZE)
    runtime = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = {
        **os.environ,
        "PTRL_EMULATED_KERNELS": str(library),
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    one_pass = str(Path(__file__).with_name("test_emulated_one_pass.py"))
    chosen = (
        "(shards and (1-1500 or 3-40)) or (hard_rows and 513 and not 257) or (hard_rows and (8-8 or 37-8)) or ignored "
        "or (alignment and dtype0)"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, one_pass, "-k", chosen],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
