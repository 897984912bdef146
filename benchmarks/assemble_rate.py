"""`ptrl assemble` against Megatron's own way to `.bin/.idx`: a loop over the tokenizer and the IndexedDatasetBuilder in
one process, as its tools/preprocess_data.py has it, but with the tokenizer's bare Rust encode.

The loop gets the texts joined already and filters nothing; ours joins and filters. Each side runs in a process of its
own (`python assemble_rate.py SIDE FOLDER WORKERS`), in turn, so that its memory is its own. Both write the same bytes.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

LOOP, OURS = "Megatron's loop, one process", "ptrl assemble"
Rounds = dict[str, list[dict[str, float]]]


def measure(megabytes: float, vocab: int, workers: int, rounds: int) -> tuple[float, Rounds]:
    """MB of joined text, and of each round what `run_side` says of either side."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make_data(folder, megabytes, vocab)
        results: Rounds = {LOOP: [], OURS: []}
        for _ in range(rounds):
            for side, found in results.items():
                command = [sys.executable, "-W", "ignore", __file__, side, name, str(workers)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found.append(json.loads(done.stdout.splitlines()[-1]))
        for suffix in (".bin", ".idx"):
            if (folder / f"ours{suffix}").read_bytes() != (folder / f"loop{suffix}").read_bytes():
                raise SystemExit(f"the two wrote different {suffix} files")
    return size, results


def make_data(folder: Path, megabytes: float, vocab: int) -> float:
    """thoughts.jsonl, the same joined in joined.jsonl, and a tokenizer; MB of joined text.

    Documents are pieces of the Python standard library, their thinking other pieces, of the paper's mean length.
    """
    from library_text import piece, read_library

    from megatron_ptrl.config import AssembleConfig
    from megatron_ptrl.data.tokenizer import train_tokenizer
    from megatron_ptrl.records import Thought
    from megatron_ptrl.thinking.joined import texts_of

    chosen = random.Random(1)
    library = read_library(chosen)
    config = AssembleConfig()
    tags = (config.opening, config.closing)
    train_tokenizer([library[: 1 << 22]], folder / "tokenizer.json", vocab)
    size = count = 0
    with (folder / "thoughts.jsonl").open("wb") as thoughts, (folder / "joined.jsonl").open("w") as joined:
        while size < megabytes * 1e6:
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


def run_side(side: str, folder: Path, workers: int) -> dict[str, float]:
    """Seconds and processor seconds without the imports, and the peak memory in MB."""
    from process_watch import Watch

    work = import_loop(folder) if side == LOOP else import_ours(folder, workers)
    with Watch(os.getpid()) as watch:
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
    # The workers are gone by now, and were children of a server, so only the watch has seen what they took.
    return {"seconds": seconds, "cpu_seconds": watch.cpu_seconds, "memory": watch.peak}


def import_ours(folder: Path, workers: int) -> Callable[[], None]:
    """`ptrl assemble`, ready to be called."""
    from megatron_ptrl.config import AssembleConfig, ThinkingFilterConfig
    from megatron_ptrl.thinking.assemble_stage import run

    config = AssembleConfig(
        input=[str(folder / "thoughts.jsonl")],
        output=str(folder / "ours"),
        tokenizer=str(folder / "tokenizer.json"),
        workers=workers,
        # Pieces of a library are no prose; the filters run, but at bounds that let these pass.
        filters=ThinkingFilterConfig(max_compression=1000, max_copied=0.999),
    )
    return lambda: run(config)


def import_loop(folder: Path) -> Callable[[], None]:
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


if __name__ == "__main__":
    print(json.dumps(run_side(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))))
