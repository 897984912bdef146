"""What rank 0 does alone may take longer than any collective waits."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
from ranks import Ranks

LOOKS = 3  # of the rank that waits, each an hour after the one before; a collective waits for half an hour
SECONDS = 60.0


def slow_work(rank: int, world_size: int) -> tuple[list[str], list[bool]]:
    """(two answers of rank 0 and its refusal, whether the work was over when each of the collectives began).

    Rank 0 works until the other one has looked often enough, or has begun a collective instead.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    from megatron_ptrl.errors import InputError
    from megatron_ptrl.training import rank_zero

    store, broadcast = _get_default_store(), dist.broadcast_object_list
    hours, over = 0, []

    def look_again(seconds: float) -> None:
        nonlocal hours
        hours += 1
        if hours % LOOKS == 0:
            store.set(f"{name} may end", "")

    def begin(*args: object, **options: object) -> None:
        over.append(store.check([f"{name} is over"]))
        store.set(f"{name} may end", "")
        broadcast(*args, **options)

    def tokenize() -> str:
        assert rank == 0
        store.wait([f"{name} may end"], timedelta(seconds=SECONDS))
        store.set(f"{name} is over", "")
        return name

    def refuse() -> str:
        raise InputError(f"no {tokenize()}")

    clock = SimpleNamespace(sleep=look_again, monotonic=lambda: 3600.0 * hours, time=lambda: 3600.0 * hours)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_zero, "time", clock)
        patch.setattr(dist, "broadcast_object_list", begin)
        name = "first"
        found = [rank_zero.from_rank_0(tokenize)]
        name = "second"
        found.append(rank_zero.from_rank_0(tokenize))
        name = "third"
        with pytest.raises(InputError) as caught:
            rank_zero.from_rank_0(refuse)
    return [*found, str(caught.value)], over


def test_the_others_wait_longer_than_a_collective(ranks: Ranks) -> None:
    assert ranks.run(2, slow_work) == [(["first", "second", "no third"], [True] * 3)] * 2
