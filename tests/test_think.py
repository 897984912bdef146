"""Documents of every kind, prompts, and where a reply's thinking is."""

import gzip
import json
import random
import re

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset
from stub_llm_server import StubServer
from think_runs import rejects, think_config, thoughts, write_corpus

from megatron_ptrl.__main__ import main
from megatron_ptrl.data.tokenizer import Tokenizer, train_tokenizer
from megatron_ptrl.errors import InputError
from megatron_ptrl.records import Thought
from megatron_ptrl.thinking.generate_stage import seed_of, thinking_of
from megatron_ptrl.thinking.generators import GenerationError, Reply, make_generator
from megatron_ptrl.thinking.language import LETTERS
from megatron_ptrl.thinking.pipeline import list_inputs, run
from megatron_ptrl.thinking.prompts import BUILT_IN, MARKER, load_template, make_cut, mark


def test_the_command(tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"text": "one document", "domain": "maths"}\n')
    with StubServer(tmp_path / "log") as server:
        arguments = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out"), "--servers", server.url]
        assert main(["think", *arguments, "--assemble.vocab_size", "300", "--assemble.filters.languages", "[]"]) == 0
    assert f"{tmp_path / 'out'}: 1 thoughts in 1 parts, rejected: none" in capsys.readouterr().out
    (line,) = (tmp_path / "out" / "thoughts" / "00000.jsonl").read_bytes().splitlines()
    thought = Thought.from_json(line, "here")
    assert thought.to_line() == line
    assert (thought.id, thought.text, thought.metadata) == ("in.jsonl:1", "one document", {"domain": "maths"})
    assert thought.thinking.startswith("Let me think.") and thought.thinking.endswith("é東")
    assert (thought.model, thought.finish_reason, thought.thinking_tokens) == ("stub", "stop", 7)
    assert thought.seed == seed_of(0, "in.jsonl:1") and thought.prompt.startswith("default@")
    dataset = IndexedDataset(str(tmp_path / "out" / "train"))
    tokenizer = Tokenizer(tmp_path / "out" / "train.tokenizer.json")
    assert tokenizer.decode(dataset[0][:-1]) == f"one document\n\n<think>{thought.thinking}</think>"
    assert main(["think", "--input", "x.jsonl"]) == 2
    assert "output is empty" in capsys.readouterr().err


ODD = [
    b'{"id": "a", "text": "a first"}',
    b"{broken",
    b'{"id": "a", "text": "a once more", "n": 1}',
    b'{"id": "empty", "text": " \\n"}',
    b'{"id": "tag", "text": "tag <think>inside</think> it", "metadata": {"domain": "law"}, "year": 2020}',
    b'{"id": "control", "text": "control \\u0000\\u0007\\u2028 \\r\\n\\t"}',
    '{"id": "latin", "text": "latin ŻÓŁĆ 東京 العربية 🙂"}'.encode(),
    b'{"id": 7, "text": "number"}',
    b'{"id": "surrogate", "text": "\\ud800"}',
    b'{"id": "field", "text": "field", "note": "\\ud800"}',
    b'{"id": "hole", "text": "hole {{CONTEXT}} {{field:note}}"}',
    b'{"text": "nameless"}',
    b'{"id": "nan", "text": "nan", "score": NaN, "far": [-Infinity], "note": "\\ud800"}',
]


def test_odd_documents_are_done_or_rejected(tmp_path):
    large = "large " + "".join(random.Random(0).choices("abcdef \n", k=10_000_000))
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join([*ODD, json.dumps({"id": "large", "text": large}).encode()]))
    with StubServer(tmp_path / "log") as server:
        run(think_config([source], tmp_path / "out", [server.url]))
        asked = server.answered()
    texts = {thought["id"]: thought["text"] for thought in thoughts(tmp_path / "out")}
    assert list(texts) == ["a", "tag", "control", "latin", "7", "field", "hole", "in.jsonl:12", "nan", "large"]
    assert texts["large"] == large and texts["control"] == "control \x00\x07\u2028 \r\n\t"
    assert texts["latin"].endswith("العربية 🙂") and texts["a"] == "a first"
    metadata = {thought["id"]: thought["metadata"] for thought in thoughts(tmp_path / "out")}
    assert metadata["tag"] == {"domain": "law", "year": 2020} and metadata["field"] == {"note": "\ud800"}
    assert metadata["nan"] == {"score": None, "far": [None], "note": "\ud800"}
    assert sorted(asked) == sorted(
        ["a", "tag", "control", "latin", "number", "field", "hole", "nameless", "nan", "large"]
    )
    found = [(rejected["id"], rejected["reason"], rejected["document"]) for rejected in rejects(tmp_path / "out")]
    assert found == [
        ("in.jsonl:2", "unreadable", None),
        ("a", "duplicate_id", {"id": "a", "text": "a once more", "n": 1}),
        ("in.jsonl:4", "empty_document", None),
        ("in.jsonl:9", "unreadable", None),
    ]
    assert [rejected["detail"].rpartition(":")[2] for rejected in rejects(tmp_path / "out")][0] == " not JSON"


def test_every_kind_of_file_and_a_remote_folder(tmp_path):
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("plain text")
    (folder / "sub" / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}\n'))
    (folder / "e::f[1].jsonl").write_text('{"text": "name"}\n')
    times = pyarrow.array([[1], [2]], pyarrow.list_(pyarrow.timestamp("ns")))
    spans = pyarrow.StructArray.from_arrays([pyarrow.array([2**62] * 2, pyarrow.timestamp("us"))], ["end"])
    columns = {"text": ["row", None], "domain": ["maths", "law"], "id": ["p", "q"], "times": times, "span": spans}
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table, folder / "c.parquet")
    with fsspec.open("memory://corpus/x/d.jsonl", "wb") as stream:
        stream.write(b'{"text": "remote"}\n')
    with StubServer(tmp_path / "log") as server:
        config = think_config([folder], tmp_path / "out", [server.url])
        run(think_config([*config.input, "memory://corpus"], tmp_path / "out", [server.url]))
    found = [(thought["id"], thought["text"], thought["metadata"]) for thought in thoughts(tmp_path / "out")]
    assert found == [
        ("a.txt:1", "plain text", {}),
        ("p", "row", {"domain": "maths", "times": [1], "span": {"end": 2**62}}),
        ("e::f[1].jsonl:1", "name", {}),
        ("sub/b.jsonl.gz:1", "packed", {}),
        ("x/d.jsonl:1", "remote", {}),
    ]
    assert [rejected["id"] for rejected in rejects(tmp_path / "out")] == ["c.parquet:2"]


BAD = {
    "missing": ("none.jsonl", "no such file"),
    "nothing": (None, "no input was given"),
    "cut": ("cut.txt.gz", "damaged archive"),
    "own": ("out/thoughts/00000.jsonl", "lies in the output folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_in_one_line(case, tmp_path):
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"x" * 999)[:-9])
    (tmp_path / "out" / "thoughts").mkdir(parents=True)
    (tmp_path / "out" / "thoughts" / "00000.jsonl").write_text('{"text": "x"}\n')
    name, message = BAD[case]
    output = tmp_path / ("out" if case == "own" else "new")
    with pytest.raises(InputError, match=message) as error:
        run(think_config([tmp_path / name] if name else [], output, ["http://localhost:1/v1"]))
    assert "\n" not in str(error.value)


def reply(text: str, thinking: str | None = None) -> Reply:
    return Reply(text, "stop", None, None, "m", thinking)


@pytest.mark.parametrize(
    "given, expected",
    [
        (reply("<think>\nwhy\n</think>\nanswer"), "why"),
        (reply("<think>\nwhy, cut by the stop"), "why, cut by the stop"),
        (reply("opened by the template</think>answer"), "opened by the template"),
        (reply("answer", " told apart\n"), "told apart"),
        (reply("<think></think>answer"), ""),
        (reply("<think>a</think>b<think>c</think>"), "a"),
    ],
)
def test_where_the_thinking_is(given, expected):
    assert thinking_of(given, "reject") == expected


def test_a_reply_without_tags():
    assert thinking_of(reply(" all of it "), "thinking") == "all of it"
    with pytest.raises(GenerationError, match="no_thinking: neither tags"):
        thinking_of(reply("an answer"), "reject")


def test_tags_in_the_content(tmp_path):
    (tmp_path / "in.txt").write_text("document")
    with StubServer(tmp_path / "log", "--fault", "tags", "--every", "1") as server:
        run(think_config([tmp_path / "in.txt"], tmp_path / "out", [server.url]))
    (thought,) = thoughts(tmp_path / "out")
    assert thought["thinking"].startswith("hm ") and "think>" not in thought["thinking"]


@given(st.text(min_size=1), st.integers(0, 2**31 - 1))
def test_the_marker_stands_before_a_word(text, seed):
    marked = mark(text, seed)
    assert marked == mark(text, seed) and marked.replace(MARKER + " ", "", 1) == text
    before, _, behind = marked.partition(MARKER + " ")
    assert not text.strip() or not behind[0].isspace()
    unspaced = re.compile(f"[{LETTERS['han']}{LETTERS['kana']}]")
    assert not (before and text.strip()) or before[-1].isspace() or unspaced.search(before[-1] + behind[0])


def test_the_marker_is_anywhere():
    text = " ".join("abcdefghij")
    assert {mark(text, seed).index(MARKER) for seed in range(200)} == {2 * i for i in range(10)}
    assert {mark("没有空格的句子", seed).index(MARKER) for seed in range(99)} == set(range(7))


@given(st.text(), st.integers(1, 20))
def test_without_a_tokenizer_four_bytes_count_as_a_token(text, tokens):
    kept = make_cut(tokens, None)(text)
    assert text.startswith(kept) and len(kept.encode()) <= 4 * tokens
    assert kept == text or len(text[: len(kept) + 1].encode()) > 4 * tokens


def test_the_prompt_is_cut_by_the_tokenizer(tmp_path):
    texts = ["naïve 東京 🙂 words and words " * 20, "x " * 300]
    train_tokenizer(texts, tmp_path / "t.json", 300)
    tokenizer = Tokenizer(tmp_path / "t.json")
    for text in texts:
        for tokens in (1, 7, 50, 10_000):
            kept = make_cut(tokens, str(tmp_path / "t.json"))(text)
            ids = tokenizer.encode(text)
            # Whole characters, of which a byte-level vocabulary may need several tokens.
            assert text.startswith(kept) and tokens - 4 < len(tokenizer.encode(kept)) <= tokens or kept == text
            assert (kept == text) == (len(ids) <= tokens)


def test_the_templates_fill_their_holes(tmp_path):
    fields = {"question": "Why?", "answer": "Because."}
    cut = make_cut(1, None)
    filled = {name: load_template(name).messages("long text", fields, cut, 3)[0]["content"] for name in BUILT_IN}
    assert filled["default"].startswith("long\n") and "Feynman" in filled["default"]
    assert filled["random_focus"].startswith(f"{MARKER} long\n")
    assert "Why?\n" in filled["back_thinking"] and "Beca\n" in filled["back_thinking"]
    assert not any("{{" in text for text in filled.values())
    own = tmp_path / "mine.txt"
    own.write_text("{{CONTEXT}} of {{field:year}}")
    template = load_template(str(own))
    assert template.messages("{{CONTEXT}}", {"year": 1999}, make_cut(9, None), 0) == [
        {"role": "user", "content": "{{CONTEXT}} of 1999"}
    ]
    assert template.name.startswith("mine@")
    with pytest.raises(GenerationError, match="missing_field: the prompt mine@.* needs a field 'year'"):
        template.messages("x", {}, cut, 0)
    with pytest.raises(GenerationError, match="unreadable: lone surrogate in the field 'year'"):
        template.messages("x", {"year": ["\ud800", 1][0]}, cut, 0)
    own.write_bytes(b"\xef\xbb\xbf{{field:my-note 2}}\r\nend")
    assert load_template(str(own)).messages("x", {"my-note 2": {"a": 1}}, make_cut(9, None), 0)[0] == {
        "role": "user",
        "content": "{'a': 1}\nend",
    }


@pytest.mark.parametrize(
    "text, message",
    [
        ("{{CONTEXT}} and {{ FOCUS_CONTEXT }}", "unknown placeholder {{ FOCUS_CONTEXT }}"),
        ("{{CONTEXT}} and {field:x}", "unknown placeholder {field:x}"),
        ("{{CONTXT}}", "unknown placeholder CONTXT"),
        ("no hole", "no placeholder"),
        (None, "expected one of"),
    ],
)
def test_a_template_that_cannot_be_filled(text, message, tmp_path):
    path = tmp_path / "mine.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_template(str(path))


def test_a_missing_field_rejects_the_document(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"id": "q", "text": "t", "question": "Why?", "answer": "So."}\n{"id": "r", "text": "t"}\n')
    with StubServer(tmp_path / "log") as server:
        run(think_config([source], tmp_path / "out", [server.url], prompt="back_thinking"))
    assert [thought["id"] for thought in thoughts(tmp_path / "out")] == ["q"]
    assert [(rejected["id"], rejected["reason"]) for rejected in rejects(tmp_path / "out")] == [("r", "missing_field")]


def test_an_output_within_the_input_is_no_input_of_the_next_call(tmp_path):
    write_corpus(tmp_path / "in.jsonl", 3)
    with StubServer(tmp_path / "log") as server:
        for _ in range(2):
            run(think_config([tmp_path], tmp_path / "out", [server.url]))
        assert len(thoughts(tmp_path / "out")) == len(server.answered()) == 3
    with pytest.raises(InputError, match="lies in the output folder"):
        list_inputs([f"file://{tmp_path}/out/thoughts"], tmp_path / "out")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"generator": "oracle"}, "generator is 'oracle'; expected openai"),
        ({}, "servers is empty; expected URLs such as http.*or generator embedded"),
        ({"generator": "embedded"}, "generator is embedded and checkpoint is empty; expected a run of `ptrl pretrain`"),
        ({"generator": "embedded", "checkpoint": "nowhere"}, "checkpoint nowhere: no such folder"),
    ],
)
def test_a_missing_generator_is_named_before_an_output_is_begun(settings, message, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "one"}\n')
    config = think_config([tmp_path / "in.jsonl"], tmp_path / "out", [], **settings)
    with pytest.raises(InputError, match=message):
        run(config)
    with pytest.raises(InputError, match=message):
        make_generator(config)
    assert not (tmp_path / "out").exists()


def test_without_any_thinking_there_is_no_training_set(tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"body": "one"}\n')
    with StubServer(tmp_path / "log") as server:
        config = think_config([tmp_path / "in.jsonl"], tmp_path / "out", [server.url], then_assemble=True)
        with pytest.raises(InputError, match="out: no document has thinking, so there is nothing to train on"):
            run(config)
    assert (
        f"0 thoughts in 1 parts, rejected: 1 unreadable, see {tmp_path / 'out' / 'rejects'}" in capsys.readouterr().out
    )
    assert not list((tmp_path / "out").glob("train*"))
