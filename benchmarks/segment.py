"""Each step of `ptrl segment` on the documentation of the Python standard library, on one core.

    python benchmarks/segment.py [--megabytes 8] [--documents 20000] [--output FILE.json]

By the processor's clock, so that a busy machine shows little in it; medians of the rounds. The stage as a whole writes
two prompts with their contexts for each sentence; how much that is depends on task.context_tokens.
"""

import argparse
import ast
import json
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

from megatron_ptrl.config import CleanConfig, SegmentConfig, SplitConfig, TaskConfig
from megatron_ptrl.data.input_parts import list_inputs, make_parts
from megatron_ptrl.segmenting.decontaminate import shared_run
from megatron_ptrl.segmenting.files import Files, write_whole
from megatron_ptrl.segmenting.mask import mask
from megatron_ptrl.segmenting.near_duplicates import signatures
from megatron_ptrl.segmenting.pipeline import run
from megatron_ptrl.segmenting.prompts import PromptMaker
from megatron_ptrl.segmenting.punkt import find_parameters
from megatron_ptrl.segmenting.rules import broken_rule
from megatron_ptrl.segmenting.segments import make_cut
from megatron_ptrl.segmenting.words import WordHashes, run_hashes, words_of


def main() -> None:
    """Print a table and, when asked, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=8, help="of text at most")
    parser.add_argument("--documents", type=int, default=20_000, help="at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    texts = some_texts(arguments.megabytes, arguments.documents)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        seconds = {name: time_of(step, arguments.rounds) for name, step in steps(texts, Path(folder)).items()}
    report(arguments, len(texts), megabytes, seconds)


def some_texts(megabytes: float, documents: int) -> list[str]:
    """Docstrings of some length, each once."""
    found: dict[str, None] = {}
    size = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        for text in docstrings(path):
            if len(text) > 300 and text not in found:
                found[text] = None
                size += len(text.encode())
                if size > megabytes * 1e6 or len(found) == documents:
                    return list(found)
    return list(found)


def docstrings(path: Path) -> Iterator[str]:
    """Those of a file; none of one that cannot be parsed."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            text = ast.get_docstring(node)
            # Half of a surrogate pair is no text.
            yield (text or "").encode("utf-8", "ignore").decode()


def steps(texts: list[str], folder: Path) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    (folder / "in").mkdir()
    source = folder / "in" / "corpus.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = SegmentConfig(input=[str(folder / "in")], clean=CleanConfig(rules=False))
    files = Files(folder)
    inputs = [file for part in make_parts(list_inputs(config.input, folder / "out"), 64.0) for file in part]
    write_whole(files.punkt, json.dumps(find_parameters(SplitConfig(), inputs, "text", 0)).encode())
    hashes, maker = WordHashes(), PromptMaker(TaskConfig())
    words = [words_of(text) for text in texts]
    some_runs = run_hashes(hashes(words[0]), 12)[:0]
    punkt = make_cut(SplitConfig(), files.punkt)
    cuts = [punkt(text) for text in texts]
    found: dict[str, Callable[[], object]] = {
        "Punkt: learning": lambda: find_parameters(SplitConfig(), inputs, "text", 0),
        "cut by Punkt": lambda: [punkt(text) for text in texts],
        "near-duplicates: signatures": lambda: signatures(
            ((0, line), hashes(words_of(text))) for line, text in enumerate(texts)
        ),
        "decontamination": lambda: [
            shared_run(split, hashes(split), some_runs, 12) for split in (words_of(text) for text in texts)
        ],
        "rules": lambda: [broken_rule(text, CleanConfig()) for text in texts],
        "masks": lambda: [mask(text) for text in texts],
        "prompts": lambda: [
            list(map(list, maker.make("document", text, places, 0, {}).lines.values()))
            for text, places in zip(texts, cuts, strict=True)
        ],
    }
    try:
        sentencex = make_cut(SplitConfig(sentences="sentencex"), files.punkt)
        found["cut by sentencex"] = lambda: [sentencex(text) for text in texts]
    except ValueError as error:
        print(f"# {error}")
    rounds = iter(range(1000))
    stage = {"split": SplitConfig(punkt=str(files.punkt)), "clean": config.clean, "input": config.input}
    found["ptrl segment, given Punkt"] = lambda: run(SegmentConfig(**stage, output=str(folder / f"out{next(rounds)}")))
    return found


def time_of(step: Callable[[], object], rounds: int) -> list[float]:
    """Processor seconds of each round."""
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    return seconds


def report(arguments: argparse.Namespace, documents: int, megabytes: float, seconds: dict[str, list[float]]) -> None:
    """The table."""
    from megatron_ptrl.training.runlog import environment

    about = environment()
    print(f"# {about['machine']}, {about['cores']} cores, commit {about['commit']}, Python {sys.version.split()[0]}")
    print(f"# {megabytes:.1f} MB in {documents:,} documents")
    print(f"{'':<32}{'MB/s':>8}{'ms a MB':>10}")
    for name, rounds in seconds.items():
        median = max(statistics.median(rounds), 1e-9)
        print(f"{name:<32}{megabytes / median:>8.1f}{median / megabytes * 1e3:>10.1f}")
    if arguments.output:
        setting = {name: value for name, value in vars(arguments).items() if name != "output"}
        result = {"setting": setting, "environment": about, "megabytes": megabytes, "cpu_seconds": seconds}
        result["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
