"""The data stages of thinking: `ptrl think` against a bare client, `ptrl assemble` against Megatron's loop, memory.

    python benchmarks/data.py [--rounds 3] [--output FILE.json]
    python benchmarks/data.py --memory [MEGABYTES]      also a corpus of that size, 1000 by default, through all of it

think_rate, assemble_rate and data_memory say what is measured. Medians of the rounds; a comparison is the median of
the rounds' own, in which both sides ran one behind the other. MB are 10^6 bytes, of joined text in the assembly.
"""

import argparse
import json
import os
import statistics
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


def main() -> None:
    """Print the tables and, when asked, write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=6000, help="for the server")
    parser.add_argument("--megabytes", type=float, default=64, help="of documents and thinking to assemble")
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--workers", type=int, default=2, help="of the assembly")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=float, nargs="?", const=1000, help="MB of corpus")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    import assemble_rate
    import data_memory
    import think_rate

    from megatron_ptrl.training.runlog import environment

    about = environment()
    setting = {name: value for name, value in vars(arguments).items() if name != "output"}
    versions = ", ".join(f"{name} {version}" for name, version in about["packages"].items() if version)
    print(
        f"# {about['machine']}, {about['cores']} cores, commit {about['commit']}, Python {about['python']}, {versions}"
    )
    print("# " + ", ".join(f"{name} {value}" for name, value in setting.items() if value is not None))
    result: dict[str, Any] = {"setting": setting, "environment": about}
    result["think"] = think_rate.measure(arguments.documents, arguments.rounds)
    print_think(result["think"])
    megabytes, rounds = assemble_rate.measure(arguments.megabytes, arguments.vocab, arguments.workers, arguments.rounds)
    result["assemble"] = {"megabytes": megabytes, "rounds": rounds}
    print_assemble(megabytes, rounds)
    if arguments.memory:
        result["memory"] = data_memory.measure(arguments.memory, arguments.workers)
        print_memory(result["memory"])
    result["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + os.linesep)


def median(rounds: Iterable[dict[str, float]], name: str) -> float:
    return statistics.median(result[name] for result in rounds)


def print_think(results: dict[str, list[dict[str, float]]]) -> None:
    """Rates, of the bare client's, and what a document takes of the processor."""
    bare = next(iter(results.values()))
    print(f"\n{'a server that takes 20 ms':<30}{'documents/s':>12}{'ratio':>7}{'CPU ms each':>13}")
    for name, rounds in results.items():
        ratio = statistics.median(
            own["documents/s"] / other["documents/s"] for own, other in zip(rounds, bare, strict=True)
        )
        rate, cpu = median(rounds, "documents/s"), median(rounds, "us/document") / 1e3
        print(f"{name:<30}{rate:>12,.0f}{ratio:>7.2f}{cpu:>13.3f}")


def print_assemble(megabytes: float, results: dict[str, list[dict[str, float]]]) -> None:
    """Rates, of the loop's, what a MB takes of the processors, and peak memory."""
    loop = next(iter(results.values()))
    print(f"\n{'thinking to .bin/.idx':<30}{'MB/s':>12}{'ratio':>7}{'CPU ms a MB':>13}{'peak MB':>9}")
    for name, rounds in results.items():
        ratio = statistics.median(other["seconds"] / own["seconds"] for own, other in zip(rounds, loop, strict=True))
        rate, cpu = megabytes / median(rounds, "seconds"), median(rounds, "cpu_seconds") / megabytes * 1e3
        print(f"{name:<30}{rate:>12.2f}{ratio:>7.2f}{cpu:>13.1f}{max(r['memory'] for r in rounds):>9.0f}")


def print_memory(results: list[dict[str, Any]]) -> None:
    """What each command read, how long it took, and the most memory of its processes together."""
    print(f"\n{'memory':<30}{'MB read':>12}{'seconds':>20}{'peak MB':>9}")
    for row in results:
        print(f"{row['command']:<30}{row['megabytes']:>12,.0f}{row['seconds']:>20,.0f}{row['peak']:>9,.0f}")


if __name__ == "__main__":
    main()
