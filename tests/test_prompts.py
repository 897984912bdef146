"""Prompt files -> places: shares, passes, rejects, the cursor."""

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

import megatron_ptrl
from megatron_ptrl.config.segment import TaskConfig
from megatron_ptrl.data.chat import PlainTemplate
from megatron_ptrl.data.prompts import PromptSource
from megatron_ptrl.data.tokenizer import Tokenizer, train_tokenizer
from megatron_ptrl.errors import InputError
from megatron_ptrl.records import Prompt

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
TEMPLATES = Path(megatron_ptrl.__file__).parent / "segmenting" / "prompts"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["a few words"], path, 257)
    return Tokenizer(path)


def line(name: str, words: int = 1) -> str:
    messages = [{"role": "user", "content": "word " * words}]
    return Prompt(id=name, task="asr", messages=messages, target="t", reference="r").to_line().decode()


def write(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def source(tokenizer: Tokenizer, *files: str | float, seed: int = 1, max_tokens: int = 100) -> PromptSource:
    return PromptSource(files, seed=seed, tokenizer=tokenizer, template=PlainTemplate(), max_tokens=max_tokens)


def names(prompts: PromptSource, place: int, count: int) -> list[str]:
    return [placed.prompt.id for placed in prompts.take(place, count)[0]]


def test_every_pass_has_every_prompt_once_in_another_order(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [line(f"a{i}") for i in range(7)])
    found = names(source(tokenizer, path), 0, 21)
    passes = [found[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(each) == [f"a{i}" for i in range(7)] for each in passes)
    assert len({tuple(each) for each in passes}) == 3
    assert found != names(source(tokenizer, path, seed=2), 0, 21)


def test_the_cursor_continues_exactly_and_places_can_be_read_again(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [line(f"a{i}") for i in range(5)])
    whole = names(source(tokenizer, path), 0, 17)
    prompts, place, found = source(tokenizer, path), 0, []
    for count in (3, 1, 6, 7):
        placed, place, _ = prompts.take(place, count)
        found += placed
    assert [each.prompt.id for each in found] == whole and place == 17
    fresh = source(tokenizer, path)
    assert [fresh.at(each.place) for each in found] == found
    assert found[0].ids == tokenizer.encode("<|user|>\nword \n<|assistant|>\n")
    assert names(source(tokenizer, path), 10_000, 5) == names(prompts, 10_000, 5), "places far ahead"


def test_shares_hold_at_any_moment(tokenizer, tmp_path):
    asr = write(tmp_path / "asr.jsonl", [line(f"a{i}") for i in range(10)])
    msr = write(tmp_path / "msr.jsonl", [line(f"m{i}") for i in range(30)])
    for files, expected in (((0.75, asr, 0.25, msr), 0.75), ((asr, msr), 0.25)):
        found = [name[0] for name in names(source(tokenizer, *files), 0, 200)]
        for count in (20, 100, 200):
            assert Counter(found[:count])["a"] / count == pytest.approx(expected, abs=1.5 / count)


def test_what_is_no_prompt_or_too_long_is_passed_over_and_told(tokenizer, tmp_path):
    lines = [line("short"), "", line("long", 60), "{no json", json.dumps({"id": "half"}), line("other")]
    path = write(tmp_path / "a.jsonl", lines)
    placed, place, rejects = source(tokenizer, path).take(0, 4)
    assert Counter(each.prompt.id for each in placed) == {"short": 2, "other": 2}
    assert {each.place for each in placed} | {each["place"] for each in rejects} == set(range(place))
    told = {(each["reason"], each["where"].rpartition(":")[2].split()[0]) for each in rejects}
    assert told <= {("too_long", "2"), ("unreadable", "3"), ("unreadable", "4")} and len(told) >= 2
    (long, *_) = [each for each in rejects if each["reason"] == "too_long"]
    assert long["id"] == "long" and "expected 1 to 100" in long["detail"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "math"}, "task is 'math'; expected asr, msr, rlvr"),
        ({"target": 72}, "target is 72; expected the text"),
        ({"reference": " "}, 'reference is " "; expected the text'),
        ({"messages": [{"role": "user", "content": None}]}, "expected a list of objects with role and content"),
        ({"messages": []}, "expected a list of objects with role and content"),
    ],
)
def test_a_line_whose_values_cannot_be_used_is_passed_over(tokenizer, tmp_path, values, message):
    path = write(tmp_path / "a.jsonl", [json.dumps(json.loads(line("wrong")) | values), line("right")])
    _, _, rejects = source(tokenizer, path).take(0, 2)
    assert {each["reason"] for each in rejects} == {"unreadable"} and message in rejects[0]["detail"]


def test_a_prompt_of_as_much_text_as_may_be_shown_has_room_beside_its_response():
    (least,) = {
        config["data"]["seq_length"] - config["rollout"]["max_tokens"] - TaskConfig().context_tokens
        for config in map(yaml.safe_load, (path.read_text() for path in CONFIGS.glob("rlpt-*.yaml")))
    }
    longest = max(len(path.read_text()) for path in TEMPLATES.glob("[am]sr.txt"))
    assert least > longest / 2, "tokens of two letters, which is shorter than any tokenizer's mean"


def test_a_file_without_any_usable_prompt_ends_in_one_line(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [line("long", 60), "nothing"])
    with pytest.raises(InputError, match="no usable prompt among 2 in a row"):
        source(tokenizer, path).take(0, 1)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "prompts.files is empty"),
        (("absent.jsonl",), "absent.jsonl: No such file"),
        (("empty.jsonl",), "empty.jsonl has no prompt in it"),
        ((0.5, "a.jsonl", "b.jsonl"), "mixes forms"),
        ((-1, "a.jsonl"), "positive shares"),
    ],
)
def test_bad_files_are_told(tokenizer, tmp_path, monkeypatch, files, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match=message):
        source(tokenizer, *files)
