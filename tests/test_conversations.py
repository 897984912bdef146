"""Instruction files -> tokenized conversations on disk: every form, every reason against a line, what makes it anew."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ptrl.data.chat import PlainTemplate, encode_chat
from megatron_ptrl.data.chat_store import Conversations, build_conversations
from megatron_ptrl.data.conversations import find_conversation_files, messages_of, read_conversations
from megatron_ptrl.data.corpus import Rejects
from megatron_ptrl.data.tokenizer import Tokenizer, train_tokenizer
from megatron_ptrl.errors import InputError

ASKED = {"role": "user", "content": "a question"}
ANSWERED = {"role": "assistant", "content": "an answer"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["a question", "an answer"], path, 270)
    return Tokenizer(path)


def write(path: Path, *records: Any) -> Path:
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def build(file: Path, tokenizer: Tokenizer, **options: Any) -> Conversations:
    settings: dict[str, Any] = {"seq_length": 64, "too_long": "reject", "template": PlainTemplate()} | options
    return Conversations(build_conversations([file], file.parent / "cache", tokenizer=tokenizer, **settings))


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [ASKED, ANSWERED | {"name": "x"}], "id": 1}, [ASKED, ANSWERED]),
        ({"prompt": "a question", "response": "an answer"}, [ASKED, ANSWERED]),
        ({"instruction": "a question", "input": "", "output": "an answer"}, [ASKED, ANSWERED]),
        ({"instruction": "a question", "output": "an answer"}, [ASKED, ANSWERED]),
        (
            {"instruction": "add", "input": "1 and 2", "output": "an answer"},
            [{"role": "user", "content": "add\n\n1 and 2"}, ANSWERED],
        ),
    ],
)
def test_every_form_becomes_messages(record, expected):
    assert messages_of(json.dumps(record).encode()) == expected


BAD: dict[str, Any] = {
    "no messages, no prompt and response, no instruction and output": {"text": "a document"},
    "not JSON": b"{",
    "not a JSON object": [1],
    "invalid UTF-8": b'{"prompt": "\xff", "response": "x"}',
    "invalid UTF-8 ": b'{"prompt": "\\ud800", "response": "x"}',
    "messages is not a list of objects": {"messages": "hello"},
    "messages is not a list of objects ": {"messages": ["hello"]},
    'role "gpt"; expected system, user, assistant': {"messages": [ASKED, {"role": "gpt", "content": "x"}]},
    "role null; expected system, user, assistant": {"messages": [{"content": "x"}]},
    "the content of role user is not a string": {"messages": [{"role": "user", "content": [1]}, ANSWERED]},
    "the content of role assistant is not a string": {"prompt": "x", "response": None},
    "the content of role user is not a string ": {"instruction": "x", "input": 3, "output": "x"},
    "empty response": {"messages": [ASKED, ANSWERED, ASKED, {"role": "assistant", "content": " \n"}]},
    "empty content of role user": {"prompt": "", "response": "x"},
    "no response: no message has the role assistant": {"messages": [ASKED]},
    "no response: no message has the role assistant ": {"messages": []},
}


def test_what_is_wrong_with_a_line_is_told_and_the_others_are_used(tmp_path, tokenizer):
    good = {"messages": [ASKED, ANSWERED]}
    file = write(tmp_path / "a.jsonl", *[record for bad in BAD.values() for record in (bad, b"", good)])
    found = build(file, tokenizer)
    assert len(found) == len(BAD) == found.about["conversations"]
    rejects = [json.loads(line) for line in (found.folder / "rejects.jsonl").read_text().splitlines()]
    expected = [{"file": str(file), "line": 1 + 3 * i, "reason": r.rstrip()} for i, r in enumerate(BAD)]
    assert rejects == expected
    assert sum(found.about["rejected"].values()) == len(BAD) and "put aside: 2 x invalid UTF-8" in found.describe()


def test_compressed_files_and_folders_are_read_in_order(tmp_path):
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as stream:
        stream.write(json.dumps({"prompt": "b", "response": "x"}) + "\n")
    write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + json.dumps({"prompt": "a", "response": "x"}).encode())
    read = list(read_conversations(find_conversation_files([str(tmp_path)], "data.train"), Rejects()))
    assert [(messages[0]["content"], Path(file).name, line) for messages, file, line in read] == [
        ("a", "a.jsonl", 1),
        ("b", "b.jsonl.gz", 1),
    ]


def test_files_of_another_kind_are_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("prose")
    with pytest.raises(InputError, match=r"data.train: .*a.txt is no JSONL; expected conversations in .jsonl"):
        find_conversation_files([str(tmp_path / "a.txt")], "data.train")
    with pytest.raises(InputError, match="data.valid is empty"):
        find_conversation_files([], "data.valid")
    documents = write(tmp_path / "d.jsonl", {"text": "one"}, {"text": "two"})
    with pytest.raises(InputError, match=r"d.jsonl: no usable conversation in it: 2 x no messages, no prompt and resp"):
        build(documents, tokenizer)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a", "response": "b"}\n' * 99)[:-9])
    with pytest.raises(InputError, match=r"cut.jsonl.gz: cannot be read to its end"):
        build(tmp_path / "cut.jsonl.gz", tokenizer)


def test_the_stored_tokens_are_those_of_each_conversation(tmp_path, tokenizer):
    talks = [[ASKED, {"role": "assistant", "content": "an answer " * n}] for n in range(1, 40)]
    file = write(tmp_path / "a.jsonl", *({"messages": talk} for talk in talks))
    found = build(file, tokenizer, seq_length=4096)
    for number, talk in enumerate(talks):
        ids, is_response = encode_chat(PlainTemplate(), tokenizer, talk)
        assert found[number][0].tolist() == ids.tolist() and found[number][1].tolist() == is_response.tolist()
        assert found.sizes[number] == len(ids) - 1
    assert found.about["tokens"] == sum(len(found[i][0]) for i in range(len(found)))
    assert found.about["response_tokens"] == sum(found[i][1].sum() for i in range(len(found)))


def test_long_conversations_are_put_aside_or_cut(tmp_path, tokenizer):
    whole, mask = encode_chat(PlainTemplate(), tokenizer, [ASKED, ANSWERED])
    question = len(encode_chat(PlainTemplate(), tokenizer, [ASKED, ANSWERED])[0]) - int(mask.sum())
    long_question = {"prompt": "a question " * 30, "response": "an answer"}
    long_answer = {"prompt": "a question", "response": "an answer, " * 30}
    file = write(tmp_path / "a.jsonl", {"messages": [ASKED, ANSWERED]}, long_question, long_answer)
    # One position for every token but the last one: it just fits, and does not fit into one less.
    seq_length = len(whole) - 1
    kept = build(file, tokenizer, seq_length=seq_length)
    reason = f"longer than data.seq_length {seq_length}"
    assert len(kept) == 1 and kept.about["rejected"] == {reason: 2} and kept.about["cut"] == 0
    cut = build(file, tokenizer, seq_length=seq_length, too_long="cut")
    assert len(cut) == 2 and cut.about["cut"] == 1
    assert cut.about["rejected"] == {f"no response within data.seq_length {seq_length}": 1}
    assert len(cut[1][0]) == len(whole) and cut[1][1].tolist() == [False] * question + [True] * (len(whole) - question)
    with pytest.raises(
        InputError, match=f"no usable conversation in it: 3 x longer than data.seq_length {seq_length - 1}"
    ):
        build(file, tokenizer, seq_length=seq_length - 1)


def test_they_are_made_once_and_anew_when_anything_differs(tmp_path, tokenizer, monkeypatch):
    file = write(tmp_path / "a.jsonl", {"messages": [ASKED, ANSWERED]})
    first = build(file, tokenizer).folder
    stamp = (first / "tokens.bin").stat().st_mtime_ns
    assert build(file, tokenizer).folder == first and (first / "tokens.bin").stat().st_mtime_ns == stamp
    other = PlainTemplate()
    other.identity = "another"
    folders = {first, build(file, tokenizer, seq_length=65).folder, build(file, tokenizer, too_long="cut").folder}
    folders.add(build(file, tokenizer, template=other).folder)
    write(file, {"messages": [ASKED, ANSWERED]}, {"messages": [ASKED, ANSWERED]})
    folders.add(build(file, tokenizer).folder)
    assert len(folders) == 5
    # A killed run leaves a part, which the next one does not take for the whole.
    partial = tmp_path / "cache" / f".{build(file, tokenizer).folder.name}.partial"
    build(file, tokenizer).folder.rename(partial)
    (partial / "tokens.bin").write_bytes(b"")
    assert len(build(file, tokenizer)) == 2 and not partial.exists()


def test_a_cache_that_cannot_be_written_is_told(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", {"messages": [ASKED, ANSWERED]})
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InputError, match=r"data.cache .*cache: Not a directory; name a folder that can be written"):
        build(file, tokenizer)
