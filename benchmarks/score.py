"""Scoring as `ptrl score` does it against a bare forward-only loop over the same model and as many positions.

    python benchmarks/score.py [--vocab 32768] [--rounds 5] [--output FILE.json]
    torchrun --nproc-per-node 2 benchmarks/score.py --tp 2

Scoring packs documents of many lengths, masks their attention, and keeps a value for each token; the loop runs full
rows of random tokens under a causal mask and keeps nothing. Both in turn, medians; a rate counts positions of rows, and
what of them is padding is told apart.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megatron_ptrl.training import host

host.install_if_no_cuda()

import numpy  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder  # noqa: E402

from megatron_ptrl.config import (  # noqa: E402
    DataConfig,
    LossConfig,
    ModelConfig,
    ParallelConfig,
    PretrainConfig,
    TrainConfig,
)
from megatron_ptrl.data.scored_chunks import ScoredChunks  # noqa: E402
from megatron_ptrl.data.windows import Windows  # noqa: E402
from megatron_ptrl.training import loop, mcore  # noqa: E402
from megatron_ptrl.training.runlog import environment  # noqa: E402
from megatron_ptrl.training.scorer import Scorer  # noqa: E402


def main() -> None:
    """Print a table and, when asked, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seq_length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=16, help="rows of a chunk, about")
    parser.add_argument("--micro_batch", type=int, default=2)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each; one more warms up")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    config = PretrainConfig(
        model=ModelConfig(num_layers=arguments.layers, hidden_size=arguments.hidden),
        parallel=ParallelConfig(tp=arguments.tp, sequence_parallel=arguments.tp > 1),
        data=DataConfig(seq_length=arguments.seq_length, isolate_documents=True),
        loss=LossConfig(top_k=1),
        train=TrainConfig(
            global_batch=arguments.micro_batch, micro_batch=arguments.micro_batch, precision=arguments.precision
        ),
    )
    mcore.initialize(config)
    with tempfile.TemporaryDirectory() as folder:
        seconds, positions, tokens = measure(config, arguments, Path(folder))
    if dist.get_rank() == 0:
        report(arguments, seconds, positions, tokens)
    mcore.shutdown()


def measure(
    config: PretrainConfig, arguments: argparse.Namespace, folder: Path
) -> tuple[dict[str, list[float]], int, int]:
    """(seconds of each timed round by kind, positions of a round, how many of those give a value)."""
    chunks = mcore.build_frozen_model(config, arguments.vocab)
    indexed = documents(folder, config.data.seq_length, arguments.rows, arguments.vocab)
    width = config.data.seq_length
    windows = Windows(indexed.sequence_lengths, window=width, overlap=width // 2, chunk=arguments.rows)
    scorer, parts = Scorer(config, chunks, indexed, windows), ScoredChunks(folder / "parts", "bf16")
    scorer.score_first_tokens(0, arguments.vocab)
    parts.folder.mkdir()
    packed = scorer.pack(0)
    count = scorer.num_microbatches(packed)
    batch = random_batch(config, arguments.vocab)

    def score() -> None:
        again = scorer.pack(0)
        values = scorer.score(again, count)
        assert values is not None
        parts.write(windows.chunk(0), values)

    def bare() -> None:
        loop.evaluate(config, chunks, iter([batch] * count), count)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    seconds: dict[str, list[float]] = {"bare forward-only loop": [], "ptrl score": []}
    for round_ in range(arguments.rounds + 1):
        for name, run in zip(seconds, (bare, score), strict=True):
            dist.barrier()
            start = time.perf_counter()
            run()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    positions = count * config.train.micro_batch * width
    return seconds, positions, sum(piece.inputs for piece in packed.pieces)


def documents(folder: Path, width: int, rows: int, vocab: int) -> IndexedDataset:
    """Random tokens in documents whose lengths spread as those of web pages do, from a few tokens to several rows."""
    generator = numpy.random.default_rng(1)
    path = str(folder / "data")
    builder = IndexedDatasetBuilder(path + ".bin", dtype=numpy.int32)
    total = 0
    while total < 2 * rows * width:
        length = int(numpy.clip(generator.lognormal(numpy.log(width / 2), 1), 2, 4 * width))
        builder.add_document(generator.integers(0, vocab, length), [length])
        total += length
    builder.finalize(path + ".idx")
    return IndexedDataset(path)


def random_batch(config: PretrainConfig, vocab: int) -> dict[str, Any]:
    """Megatron's batch with random tokens in full rows, under the causal mask that isolated documents are given."""
    shape = (config.train.micro_batch, config.data.seq_length)
    generator = torch.Generator().manual_seed(1)
    return {
        "tokens": torch.randint(vocab, shape, generator=generator),
        "labels": torch.randint(vocab, shape, generator=generator),
        "loss_mask": torch.ones(shape),
        "position_ids": torch.arange(shape[1]).expand(shape),
        "attention_mask": torch.ones(shape[0], 1, shape[1], shape[1], dtype=torch.bool).triu(1),
    }


def report(arguments: argparse.Namespace, seconds: dict[str, list[float]], positions: int, tokens: int) -> None:
    """The table: median milliseconds of a chunk, its positions a second, and how they compare."""
    about = environment()
    setting = {name: value for name, value in vars(arguments).items() if name != "output"}
    print(f"# {about['machine']}, {about['cores']} cores, GPUs {about['gpus'] or 'none'}, commit {about['commit']}")
    print("# " + ", ".join(f"{name} {value}" for name, value in setting.items()))
    print(f"# {positions:,} positions, {tokens / positions:.1%} of them with a token to score")
    medians = {name: statistics.median(values) * 1e3 for name, values in seconds.items()}
    first = next(iter(medians.values()))
    print(f"{'':<30}{'ms a chunk':>12}{'positions/s':>14}{'rate':>8}")
    for name, milliseconds in medians.items():
        print(f"{name:<30}{milliseconds:>12.1f}{positions / milliseconds * 1e3:>14,.0f}{first / milliseconds:>8.3f}")
    if arguments.output:
        result = {"setting": setting, "environment": about, "milliseconds": medians}
        result |= {"positions": positions, "tokens": tokens, "rate": first / medians["ptrl score"]}
        result["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + os.linesep)


if __name__ == "__main__":
    main()
