"""`make quickstart`, shortened: from the standard library's text to a sample, on two processes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from test_guide import BLOCKS

from megatron_ptrl.data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
STEPS = 12


def quickstart(work: Path) -> str:
    done = subprocess.run(
        ["make", "quickstart", f"WORK_DIR={work}", f"ARGS=--steps {STEPS} --megabytes 1"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=420,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def value(summary: str, name: str) -> float:
    found = re.search(rf"^{name} +([\d.]+)", summary, re.MULTILINE)
    assert found, f"no {name} in\n{summary}"
    return float(found[1])


@pytest.mark.slow
def test_quickstart_goes_from_text_to_a_sample_and_a_second_call_changes_nothing(tmp_path: Path) -> None:
    work = tmp_path / ".quickstart"
    first = quickstart(work)
    steps = read_steps(work / "run")
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["ce"] < steps[0]["ce"] - 0.3
    assert steps[-1]["loss"] != steps[-1]["ce"], "beta -0.25 is in force"
    assert 1 < value(first, "held-out perplexity") < 4096, "better than a uniform guess"
    assert 1 < value(first, "unigram perplexity") < 4096
    assert "sample, temperature" in first
    assert (work / "run" / "checkpoints" / f"step_{STEPS:08d}" / "run.json").exists()
    assert len(list((work / "run" / "plots").glob("*.png"))) == 8

    before = (work / "run" / "metrics.jsonl").read_bytes()
    second = quickstart(work)
    assert "is complete" in second
    assert value(second, "held-out perplexity") == value(first, "held-out perplexity")
    assert (work / "run" / "metrics.jsonl").read_bytes() == before

    (tmp_path / "examples").symlink_to(ROOT / "examples")
    think_about_it(tmp_path)
    predict_what_comes_next(tmp_path)


# A reference and a reward on top, as training on thinking composes with both.
SHORTER = (
    "--train.steps 4 --train.eval_samples 2 --train.global_batch 2 --train.micro_batch 2 --log.plots false "
    "--optimizer.warmup_steps 1 --loss.beta -0.25 "
    "--remit.weighting remit --remit.reference .quickstart/run"
)


def run_block(name: str, folder: Path, replaced: dict[str, str]) -> None:
    """The guide's commands of this name, shortened."""
    (code,) = (code for mark, _, code in BLOCKS if mark == f"run by tests/test_quickstart.py, shortened: {name}")
    for words, shorter in replaced.items():
        assert words in code
        code = code.replace(words, shorter)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=folder,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def think_about_it(folder: Path) -> None:
    """The guide's commands for thinking about the quickstart's text with the quickstart's model."""
    recipe = "--config examples/configs/tpt-toy.yaml"
    run_block("TPT", folder, {recipe: f"{recipe} {SHORTER}"})
    documents = len((folder / ".quickstart" / "stdlib.jsonl").read_text().splitlines())
    thought = folder / ".quickstart" / "tpt"
    counts = json.loads((thought / "train.json").read_text())
    assert counts["documents"] > documents / 2
    assert counts["documents"] + sum(counts["rejected"].values()) == documents
    assert f"| documents  | {documents:>9} | 100.00% |" in (thought / "plots" / "summary.md").read_text()
    dataset = IndexedDataset(str(thought / "train"))
    tokenizer = Tokenizer(thought / "train.tokenizer.json")
    texts = [tokenizer.decode(dataset[i]) for i in range(len(dataset))]
    assert all(re.search(r"\n\n<think>.+</think><\|endoftext\|>$", text, re.DOTALL) for text in texts)
    (*_, last) = read_steps(folder / ".quickstart" / "tpt-run")
    assert last["step"] == 4 and last["loss"] != last["ce"] and last["remit_weight_mean"] > 0


# A model that has seen a dozen steps writes no tags: all groups are wrong alike, and must not be left out of a step.
SHORTER_RL = (
    "--train.steps 2 --rollout.prompts 4 --rollout.samples 2 --rollout.max_tokens 8 --rollout.drop_equal_groups false "
    "--log.plots false"
)


def predict_what_comes_next(folder: Path) -> None:
    """The guide's commands from the quickstart's text and model to an evaluated policy."""
    cold, rl = "--config examples/quickstart/sft.yaml", "--config examples/quickstart/rl.yaml"
    replaced = {
        cold: f"{cold} --train.steps 2 --optimizer.warmup_steps 0 --train.global_batch 8 --log.plots false",
        rl: f"{rl} {SHORTER_RL}",
        "--k 1 4": "--k 1 2",
        "--rollout.samples 4 --rollout.max_tokens 64": "--rollout.samples 2 --rollout.max_tokens 4",
    }
    run_block("RLPT", folder, replaced)
    work = folder / ".quickstart"
    chats = [json.loads(line) for line in (work / "cold_start.jsonl").read_text().splitlines()]
    prompts = {task: count_lines(work / "segments" / "read" / f"{task}.jsonl") for task in ("asr", "msr")}
    assert len(chats) == sum(prompts.values()) > 100
    assert all(re.fullmatch(r"<\|startofprediction\|>.+<\|endofprediction\|>", answer_of(c), re.DOTALL) for c in chats)
    steps = read_steps(work / "rl")
    assert [line["step"] for line in steps] == [1, 2]
    assert all(line["num_tokens"] > 0 and line["logprob_difference"] < 1e-4 for line in steps), "by the trained weights"
    assert count_lines(work / "rl" / "rollouts" / "step_00000002.jsonl") == 4 * 2 + 1, "the last line says it is whole"
    figures = json.loads((work / "rl" / "evaluations" / "step_00000002" / "results.json").read_text())["figures"]
    assert figures["asr/accuracy"]["problems"] == count_lines(work / "segments" / "unread" / "asr.jsonl")
    assert (work / "rl" / "plots" / "rollouts.html").exists()


def answer_of(chat: dict) -> str:
    """The last turn."""
    return chat["messages"][-1]["content"]


def count_lines(path: Path) -> int:
    """Lines of a text file."""
    return len(path.read_text().splitlines())


def read_steps(run: Path) -> list[dict]:
    """The lines of training steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "ce" in line]
