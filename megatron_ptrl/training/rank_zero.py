"""What rank 0 does alone while the others wait, however long it takes."""

import time
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from megatron_ptrl.errors import InputError

Answer = TypeVar("Answer")
SECONDS_BETWEEN_LOOKS = 0.2


def from_rank_0(work: Callable[[], Answer]) -> Answer:
    """What `work` gives on rank 0, or its InputError, on every rank. Collective over all ranks.

    A collective gives up after the process group's timeout, half an hour, and tokenizing a large corpus takes longer:
    so the others look into the store of the process group until it is done.
    """
    store, rank = _get_default_store(), dist.get_rank()
    # Its number among the calls, which all ranks make in the same order.
    done = f"ptrl/from_rank_0/{store.add(f'ptrl/from_rank_0/calls/{rank}', 1)}"
    answer: list = [None, None]
    if rank == 0:
        try:
            answer[0] = work()
        except InputError as error:
            answer[1] = str(error)
        finally:
            store.set(done, "1")
    else:
        while not store.check([done]):
            time.sleep(SECONDS_BETWEEN_LOOKS)
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise InputError(answer[1])
    return answer[0]
