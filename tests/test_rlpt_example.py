"""examples/rlpt: the whole of it at its smallest, and the parts that decide what its table means."""

import asyncio
import importlib.util
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from small_examples import run_small

from megatron_ptrl.config import GateConfig, JudgeConfig, LexicalConfig, VerifyConfig
from megatron_ptrl.records import Prompt
from megatron_ptrl.rollout.gate import gate
from megatron_ptrl.rollout.lexical import LexicalJudge
from megatron_ptrl.rollout.verify import find_answer

FOLDER = Path(__file__).parents[1] / "examples" / "rlpt"
sys.path.insert(0, str(FOLDER))

from chats import respond  # noqa: E402
from stories import Story, draw_story, find_story, think  # noqa: E402


@pytest.mark.slow
def test_it_runs_from_seeds_to_a_table_and_plots(tmp_path: Path) -> None:
    rows = run_small("rlpt", tmp_path, "--methods", "rlpt")
    assert [row[:2] for row in rows[2:]] == [["cold start", "1"], ["RLPT", "1"]]
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    assert (tmp_path / "report" / "scaling_prompt_tokens_mean.md").is_file()
    # Each stage saw the prompts that it is for, and went on from the one before.
    rollouts = read(tmp_path / "rlpt-1" / "rollouts" / "step_00000001.jsonl")
    assert {line["task"] for line in rollouts if "task" in line} == {"asr", "msr"}
    started = {name: (tmp_path / name / "log.txt").read_text() for name in ("cold_start_run", "rlpt-1")}
    assert f"starting from the weights of {tmp_path / 'pretrained'}" in started["cold_start_run"]
    assert f"starting from the weights of {tmp_path / 'cold_start_run'}" in started["rlpt-1"]
    held_out = read(tmp_path / "rlpt-1" / "held_out" / "samples.jsonl")
    assert Counter(line["task"] for line in held_out) == {"asr": 8, "msr": 8, "rlvr": 8}


def test_rlvr_goes_on_from_the_end_of_rlpt_with_the_same_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("rlpt_run", FOLDER / "run.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    batches: list[list[list[str]]] = []
    monkeypatch.setattr(example, "run", lambda words: example.run_side_by_side([words]))
    monkeypatch.setattr(example, "run_side_by_side", lambda every: batches.append([list(map(str, w)) for w in every]))
    stages = example.Stages(FOLDER / "configs", example.SMALL)
    example.Example(tmp_path, 2, ["rlpt", "rlpt-rlvr"], stages).run()

    made = {str(tmp_path / "cold_start_run")}
    started = {}
    for batch in (batch for batch in batches if "rl" in batch[0][:3]):
        flags = [dict(zip(words, words[1:], strict=False)) for words in batch]
        # What runs side by side cannot start from one another.
        assert {run["--checkpoint.load"] for run in flags} <= made
        made |= {run["--run_dir"] for run in flags}
        for run in flags:
            files = "questions" if "questions" in run["--prompts.files"] else "segments"
            started[Path(run["--run_dir"]).name] = (Path(run["--checkpoint.load"]).name, run["--train.seed"], files)
    assert started == {
        "rlpt-1": ("cold_start_run", "1", "segments"),
        "rlpt-2": ("cold_start_run", "2", "segments"),
        "rlpt-rlvr-1": ("rlpt-1", "1", "questions"),
        "rlpt-rlvr-2": ("rlpt-2", "2", "questions"),
    }


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def drawn(count: int, *, held_out: bool = False) -> list[Story]:
    rng = random.Random(4)
    return [draw_story(rng, held_out=held_out) for _ in range(count)]


def test_a_story_is_true_and_can_be_read_back() -> None:
    for story in drawn(500):
        start, end, more, twice = story.sentences
        count = int(re.search(r"\d+", start)[0])
        for event, changed in re.findall(r"(found|lost) (\d+)", start):
            count += int(changed) if event == "found" else -int(changed)
            assert count >= 2
        ends = [int(re.search(r"\d+", text)[0]) for text in (end, more, twice)]
        assert ends == [count, count + 1, 2 * count]
        assert find_story(start) == story


def test_thinking_is_true_step_by_step_and_ends_in_what_the_sentence_says() -> None:
    for story in drawn(500):
        for number in (2, 3, 4):
            found = re.findall(r"(\d+ [+-] \d+) = (\d+)", think(story, number))
            assert found and all(eval(left) == int(right) for left, right in found)
            assert found[-1][1] == re.search(r"\d+", story.sentences[number - 1])[0]


def test_held_out_stories_are_like_the_others_and_none_of_them() -> None:
    assert not any(story.is_held_out for story in drawn(500)) and all(s.is_held_out for s in drawn(200, held_out=True))
    kinds = {
        held_out: Counter(tuple(change > 0 for change in story.changes) for story in drawn(4000, held_out=held_out))
        for held_out in (False, True)
    }
    # About 30 different stories of each of four kinds are held out, a fifth more or fewer.
    assert all(kinds[True][kind] == pytest.approx(count, rel=0.5) for kind, count in kinds[False].items())
    assert len(kinds[True]) == 4 and len({story.end for story in drawn(4000, held_out=True)}) > 15


def prompt(story: Story, task: str, sentence: int) -> Prompt:
    content = " ".join(story.sentences[: sentence - 1])
    reference = " ".join(story.sentences[sentence - 1 :]) if task == "asr" else story.sentences[sentence - 1]
    return Prompt(
        id="p",
        task=task,
        messages=[{"role": "user", "content": content}],
        target=story.sentences[sentence - 1],
        reference=reference,
        metadata={"segment": sentence},
    )


@pytest.mark.parametrize("further", [False, True])
def test_the_cold_starts_answers_are_right_by_the_rewards_where_the_story_is_read_rightly(further: bool) -> None:
    judges = {
        reward: LexicalJudge(JudgeConfig(reward=reward, lexical=LexicalConfig(threshold=97)))
        for reward in ("prefix", "strict")
    }
    for story in drawn(60):
        for task, sentence in [("asr", i) for i in (2, 3, 4)] + [("msr", i) for i in (2, 3)]:
            asked = prompt(story, task, sentence)
            response = respond(asked, further=further)
            found = gate(asked, response, truncated=False, reference=asked.reference, config=GateConfig())
            assert found.failed is None, (found, response)
            assert asyncio.run(judges["prefix"].score(found.prediction, asked.reference)) == 1
            alone = not further or task == "msr" or sentence == 4
            assert asyncio.run(judges["strict"].score(found.prediction, asked.target)) == alone
            misread = respond(asked, further=further, misread=1)
            wrong = gate(asked, misread, truncated=False, reference=asked.reference, config=GateConfig()).prediction
            assert wrong and asyncio.run(judges["prefix"].score(wrong, asked.reference)) == 0


def test_the_cold_starts_answers_to_questions_are_right() -> None:
    for story in drawn(60):
        for number in (0, 1):
            content = [{"role": "user", "content": story.question(number)}]
            target = re.search(r"\d+", story.sentences[1 + 2 * number])[0]
            assert target == str(story.answer(number))
            metadata = {"question": number}
            asked = Prompt(id="q", task="rlvr", messages=content, target=target, reference=target, metadata=metadata)
            found = [
                find_answer(respond(asked, further=False, misread=i), VerifyConfig(answer=["tags"])) for i in (0, 1)
            ]
            assert found == [target, str(int(target) + 1 + number)]
