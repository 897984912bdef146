"""What rank 0 does alone may take longer than any collective waits."""

import time
from datetime import timedelta
from pathlib import Path

import pytest
from ranks import RankError, Ranks

TIMEOUT = 1.0  # seconds of the process group; it is half an hour in a run


def slow_work(rank: int, world_size: int, folder: Path) -> list[str]:
    """Two answers of rank 0, the first of which takes longer than a collective may; then its refusal."""
    import torch.distributed as dist

    from megatron_ptrl.errors import InputError
    from megatron_ptrl.training.rank_zero import from_rank_0

    dist.destroy_process_group()
    store, limit = f"file://{folder}/store", timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=limit)

    def tokenize(seconds: float) -> str:
        assert rank == 0
        time.sleep(seconds)
        return f"folder{seconds}"

    def refuse() -> str:
        raise InputError("no usable conversation")

    found = [from_rank_0(lambda: tokenize(3 * TIMEOUT)), from_rank_0(lambda: tokenize(0.0))]
    with pytest.raises(InputError, match="no usable conversation") as caught:
        from_rank_0(refuse)
    return [*found, str(caught.value)]


def test_the_others_wait_longer_than_a_collective(ranks: Ranks, tmp_path: Path) -> None:
    try:
        answers = ranks.run(2, slow_work, tmp_path)
    except RankError as error:
        pytest.fail(str(error)[-500:])
    assert answers == [["folder3.0", "folder0.0", "no usable conversation"]] * 2
