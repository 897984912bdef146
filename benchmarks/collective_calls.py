"""The collective calls that a rank makes, seen where PyTorch dispatches them: in place, coalesced, whoever makes them.

Who made one is the innermost function on the stack that is megatron_ptrl's or Megatron-Core's.
"""

import collections
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ptrl.training.collectives import MEGATRON, OURS, Collective

_GROUPS = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "CONTEXT_PARALLEL_GROUP": "cp",
    "DATA_PARALLEL_GROUP": "dp",
    "DATA_PARALLEL_GROUP_WITH_CP": "dp cp",
    "MODEL_PARALLEL_GROUP": "tp pp",
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "all",
    "default_pg": "all",
    "EMBEDDING_GROUP": "first and last of pp",
}
# The name of c10d's operator -> ours, and which of its arguments this rank hands in.
_OPERATIONS = {
    "allreduce_": ("all-reduce", 0),
    "allreduce_coalesced_": ("all-reduce", 0),
    "_allgather_base_": ("all-gather", 1),
    "allgather_": ("all-gather", 1),
    "allgather_into_tensor_coalesced_": ("all-gather", 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "broadcast_": ("broadcast", 0),
    "send": ("send", 0),
    "recv_": ("receive", 0),
}


class Calls(TorchDispatchMode):
    """The collective calls of this rank while it is entered, but for those over groups of one rank."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: collections.Counter[tuple[str, str, str, int]] = collections.Counter()

    @property
    def seen(self) -> list[Collective]:
        """Each call with how often it was made."""
        return [Collective(*call, count) for call, count in self._seen.items()]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._see(func.__name__.split(".")[0], args)
        return func(*args, **(kwargs or {}))

    def _see(self, name: str, args: Any) -> None:
        groups = [dist.ProcessGroup.unbox(a) for a in args if _is_group(a)]
        if groups and groups[0].size() == 1:
            return
        operation, place = _OPERATIONS.get(name, (name, 0))
        group = groups[0].group_desc if groups else "none"
        group = _GROUPS.get(group, group)
        # Between two stages Megatron-Core sends one way over the group of all ranks, to the same neighbour.
        group = "pp" if operation in ("send", "receive") else group
        self._seen[_caller(), group, operation, _bytes(args[place])] += 1


def _is_group(argument: Any) -> bool:
    return isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type())


def _bytes(argument: Any) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.nbytes
    return sum(_bytes(part) for part in argument) if isinstance(argument, (list, tuple)) else 0


def _caller() -> str:
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.name != "host.py" and "megatron_ptrl" in path.parts:
            return OURS
        if "megatron" in path.parts and "core" in path.parts:
            return MEGATRON
        frame = frame.f_back
    return "neither"


def merged(found: Iterable[Collective]) -> list[Collective]:
    """Calls that look alike counted together: which part of a step they serve cannot be seen."""
    total: collections.Counter[tuple[str, str, str, int]] = collections.Counter()
    for one in found:
        total[one.caller, one.group, one.operation, one.bytes] += one.count
    return [Collective(*call, count) for call, count in sorted(total.items())]


def differences(result: dict[str, list[Collective]], rank: int = 0) -> list[str]:
    """A line for each kind of call whose count is not what the formulas say."""
    counts = [{(o.caller, o.group, o.operation, o.bytes): o.count for o in result[n]} for n in ("counted", "expected")]
    lines = []
    for call in sorted(counts[0].keys() | counts[1].keys()):
        seen, expected = (count.get(call, 0) for count in counts)
        if seen != expected:
            lines.append(f"rank {rank}: {', '.join(map(str, call[:3]))} of {call[3]} bytes: {seen}, not {expected}")
    return lines


def table(result: dict[str, list[Collective]]) -> str:
    """The calls of a rank."""
    rows = [(o.group, o.operation, f"{o.bytes:,}", str(o.count), o.caller) for o in result["counted"]]
    return "\n".join(f"    {g:<22}{o:<16}{b:>10} bytes x {c:<5}{w}" for g, o, b, c, w in rows)
