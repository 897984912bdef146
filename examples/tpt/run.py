"""TPT (arXiv:2509.20186) at toy size: the same documents, as they are and with the thinking that they call for.

    make_data -> think, against think_server.py -> pretrain by each method, over seeds -> compare

    python examples/tpt/run.py [--work_dir .tpt] [--documents 16000] [--seeds 3] [--small]

The paper's case of constrained data: TPT goes over the documents and their thinking once, vanilla over the documents
alone for as many tokens, so about twice. Both train the same model in the same steps; a seed changes its weights and
the order of the data. Nothing is downloaded, no GPU is needed. A second call goes on from where the first one came to;
delete the work directory to start over. `--small` only shows that every stage works: its models learn nothing.
"""

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the examples keep what they share

from commands import CORES, PTRL, Stages, Words, run, run_side_by_side, timed

HERE = Path(__file__).parent
SEQUENCE, BATCH = 256, 4

SMALL: dict[str, Words] = {
    "make_data": ["--held_out", 6],
    "pretrain": ["--optimizer.warmup_steps", 1],
}


@dataclass(frozen=True)
class Example:
    """Everything lies in `work`."""

    work: Path
    documents: int
    seeds: int
    stages: Stages

    def run(self) -> None:
        """All stages, one after the other."""
        flags = self.stages.flags
        data, tokenizer = self.work / "data", self.work / "data" / "tokenizer.json"
        documents, thought = data / "documents", data / "thought"
        if not tokenizer.exists():
            run([HERE / "make_data.py", data, "--documents", self.documents, *flags("make_data")])
        with documents.with_suffix(".jsonl").open(encoding="utf-8") as lines:
            found = sum(1 for _ in lines)
        if found != self.documents:
            sys.exit(f"{documents}.jsonl has {found:,} documents, not {self.documents:,}; choose another --work_dir")
        if not documents.with_suffix(".idx").exists():
            source: Words = ["--input", f"{documents}.jsonl", "--tokenizer", tokenizer]
            run([*PTRL, "tokenize", *source, "--output", documents])
        with think_server() as url:
            source = ["--input", f"{documents}.jsonl", "--tokenizer", tokenizer, "--servers", url]
            run([*PTRL, "think", *source, "--assemble.workers", CORES, "--output", thought])

        prefixes = {"vanilla": documents, "TPT": thought / "train"}
        tokens = {name: count_tokens(prefix) for name, prefix in prefixes.items()}
        # One time over TPT's, and the same for vanilla.
        steps = tokens["TPT"] // (SEQUENCE * BATCH)
        epochs = {name: steps * SEQUENCE * BATCH / count for name, count in tokens.items()}
        print(f"{steps} steps, epochs: " + ", ".join(f"{name} {count:.1f}" for name, count in epochs.items()))
        runs = {name: [self.work / f"{name.lower()}-{seed + 1}" for seed in range(self.seeds)] for name in prefixes}
        commands: list[Words] = []
        for name, run_dirs in runs.items():
            for seed, run_dir in enumerate(run_dirs, start=1):
                words = [*flags("pretrain", "pretrain.yaml"), "--data.train", prefixes[name], "--train.seed", seed]
                commands.append([*PTRL, "pretrain", *words, "--train.steps", steps, "--run_dir", run_dir])
        run_side_by_side(commands)

        named = [f"{name}={','.join(map(str, run_dirs))}" for name, run_dirs in runs.items()]
        run([HERE / "compare.py", *named, "--sums", data / "held_out.jsonl", "--output", self.work])
        print(f"{self.work / 'comparison.png'} shows it")


def count_tokens(prefix: Path) -> int:
    """Tokens of a `.bin/.idx`, by what stands beside it."""
    return json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))["tokens"]


@contextlib.contextmanager
def think_server() -> Iterator[str]:
    """The URL of think_server.py in a process of its own."""
    server = subprocess.Popen([sys.executable, HERE / "think_server.py"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    """Parse the command line and run everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path(".tpt"))
    parser.add_argument("--documents", type=int, help="default 16000, or 60 with --small; training takes as long")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (default 3)")
    parser.add_argument("--small", action="store_true", help="a minute instead of minutes, and nothing is learnt")
    arguments = parser.parse_args()
    stages = Stages(HERE / "configs", SMALL if arguments.small else None)
    documents = arguments.documents or (60 if arguments.small else 16_000)
    with timed():
        Example(arguments.work_dir, documents, arguments.seeds, stages).run()


if __name__ == "__main__":
    main()
