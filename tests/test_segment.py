"""`ptrl segment` from text to prompts: the same bytes however it is run, and whatever becomes of the processes."""

import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import nltk
import pytest
from held_segments import held
from stub_llm_server import StubServer

from megatron_ptrl.__main__ import main
from megatron_ptrl.config import (
    CleanConfig,
    ExecutorConfig,
    QualityConfig,
    SegmentConfig,
    ServerConfig,
    SplitConfig,
    TaskConfig,
)
from megatron_ptrl.errors import InputError
from megatron_ptrl.records import Prompt
from megatron_ptrl.segmenting.files import write_whole
from megatron_ptrl.segmenting.pipeline import run

NAMES = ["Ann", "Bob", "Clara", "Dora", "Emil", "Frank", "Gerda", "Hans"]
THINGS = ["apples", "old books", "letters", "grey stones", "cups of tea", "maps", "keys", "coats"]
PLACES = ["in the garden", "at the market", "to the river", "on Monday", "with the others", "of the town"]

SECRET = "Clearly, the answer to this question is known to be forty-two"


def prose(seed: int, sentences: int = 12) -> str:
    draw = random.Random(seed)
    return " ".join(
        f"{draw.choice(NAMES)} gave {draw.randrange(2, 99)} {draw.choice(THINGS)} to {draw.choice(NAMES)} and then had "
        f"to go {draw.choice(PLACES)}."
        for _ in range(sentences)
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(4):
        records = [{"id": f"{number}.{i}", "text": prose(100 * number + i), "kind": "tale"} for i in range(12)]
        lines = [json.dumps(record) for record in records]
        if number == 1:
            lines[3] = lines[2]  # the same id again
            lines += ["no json", json.dumps({"text": " "}), json.dumps({"text": "Too short for the rules."})]
            lines.append(json.dumps({"text": prose(7)}))  # of the first file
            lines.append(json.dumps({"text": prose(900) + " <|endofprediction|>"}))
            lines.append(json.dumps({"text": prose(901) + " Mail to joe@mail.org, please, at any time."}))
            lines.append(
                json.dumps({"text": prose(902) + " Clearly the answer to this question is known to be forty two."})
            )
            lines.append(json.dumps({"text": prose(903, 30).replace(".", ",")}))
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("evaluation") / "test.jsonl"
    path.write_text(json.dumps({"q": "What?", "a": SECRET}) + "\n")
    return path


@pytest.fixture(autouse=True)
def no_punkt_tab(monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [])


def settings(corpus: Path, output: Path, **changed: Any) -> SegmentConfig:
    changed.setdefault("part_megabytes", 1e-6)
    return SegmentConfig(input=[str(corpus)], output=str(output), **changed)


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.glob("*.json*") if path.name != "plan.json"}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open()]


@pytest.fixture(scope="module")
def undisturbed(corpus, evaluation, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk.data, "path", [])
        run(settings(corpus, output, clean=CleanConfig(decontaminate=[str(evaluation)])))
    return output


def test_prompts_rejects_and_summary(undisturbed, corpus):
    counts = json.loads((undisturbed / "summary.json").read_text())["counts"]
    rejects = lines(undisturbed / "rejects.jsonl")
    assert Counter(reject["reason"] for reject in rejects) == {
        "duplicate_id": 1,
        "unreadable": 1,
        "empty_document": 1,
        "too_few_words": 1,
        "near_duplicate": 1,
        "tag_in_text": 1,
        "contaminated": 1,
        "too_few_segments": 2,
    }
    by_reason = {reject["reason"]: reject for reject in rejects}
    file = corpus / "1.jsonl"
    assert by_reason["near_duplicate"]["where"] == f"{file}:16"
    assert by_reason["near_duplicate"]["detail"] == f"of {corpus / '0.jsonl'}:8"
    assert by_reason["contaminated"]["detail"] == "clearly the answer to this question is known to be forty two"
    assert [reject["task"] for reject in rejects if reject["reason"] == "too_few_segments"] == ["asr", "msr"]
    assert counts["documents"] == 4 * 12 + 8 and counts["masked"] == 1
    for task in ("asr", "msr"):
        path = undisturbed / f"{task}.jsonl"
        prompts = [Prompt.from_json(line, str(path)) for line in path.open("rb")]
        assert len(prompts) == counts[f"prompts.{task}"] and {prompt.task for prompt in prompts} == {task}
        assert len({prompt.id for prompt in prompts}) == len(prompts)
        places = [prompt.metadata["document"] for prompt in prompts]
        assert places == sorted(places, key=places.index)
        of_first = [prompt for prompt in prompts if prompt.metadata["document"] == "0.0"]
        assert len(of_first) == (11 if task == "asr" else 10)
        assert all(prompt.target in prose(0) and prompt.reference.startswith(prompt.target) for prompt in of_first)
        text = path.read_text()
        assert "joe@mail.org" not in text and "email@example.com" in text


@pytest.mark.parametrize("tasks, workers, megabytes", [(3, 1, 1e-6), (1, 1, 64.0)])
def test_bytes_do_not_depend_on_tasks(tasks, workers, megabytes, corpus, evaluation, undisturbed, tmp_path):
    config = settings(
        corpus,
        tmp_path / "out",
        clean=CleanConfig(decontaminate=[str(evaluation)]),
        part_megabytes=megabytes,
        executor=ExecutorConfig(tasks=tasks, workers=workers),
    )
    run(config)
    found, expected = contents(tmp_path / "out"), contents(undisturbed)
    for files in (found, expected) if megabytes > 1 else ():
        files["summary.json"] = json.dumps(json.loads(files["summary.json"])["counts"]).encode()
    assert found == expected and {"asr.jsonl", "msr.jsonl", "rejects.jsonl", "summary.json", "punkt.json"} == set(found)
    before = (tmp_path / "out" / "asr.jsonl").stat().st_mtime_ns
    run(config)
    assert (tmp_path / "out" / "asr.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_several_points(workers, corpus, evaluation, undisturbed, tmp_path):
    clean = CleanConfig(decontaminate=[str(evaluation)])
    executor = ExecutorConfig(tasks=workers, workers=workers)
    config = settings(corpus, tmp_path / "out", clean=clean, executor=executor)
    points = (("clean/signatures/*.npy", 2), ("clean/signatures/*.npy", 3), ("punkt.json", 1), ("parts/0000?.json", 2))
    # A pool of processes takes seconds to start.
    for pattern, count in points if workers == 1 else points[::3]:
        with held(config, pattern, count):
            assert not (tmp_path / "out" / "summary.json").exists()
    run(config)
    assert contents(tmp_path / "out") == contents(undisturbed)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*contents(undisturbed), "plan.json", "logs"}


def test_a_part_broken_off_is_done_again(corpus, evaluation, undisturbed, tmp_path, monkeypatch):
    """A kill between the files of a part, and between the last of the output's files."""
    config = settings(corpus, tmp_path / "out", clean=CleanConfig(decontaminate=[str(evaluation)]))
    for stop in ("00002.json", "summary.json"):

        def fail_at(path: Path, content: bytes, stop: str = stop) -> None:
            if path.name == stop:
                raise KeyboardInterrupt
            write_whole(path, content)

        for module in ("segment_stage", "pipeline"):
            monkeypatch.setattr(f"megatron_ptrl.segmenting.{module}.write_whole", fail_at)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    monkeypatch.undo()
    monkeypatch.setattr(nltk.data, "path", [])
    (tmp_path / "out" / "parts" / "asr-00003.jsonl").write_bytes(b"torn")
    (tmp_path / "out" / "parts" / "00003.json").unlink()
    run(config)
    assert contents(tmp_path / "out") == contents(undisturbed)


def test_scores_by_a_server(corpus, tmp_path):
    (tmp_path / "prompt.txt").write_text("{context}")
    with StubServer(tmp_path / "log", "--fault", "score", "--every", "1") as server:
        quality = QualityConfig(
            servers=[server.url], server=ServerConfig(model="m"), prompt=str(tmp_path / "prompt.txt"), min_score=4
        )
        run(settings(corpus, tmp_path / "out", quality=quality))
    kept = {prompt["metadata"]["document"] for prompt in lines(tmp_path / "out" / "asr.jsonl")}
    # The stub scores by the length of the first word.
    low = [reject for reject in lines(tmp_path / "out" / "rejects.jsonl") if reject["reason"] == "low_score"]
    assert low and all(float(reject["detail"]) < 4 for reject in low)
    assert kept >= {f"0.{number}" for number in range(12)} - {reject["id"] for reject in low}
    for number in range(12):
        assert (f"0.{number}" in kept) == (len(prose(number).split()[0]) % 6 >= 4)


def test_another_corpus_or_other_settings_are_refused(corpus, evaluation, tmp_path):
    run(settings(corpus, tmp_path / "out"))
    (tmp_path / "prompt.txt").write_text("Go on: {context}")
    for changed, named in (
        ({"seed": 1}, "seed"),
        ({"task": TaskConfig(context_tokens=9)}, "task.context_tokens"),
        ({"task": TaskConfig(asr_prompt=str(tmp_path / "prompt.txt"))}, "task.asr_prompt"),
        ({"split": SplitConfig(unit="paragraph")}, "split.unit"),
        ({"clean": CleanConfig(decontaminate=[str(evaluation)])}, "clean.decontaminate"),
    ):
        with pytest.raises(InputError, match=f"is of another {named}; remove it, or choose another output"):
            run(settings(corpus, tmp_path / "out", **changed))


def test_one_process_at_a_time(corpus, tmp_path):
    """A second one must not remove the parts that the first still writes."""
    config = settings(corpus, tmp_path / "out")
    with held(config, "clean/signatures/*.npy", 1):
        with pytest.raises(InputError, match="out: another process is writing there; wait for its end"):
            run(config)
    run(config)
    assert (tmp_path / "out" / "asr.jsonl").stat().st_size


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("summary.json", b"junk", "out is damaged .*; remove it and repeat the command"),
        ("summary.json", b"{}", "out is damaged .no counts.; remove it"),
        ("asr.jsonl", None, "out is damaged .no asr.jsonl.; remove it"),
        ("clean/signatures/00000.npy", b"junk", "00000.npy is damaged .*; remove it, and it is made again"),
        ("clean/duplicates.npy", b"\x93NUMPY", "duplicates.npy is damaged"),
        ("punkt.json", b"{", "punkt.json: .*expected a punkt.json"),
    ],
)
def test_damaged_files_are_told(name, content, said, undisturbed, corpus, evaluation, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(undisturbed, output)
    if "asr" not in name and "summary" not in name:
        (output / "summary.json").unlink()
    (output / name).parent.mkdir(parents=True, exist_ok=True)
    (output / name).unlink(missing_ok=True)
    if content is not None:
        (output / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        run(settings(corpus, output, clean=CleanConfig(decontaminate=[str(evaluation)])))


def test_a_full_disk_is_told(corpus, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_ptrl.segmenting.pipeline.write_whole", full)
    with pytest.raises(InputError, match="out: .*No space left on device; what is done is kept, repeat the command"):
        run(settings(corpus, tmp_path / "out"))


BAD = {
    "no output": (["--input", "{corpus}"], "output is empty"),
    "no input": (["--output", "{out}"], "no input was given"),
    "missing": (["--input", "nowhere", "--output", "{out}"], "nowhere: no such file or folder"),
    "unknown key": (["--output", "{out}", "--split.unti", "sentence"], "the nearest field is split.unit"),
    "choice": (["--output", "{out}", "--split.unit", "page"], "page"),
    "parameters": (["--input", "{corpus}", "--output", "{out}", "--split.punkt", "no.json"], "split.punkt no.json"),
    "tokenizer": (
        ["--input", "{corpus}", "--output", "{out}", "--task.tokenizer", "no.json"],
        "task.tokenizer no.json",
    ),
    "evaluation": (["--input", "{corpus}", "--output", "{out}", "--clean.decontaminate", "no.txt"], "no.txt: no such"),
    "URL": (["--quality.servers", "http://key@host/v1"], "carries credentials"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_line(name, corpus, tmp_path, capsys):
    words, message = BAD[name]
    arguments = [word.format(corpus=corpus, out=tmp_path / "out") for word in words]
    assert main(["segment", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ptrl segment: ") and message in said and said.count("\n") == 1 and "key@" not in said


def test_units_without_punkt_need_none(corpus, tmp_path, capsys):
    arguments = ["--input", str(corpus), "--output", str(tmp_path / "out"), "--clean.near_duplicates", "false"]
    assert main(["segment", *arguments, "--split.unit", "steps", "--split.step_of", "words", "--split.step", "30"]) == 0
    assert not (tmp_path / "out" / "punkt.json").exists()
    said = capsys.readouterr().out
    assert re.search(r"56 documents, prompts: \d+ asr, \d+ msr", said) and "near_duplicate" not in said
    targets = [prompt["target"].split() for prompt in lines(tmp_path / "out" / "asr.jsonl")]
    assert {len(words) for words in targets} >= {30} and max(map(len, targets)) == 30
