"""Assembling documents and their thinking against Megatron's own way to `.bin/.idx`: a loop over the tokenizer and the
IndexedDatasetBuilder in one process, as its tools/preprocess_data.py has it, but with the tokenizer's bare Rust encode.

    python benchmarks/data.py [--megabytes 64] [--workers 2] [--output FILE.json]

The loop gets the texts joined already and filters nothing; ours joins and filters. MB are those of the joined texts.
Each side runs in a process of its own, in turn, so that its peak memory is its own; medians of the rounds.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from datetime import datetime, timezone
from pathlib import Path

LOOP, OURS = "Megatron's loop, one process", "ptrl assemble"


def main() -> None:
    """Print a table and, when asked, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=64, help="of documents and thinking")
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--side", choices=(LOOP, OURS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(run_side(arguments)))
        return
    with tempfile.TemporaryDirectory() as name:
        arguments.folder = Path(name)
        megabytes = make_data(arguments)
        rounds: dict[str, list[dict[str, float]]] = {LOOP: [], OURS: []}
        for _ in range(arguments.rounds):
            for side, results in rounds.items():
                results.append(measure(arguments, side))
        assert_same_tokens(arguments.folder)
    report(arguments, megabytes, rounds)


def make_data(arguments: argparse.Namespace) -> float:
    """thoughts.jsonl, the same joined in joined.jsonl, and a tokenizer; MB of joined text.

    Documents are pieces of the Python standard library, their thinking other pieces, of the paper's mean length.
    """
    from megatron_ptrl.config import AssembleConfig
    from megatron_ptrl.data.tokenizer import train_tokenizer
    from megatron_ptrl.records import Thought
    from megatron_ptrl.thinking.joined import texts_of

    folder, chosen = arguments.folder, random.Random(1)
    paths = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    chosen.shuffle(paths)
    library = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in paths[:600])
    config = AssembleConfig()
    tags = (config.opening, config.closing)
    train_tokenizer([library[: 1 << 22]], folder / "tokenizer.json", arguments.vocab)
    size = count = 0
    with (folder / "thoughts.jsonl").open("wb") as thoughts, (folder / "joined.jsonl").open("w") as joined:
        while size < arguments.megabytes * 1e6:
            text, thinking = (piece(library, chosen, length) for length in (4000, 6000))
            if any(tag in part for tag in tags for part in (text, thinking)):
                continue
            thought = Thought(
                id=str(count),
                text=text,
                metadata={},
                thinking=thinking,
                model="none",
                prompt="default",
                finish_reason="stop",
                prompt_tokens=None,
                thinking_tokens=None,
                seed=count,
            )
            (whole,) = texts_of(thought, None, config)
            thoughts.write(thought.to_line() + b"\n")
            joined.write(json.dumps({"text": whole}) + "\n")
            size += len(whole.encode("utf-8"))
            count += 1
    return size / 1e6


def piece(library: str, chosen: random.Random, length: int) -> str:
    """Some of the library, half to one and a half times `length` characters."""
    begin = chosen.randrange(len(library) - 2 * length)
    return library[begin : begin + length // 2 + chosen.randrange(length)]


def measure(arguments: argparse.Namespace, side: str) -> dict[str, float]:
    """`run_side` in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--side", side, "--folder", str(arguments.folder)]
    done = subprocess.run(
        [*command, "--workers", str(arguments.workers)], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def run_side(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds without the imports, and the peak memory."""
    folder = arguments.folder
    if arguments.side == LOOP:
        work = import_loop(folder)
    else:
        from megatron_ptrl.config import AssembleConfig, ThinkingFilterConfig
        from megatron_ptrl.thinking.assemble_stage import run

        # Pieces of a library are no prose; the filters run, but at bounds that let these pass.
        filters = ThinkingFilterConfig(max_compression=1000, max_copied=0.999)
        config = AssembleConfig(
            input=[str(folder / "thoughts.jsonl")],
            output=str(folder / "ours"),
            tokenizer=str(folder / "tokenizer.json"),
            workers=arguments.workers,
            filters=filters,
        )

        def work() -> None:
            run(config)

    with Watch() as watch:
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
    # The workers are gone by now, and were children of a server, so only the watch has seen what they took.
    return {"seconds": seconds, "cpu_seconds": watch.cpu_seconds, "memory": watch.peak}


class Watch:
    """The most resident memory, in MB, of this process and all its workers together, and the processor's time that
    they took, in seconds, both looked at every 50 ms."""

    def __init__(self) -> None:
        self.peak = 0.0
        self._seconds: dict[int, tuple[float, float]] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        import psutil

        while not self._done.wait(0.05):
            me, resident = psutil.Process(), 0
            for process in [me, *me.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    resident += process.memory_info().rss
                    now = sum(process.cpu_times()[:2])
                    before, _ = self._seconds.get(process.pid, (now if process is me else 0.0, 0.0))
                    self._seconds[process.pid] = (before, now)
            self.peak = max(self.peak, resident / 1e6)

    @property
    def cpu_seconds(self) -> float:
        return sum(now - before for before, now in self._seconds.values())

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()


def import_loop(folder: Path):
    """Megatron's loop, ready to be called."""
    import tokenizers
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    eod = tokenizer.token_to_id("<|endoftext|>")
    dtype = DType.optimal_dtype(tokenizer.get_vocab_size())

    def work() -> None:
        builder = IndexedDatasetBuilder(str(folder / "loop.bin"), dtype=dtype)
        with (folder / "joined.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                ids = [*tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids, eod]
                builder.add_document(torch.IntTensor(ids), [len(ids)])
        builder.finalize(str(folder / "loop.idx"))

    return work


def assert_same_tokens(folder: Path) -> None:
    """Both wrote the same files."""
    for suffix in (".bin", ".idx"):
        if (folder / f"ours{suffix}").read_bytes() != (folder / f"loop{suffix}").read_bytes():
            raise SystemExit(f"the two wrote different {suffix} files")


def report(arguments: argparse.Namespace, megabytes: float, rounds: dict[str, list[dict[str, float]]]) -> None:
    """The table: rate, how it compares, what it took of the processors, peak memory."""
    from megatron_ptrl.training.runlog import environment

    about = environment()
    setting = {name: value for name, value in vars(arguments).items() if name not in ("output", "side", "folder")}
    print(f"# {about['machine']}, {about['cores']} cores, commit {about['commit']}")
    print("# " + ", ".join(f"{name} {value}" for name, value in setting.items()))
    medians = {side: statistics.median(result["seconds"] for result in results) for side, results in rounds.items()}
    print(f"{'':<30}{'MB/s':>8}{'ms a MB':>9}{'ratio':>7}{'CPU ms a MB':>13}{'peak MB':>9}")
    for side, seconds in medians.items():
        cpu = statistics.median(result["cpu_seconds"] for result in rounds[side])
        memory = max(result["memory"] for result in rounds[side])
        print(
            f"{side:<30}{megabytes / seconds:>8.2f}{seconds / megabytes * 1e3:>9.1f}{medians[LOOP] / seconds:>7.2f}"
            f"{cpu / megabytes * 1e3:>13.1f}{memory:>9.0f}"
        )
    if arguments.output:
        result = {"setting": setting, "environment": about, "megabytes": megabytes, "rounds": rounds}
        result["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + os.linesep)


if __name__ == "__main__":
    main()
