"""The memory of a large gradient, kept on CPUs for the next of its size: never of two tensors at once."""

import threading

import pytest
import torch
from torch import Tensor

from megatron_ptrl import ops

pytestmark = pytest.mark.skipif(not ops.load_kernels(), reason="the kernels were not built")
ROWS, COLUMNS = 72, 131_072  # 18 MiB in bf16


def gradient(rows: int, value: float) -> Tensor:
    """Of constant logits and an upstream gradient of `value`: value / COLUMNS everywhere but at the target."""
    logits, target = torch.zeros(rows, COLUMNS, dtype=torch.bfloat16), torch.zeros(rows, dtype=torch.int64)
    numbers, keys = ops.reward_shaped_ce_stats(logits, target, 0, COLUMNS, 0, False, None)
    _, coefficients, _ = ops.reward_shaped_ce_combine(numbers[None], keys[None], target, 0.0, 0.0, 0.0, None)
    return ops.reward_shaped_ce_grad(logits, target, torch.full((rows,), value), coefficients, 0, COLUMNS)


def holds(grad: Tensor, value: float) -> bool:
    return bool((grad[:, 1:] == torch.tensor(value / COLUMNS, dtype=torch.bfloat16)).all())


def test_memory_goes_to_the_next_of_its_size_and_to_nobody_while_it_is_used():
    first, second = gradient(ROWS, 1.0), gradient(ROWS, 2.0)
    assert first.data_ptr() != second.data_ptr()
    assert holds(first, 1.0) and holds(second, 2.0)
    place, view = first.data_ptr(), first[3:]
    del first
    third = gradient(ROWS, 4.0)
    assert third.data_ptr() != place and holds(view, 1.0), "a view keeps its memory"
    del view
    other_size = gradient(2 * ROWS, 8.0)
    fourth = gradient(ROWS, 16.0)
    assert holds(third, 4.0) and holds(other_size, 8.0) and holds(fourth, 16.0)
    place = fourth.data_ptr()
    del fourth
    assert gradient(ROWS, 1.0).data_ptr() == place


def test_threads_do_not_share_it():
    wrong = []

    def work(value: float) -> None:
        wrong.extend([value for _ in range(8) if not holds(gradient(ROWS, value), value)])

    threads = [threading.Thread(target=work, args=(2.0**i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
