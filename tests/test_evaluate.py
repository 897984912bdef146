"""`ptrl evaluate` with the real Megatron-Core: figures against forward passes and their samples, in every layout."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluating import evaluate, read, run_evaluation, settings_of
from megatron.core.datasets.indexed_dataset import IndexedDataset
from ranks import Ranks
from rl_runs import Letters, make_prompts
from stage_runs import one_by_one
from tiny import Settings, pretraining

from megatron_ptrl.evaluation.pass_at_k import Problem, consensus, pass_at_k
from megatron_ptrl.records import Judgement, Prompt

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp 2, sequence parallel": (2, {"parallel__tp": 2, "parallel__sequence_parallel": True}),
    "pp 2": (2, {"parallel__pp": 2}),
    "dp 2, other batches": (2, {"rollout__batch": 3, "micro_batch": 3}),
}
PROBLEMS = 5


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A file of problems, of which one is too long and one has no answer, and one of next segments."""
    folder = tmp_path_factory.mktemp("prompts")
    lines = [{"question": f"What is {i} + {i}?", "answer": f"It is {i} + {i}.\n#### {i} e"} for i in range(PROBLEMS)]
    lines[2:2] = [{"question": "What? " * 60, "answer": "1"}, {"question": "What?"}]
    path = folder / "sums.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [str(path), make_prompts(folder / "next.jsonl", 3)]


@pytest.fixture(scope="module")
def alone(
    ranks: Ranks, reference: Settings, unscored: str, prompts: list, tmp_path_factory: Any
) -> tuple[Settings, str]:
    """Settings of the evaluation that all others are held against, and what it printed."""
    output = tmp_path_factory.mktemp("alone") / "e"
    settings = settings_of(reference["run_dir"], output, data=[unscored], prompts=prompts)
    return settings, run_evaluation(ranks, 1, settings)


def figures(settings: Settings) -> dict[str, float]:
    return {name: figure["value"] for name, figure in read(settings["output"])["figures"].items()}


def direct(rank: int, world_size: int, settings: Settings, documents: list[list[int]]) -> list[list[float]]:
    """[sum of log-probabilities, sum of entropies] of each document in fp64, unpacked, after an end-of-document."""
    with pretraining(settings, world_size) as run:
        model, found = run.chunks[0].eval(), []
        for document in documents:
            sums = [0.0, 0.0]
            # The first token's distribution is that after the end of a document alone.
            for before, tokens in (([run.tokenizer.eod], document[:1]), (document[:1], document[1:])):
                ids = torch.tensor([*before, *tokens])
                if len(tokens):
                    with torch.no_grad():
                        logits = model(ids[None, :-1], torch.arange(len(tokens))[None], None)[0].double()
                    logp = logits.log_softmax(-1)
                    sums[0] += logp.gather(-1, ids[1:, None]).sum().item()
                    sums[1] -= (logp.exp() * logp).sum().item()
            found.append(sums)
        return found


def test_text_figures_equal_unpacked_forward_passes(ranks, reference, unscored, tmp_path):
    indexed = IndexedDataset(unscored)
    documents = [indexed.get(i).tolist() for i in range(len(indexed))]
    window = max(map(len, documents))
    settings = settings_of(reference["run_dir"], tmp_path / "e", data=[unscored], window=window)
    run_evaluation(ranks, 1, settings)
    wide = reference | {"data.seq_length": window, "run_dir": reference["run_dir"]}
    sums = torch.tensor(ranks.run(1, direct, wide, documents)[0]).sum(0)
    tokens, found = sum(map(len, documents)), figures(settings)
    assert found["data/cross_entropy"] == pytest.approx(-sums[0].item() / tokens, rel=1e-5)
    assert found["data/entropy"] == pytest.approx(sums[1].item() / tokens, rel=1e-5)
    assert found["data/perplexity"] == pytest.approx(torch.exp(-sums[0] / tokens).item(), rel=1e-4)
    assert read(tmp_path / "e")["data"]["data"]["tokens"] == tokens


def test_figures_follow_from_the_samples(alone):
    settings, printed = alone
    results, samples = read(settings["output"]), read(settings["output"], "samples.jsonl")
    assert [(line["place"], line["index"]) for line in samples] == [
        (place, index) for place in (0, 1, 4, 5, 6, 7, 8, 9) for index in range(4)
    ]
    assert all(len(line["token_ids"]) <= 8 and (line["reward"] in (0.0, 1.0)) for line in samples)
    assert len({line["text"] for line in samples}) > 20  # no two draws with one seed
    by_problem: dict[str, list[Problem]] = {"sums": [], "next": []}
    for i in range(0, len(samples), 4):
        group = samples[i : i + 4]
        problem = Problem([line["prediction"] for line in group], [line["reward"] > 0 for line in group])
        by_problem[group[0]["file"]].append(problem)
    for file, measure in (("sums", "avg@4"), ("next", "accuracy")):
        problems = by_problem[file]
        expected = {
            f"{file}/pass@2": [pass_at_k(4, sum(p.right), 2) for p in problems],
            f"{file}/{measure}": [sum(p.right) / 4 for p in problems],
        }
        if file == "sums":
            expected["sums/cons@4"] = [consensus(p).value for p in problems]
            expected["sums/pass@1"] = [pass_at_k(4, sum(p.right), 1) for p in problems]
        for name, values in expected.items():
            assert figures(settings)[name] == pytest.approx(sum(values) / len(values)), name
            assert f"| {name} " in printed
    assert not {"next/cons@4", "next/pass@1"} & figures(settings).keys(), "accuracy is what pass@1 would be"
    assert figures(settings)["sums/pass@2"] > 0
    assert results["prompts"]["sums"]["problems"] == PROBLEMS and results["prompts"]["next"]["samples"] == 12
    assert (results["rejected"], results["step"], results["consumed_tokens"]) == (2, 3, 3 * 8 * 64)
    rejects = read(settings["output"], "rejects.jsonl")
    assert [line["reason"] for line in rejects] == ["too_long", "unreadable"]
    assert "2 prompts were put aside" in printed and "answer is null" in rejects[1]["detail"]
    assert samples[0]["target"] == "0 e" and "\\boxed" in samples[0]["messages"][0]["content"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_draws_the_same(ranks, alone, tmp_path, name):
    world_size, changes = LAYOUTS[name]
    settings = alone[0] | {key.replace("__", "."): value for key, value in changes.items()}
    settings |= {"output": str(tmp_path / "e")}
    run_evaluation(ranks, world_size, settings)
    assert read(tmp_path / "e", "samples.jsonl") == read(alone[0]["output"], "samples.jsonl")
    assert figures(settings) == pytest.approx(figures(alone[0]), rel=1e-5)


def test_a_killed_one_goes_on(ranks, alone, tmp_path):
    settings, whole = alone[0] | {"output": str(tmp_path / "e")}, Path(alone[0]["output"])
    counts = [len(read(whole, "text.jsonl")), 3]
    assert counts[0] >= 5
    for stop_after in (3, counts[0] - 3):
        assert ranks.run(1, evaluate, settings, None, stop_after) == ["stopped"]
        for name in ("text.jsonl", "samples.jsonl"):
            if (tmp_path / "e" / name).is_file():
                with (tmp_path / "e" / name).open("a") as stream:
                    stream.write('{"name": "da')
    # All of the text is there, and a prompt with one sample and a half.
    first = (whole / "samples.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "e" / "samples.jsonl").write_text("".join(first[:9]) + first[9][:20])
    printed = run_evaluation(ranks, 2, settings | {"rollout.batch": 4})
    assert "prompts 6 of 6" in printed and "data: tokens" not in printed
    assert read(tmp_path / "e", "samples.jsonl") == read(whole, "samples.jsonl")
    assert read(tmp_path / "e") == read(whole)
    again = run_evaluation(ranks, 1, settings)
    assert "a second" not in again and read(tmp_path / "e") == read(whole)


class Moody(Letters):
    def judge(self, prompt: Prompt, response: str) -> Judgement:
        known = len(response) % 3 > 0
        return Judgement(
            reward=1.0 if known else None, reason="judged" if known else "timeout", prediction="", seconds=0
        )


def test_what_was_not_judged_counts_for_nothing(ranks, alone, tmp_path):
    settings = alone[0] | {"output": str(tmp_path / "e"), "data": [], "rollout.max_unjudged": 0.9}
    run_evaluation(ranks, 1, settings, Moody())
    found, counts = figures(settings), read(tmp_path / "e")["prompts"]
    unjudged = sum(line["reward"] is None for line in read(tmp_path / "e", "samples.jsonl") if line["file"] == "sums")
    assert found["sums/pass@1"] == 1.0 and counts["sums"]["unjudged"] == unjudged > 0
    assert counts["sums"]["outcomes"] == {"judged": 4 * PROBLEMS - unjudged, "timeout": unjudged}
    with pytest.raises(
        AssertionError, match=r"could not be judged \(timeout \d+\), more than rollout.max_unjudged 0.1"
    ):
        strict = settings | {"rollout.max_unjudged": 0.1, "output": str(tmp_path / "strict")}
        run_evaluation(ranks, 1, strict, Moody())
    assert not (tmp_path / "strict" / "results.json").exists()


def test_greedy_and_the_default_folder(ranks, alone, reference):
    changes = {"rollout.temperature": 0, "rollout.samples": 1, "data": [], "k": [1], "rollout.max_tokens": None}
    settings = {name: value for name, value in (alone[0] | changes).items() if name != "output"}
    folder = Path(reference["run_dir"]) / "evaluations" / "step_00000003"
    run_evaluation(ranks, 1, settings)
    samples = read(folder, "samples.jsonl")
    assert len(samples) == PROBLEMS + 3 and {line["finish_reason"] for line in samples} <= {"length", "stop"}
    shutil.rmtree(folder.parent)


def test_what_is_refused(ranks, alone, tmp_path, unscored):
    broken = tmp_path / "broken.jsonl"
    broken.write_text("no JSON\n")
    other = tmp_path / "other" / "sums.jsonl"
    other.parent.mkdir()
    other.write_text('{"question": "?", "answer": 1}\n')
    new = {"output": str(tmp_path / "e"), "data": []}
    surrogate = tmp_path / "surrogate.jsonl"
    surrogate.write_text('{"question": "\\ud800", "answer": "1"}\n')
    for name, file, content in (
        ("plan", "plan.json", "{"),
        ("list", "plan.json", "[1]"),
        ("lines", "samples.jsonl", "{}\n"),
    ):
        shutil.copytree(alone[0]["output"], tmp_path / name)
        (tmp_path / name / file).write_text(content)
    for changes, said in (
        ({"rollout.temperature": 0.7}, "is of an evaluation with another rollout; remove it"),
        ({"prompts": [str(other)], "data": []}, "with another data, prompts, files"),
        (new | {"prompts": [str(broken)]}, "none can be used; .*broken.jsonl:1"),
        (new | {"prompts": [str(tmp_path / "none")], "output": str(tmp_path / "f")}, "none: no such file"),
        (
            new | {"prompts": [*alone[0]["prompts"], str(other)], "output": str(tmp_path / "g")},
            "two files are called sums",
        ),
        (new | {"rollout.max_tokens": 64, "output": str(tmp_path / "h")}, "expected less than the window 64"),
        ({"data": [unscored, unscored], "output": str(tmp_path / "i")}, "two prefixes end in data"),
        (new | {"prompts": [str(surrogate)], "output": str(tmp_path / "j")}, "none can be used; .*surrogate.jsonl:1"),
        ({"output": str(tmp_path / "plan")}, "plan.json is damaged .*; remove the folder"),
        ({"output": str(tmp_path / "list")}, "plan.json is damaged .*; remove the folder"),
        ({"output": str(tmp_path / "lines")}, "samples.jsonl: a line has no place; remove the folder"),
    ):
        with pytest.raises(AssertionError, match=said):
            ranks.run(1, one_by_one, evaluate, [alone[0] | changes])
    assert not (tmp_path / "f").exists(), "it would refuse the same command with the right path"
