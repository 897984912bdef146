"""Counts every collective call of one step of each stage, on processes of this machine, and holds the counts against
the formulas of megatron_ptrl/training/collectives.py, which docs/scaling.md shows.

    python benchmarks/collectives.py [CASE ...]

Ends with 1 where a count and a formula differ.
"""

import argparse
import collections
import multiprocessing
import sys
import tempfile
import traceback
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from collective_calls import differences, table
from collective_cases import CASES

from megatron_ptrl.training.collectives import Collective


def _work(rank: int, world_size: int, names: list[str], store: str, results: Any) -> None:
    from collective_steps import counted  # in the ranks alone: it changes torch where there is no CUDA

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    for name in names:
        try:
            results.put((rank, name, counted(rank, world_size, CASES[name])))
        except Exception:
            results.put((rank, name, traceback.format_exc()))
            return
    dist.destroy_process_group()


def count_all(names: list[str]) -> Iterator[tuple[str, list[dict[str, list[Collective]]]]]:
    """Each case with what its ranks counted, as soon as all have. RuntimeError where a rank fails."""
    context = multiprocessing.get_context("spawn")
    for size in sorted({CASES[name].ranks for name in names}):
        mine = [name for name in names if CASES[name].ranks == size]
        results, found = context.Queue(), collections.defaultdict[str, dict[int, Any]](dict)
        with tempfile.TemporaryDirectory() as folder:
            arguments = (size, mine, f"{folder}/store", results)
            workers = [context.Process(target=_work, args=(rank, *arguments), daemon=True) for rank in range(size)]
            for worker in workers:
                worker.start()
            for _ in range(size * len(mine)):
                rank, name, result = results.get(timeout=300)
                if isinstance(result, str):
                    raise RuntimeError(f"{name}, rank {rank}:\n{result}")
                found[name][rank] = result
                if len(found[name]) == size:
                    yield name, [found[name][place] for place in range(size)]
            for worker in workers:
                worker.join()


def main(arguments: list[str] | None = None) -> int:
    """Print the calls of each case's first and last rank, and where they are not what the formulas say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all without")
    names = parser.parse_args(arguments).cases or list(CASES)
    for name in names:
        if name not in CASES:
            parser.error(f"there is no case {name!r}; expected one of {', '.join(map(repr, CASES))}")
    wrong = 0
    for name, results in count_all(names):
        lines = [line for rank, result in enumerate(results) for line in differences(result, rank)]
        wrong += bool(lines)
        print(f"{name}: {CASES[name].ranks} ranks, {'as predicted' if not lines else 'NOT as predicted'}")
        for rank in (0, len(results) - 1):
            print(f"  rank {rank}\n{table(results[rank])}")
        print("".join(f"  {line}\n" for line in lines), end="", flush=True)
    print(f"{len(names)} cases, {wrong} not as predicted")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
