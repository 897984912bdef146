"""Labels asked from a generator: a sample, once, to the letter, and what fails is counted."""

import json
from collections import Counter
from pathlib import Path

import pytest
from stub_llm_server import StubServer, label_reply
from think_runs import read_lines
from thoughts import prose, thought, write_thoughts

from megatron_ptrl.__main__ import main
from megatron_ptrl.config import AskConfig, AssembleConfig, ServerConfig, ThinkReportConfig
from megatron_ptrl.errors import InputError
from megatron_ptrl.thinking.analysis import analyse, by_group, run
from megatron_ptrl.thinking.assemble_stage import run as assemble
from megatron_ptrl.thinking.labels import LABELS, TASK, ask_generator, labels_of

COMPLETE = {"domain": "law", "reasoning": "some", "audience": "lawyers"}
THOUGHTS = [
    thought(seed, text=f"{'poison' if seed == 3 else 'd'}{seed} {prose(seed, 20)}", metadata={"domain": "law"})
    for seed in range(60)
] + [thought(100 + seed, metadata=COMPLETE) for seed in range(20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """60 documents that lack reasoning and audience, and 20 that lack nothing."""
    folder = tmp_path_factory.mktemp("think")
    write_thoughts(folder / "thoughts" / "00000.jsonl", THOUGHTS)
    assemble(AssembleConfig(input=[str(folder / "thoughts")], output=str(folder / "train"), vocab_size=300))
    return folder


def asking(servers: list[str], documents: int, **changed) -> AskConfig:
    return AskConfig(documents=documents, servers=servers, server=ServerConfig(model="m", backoff=0.01), **changed)


def usable(item) -> bool:
    return label_reply(item.text).startswith("{")


def test_the_command_asks_about_a_sample_and_about_each_of_it_once(folder, tmp_path, capsys):
    words = ["think_report", str(folder), "--output", str(tmp_path / "report")]
    with StubServer(tmp_path / "log") as server:
        for documents in ("20", "40"):
            asked = set(server.answered())
            assert main([*words, "--ask.documents", documents, "--ask.servers", server.url]) == 0
            assert asked < set(server.answered()) and len(server.answered()) == int(documents)
        answered = server.answered()
    names = {item.text.split()[0]: item for item in THOUGHTS[:60]}
    assert len({*answered}) == 40 and {*answered} < names.keys()
    summary = capsys.readouterr().out
    rows = {
        cells[0]: cells[1:] for line in summary.splitlines() if (cells := [c.strip() for c in line.split("|")[1:-1]])
    }
    good = [names[name] for name in answered if usable(names[name])]
    assert rows["labelled"] == [str(len(good))] and rows["unusable_answer"] == [str(40 - len(good))]
    expected = Counter(json.loads(label_reply(item.text))["reasoning"] for item in good)
    assert len(expected) == 4 and {name: rows[name][0] for name in expected} == {k: str(n) for k, n in expected.items()}
    # What the metadata has is kept: nobody is in history.
    assert rows["law"][0] == "80" and rows["some"][0] == rows["lawyers"][0] == "20" and "history" not in rows
    # Without asking, and without a server, the answers are still there.
    assert main(words) == 0
    assert (tmp_path / "report" / "summary.md").read_text() in summary
    kept = read_lines(tmp_path / "report", "labels.jsonl")
    assert {line["id"] for line in kept} == {names[name].id for name in answered}
    assert {line["model"] for line in kept} == {"stub"} and all(len(line["reply"]) < 500 for line in kept)


def test_another_seed_asks_about_others(tmp_path):
    with StubServer(tmp_path / "log") as server:
        for seed in (0, 0, 1):
            ask_generator(THOUGHTS[:60], tmp_path / f"{seed}.jsonl", asking([server.url], 10, seed=seed))
    asked = [{line["id"] for line in read_lines(tmp_path, f"{seed}.jsonl")} for seed in (0, 1)]
    assert len(asked[0]) == len(asked[1]) == 10 and asked[0] != asked[1]


def test_what_gets_no_reply_is_counted_and_asked_about_again(folder, tmp_path):
    labels = tmp_path / "labels.jsonl"

    def found(*flags: str) -> Counter[str]:
        with StubServer(tmp_path / "log", *flags) as server:
            config = ThinkReportConfig()
            return analyse(folder, config, lambda sample: ask_generator(sample, labels, asking([server.url], 60))).asked

    good = sum(usable(item) for item in THOUGHTS[:60])
    poisoned = found("--fault", "400", "--every", "1000")
    assert poisoned == {"labelled": good - usable(THOUGHTS[3]), "unusable_answer": 60 - good, "bad_request": 1}
    assert found() == {"labelled": good, "unusable_answer": 60 - good}
    assert len((tmp_path / "log").read_text().split()) == 60


def test_a_torn_line_is_asked_about_again_and_a_foreign_one_is_refused(folder, tmp_path):
    labels = tmp_path / "labels.jsonl"
    with StubServer(tmp_path / "log") as server:
        config = asking([server.url], 5)
        first = ask_generator(THOUGHTS, labels, config)
        whole = labels.read_bytes()
        labels.write_bytes(whole[:-20])
        assert ask_generator(THOUGHTS, labels, config) == first and len(server.answered()) == 6
        assert sorted(labels.read_bytes().splitlines()) == sorted(whole.splitlines())
        # Answers to another question are no answers to this one.
        labels.write_bytes(whole.replace(b"labels@", b"others@"))
        assert ask_generator(THOUGHTS, labels, config) == first and len(server.answered()) == 11
    labels.write_text("no label\n")
    with pytest.raises(InputError, match="labels.jsonl:1: no line of labels .*delete the file to ask again"):
        ask_generator([], labels, AskConfig())


def test_who_is_to_be_asked_is_said(folder, tmp_path):
    with pytest.raises(InputError, match="ask.documents is 0 and there is somebody to ask"):
        AskConfig(servers=["http://localhost:1"])
    with pytest.raises(InputError, match="servers is empty; expected URLs"):
        run(ThinkReportConfig(runs=[str(folder)], output=str(tmp_path), ask=AskConfig(documents=3)))
    assert not by_group(analyse(folder, ThinkReportConfig()).measured, "audience").keys() - {"lawyers"}


ANSWER = {"domain": "law", "reasoning": "None", "audience": "High School"}


@pytest.mark.parametrize(
    "text, known",
    [
        (json.dumps(ANSWER), True),
        (f"<think>law {{}} or not</think>\n\n{json.dumps(ANSWER)}\n", True),
        (f"```json\n{json.dumps(ANSWER, indent=1)}\n```", True),
        (f"The labels are {json.dumps(ANSWER)}", False),
        (json.dumps({**ANSWER, "reasoning": "none"}), False),
        (json.dumps({**ANSWER, "reasoning": None}), False),
        (json.dumps({**ANSWER, "audience": ["Expert"]}), False),
        (json.dumps({**ANSWER, "domain": "law, history"}), False),
        (json.dumps({**ANSWER, "why": "it is"}), False),
        (json.dumps({"domain": "law", "reasoning": "None"}), False),
        (json.dumps([ANSWER]), False),
        ("[" * 100_000, False),
        ("", False),
    ],
)
def test_an_answer_is_taken_to_the_letter(text, known):
    assert labels_of(text) == (ANSWER if known else None)


def test_the_question_names_every_answer():
    assert all(value in TASK for values in LABELS.values() for value in values)
