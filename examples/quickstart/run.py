"""Real text to a trained GPT on two processes: collect, tokenize, pretrain with the reward-shaped loss, sample.

    python examples/quickstart/run.py [--work_dir .quickstart] [--steps 300]

The text is the standard library of the running Python. Nothing is downloaded, and no GPU is needed. A second call
goes on from where the first one came to, so it ends at once; delete the work directory to start over.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the examples keep what they share

from commands import CORES, PTRL, RANKS, Words, run

HERE = Path(__file__).parent


def main() -> None:
    """Run the four commands one after the other, each printed before it runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path(".quickstart"))
    parser.add_argument("--megabytes", type=float, default=6.0, help="how much text")
    parser.add_argument("--steps", type=int, help="optimizer steps; the default is that of config.yaml")
    arguments = parser.parse_args()
    work = arguments.work_dir
    work.mkdir(parents=True, exist_ok=True)
    corpus, prefix = work / "stdlib.jsonl", work / "stdlib"

    if not corpus.exists():
        run([HERE / "collect_stdlib.py", corpus, "--megabytes", arguments.megabytes])
    if not prefix.with_suffix(".idx").exists():
        run([*PTRL, "tokenize", "--input", corpus, "--output", prefix, "--vocab_size", 4096])
    pretrain: Words = [*RANKS, *PTRL, "pretrain", "--config", HERE / "config.yaml"]
    pretrain += ["--data.train", prefix, "--run_dir", work / "run"]
    if arguments.steps:
        shape = {"warmup_steps": arguments.steps // 15, "decay_steps": max(1, arguments.steps // 5)}
        pretrain += ["--train.steps", arguments.steps]
        pretrain += [word for name, steps in shape.items() for word in (f"--optimizer.{name}", steps)]
    run(pretrain, threads=max(1, (os.cpu_count() or 2) // CORES))


if __name__ == "__main__":
    main()
