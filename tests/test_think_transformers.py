"""`ptrl think` from end to end against a real `transformers serve`, over HTTP."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from think_runs import contents, rejects, think_config, thoughts
from transformers_server import END, TransformersServer

from megatron_ptrl.__main__ import main
from megatron_ptrl.config import AssembleConfig, SamplingConfig, ThinkingFilterConfig
from megatron_ptrl.data.tokenizer import Tokenizer
from megatron_ptrl.thinking.generate_stage import seed_of
from megatron_ptrl.thinking.generators import GeneratorUnusable
from megatron_ptrl.thinking.pipeline import run
from megatron_ptrl.thinking.prompts import load_template

PACKAGES = ("transformers", "fastapi", "uvicorn", "openai", "accelerate")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"transformers[serving] is not installed: no {', '.join(MISSING)}"
)

# So short that of random words about half of the replies end before the closing tag comes.
MAX_TOKENS = 12
TEXTS = {f"d{i}": f"東京 document number {i}" for i in range(12)}
ASSEMBLE = AssembleConfig(vocab_size=400, filters=ThinkingFilterConfig(truncated="keep", languages=[]))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TransformersServer]:
    with TransformersServer(tmp_path_factory.mktemp("served")) as server:
        yield server


def write_source(folder: Path) -> Path:
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in TEXTS.items()))
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path)


@pytest.fixture(scope="module")
def reference(server: TransformersServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a run by the settings of `written`, assembled."""
    source = write_source(tmp_path_factory.mktemp("reference"))
    return written(server, source, "out", then_assemble=True, assemble=ASSEMBLE)


def written(
    server: TransformersServer, source: Path, name: str, stop: tuple[str, ...] = (END,), **changed: Any
) -> Path:
    """Output folder of a run that asks for one document at a time and takes replies without tags."""
    (source.parent / "short.txt").write_text("{{CONTEXT}}")
    settings: dict[str, Any] = {
        "model": server.model,
        "in_flight": 1,
        "prompt": str(source.parent / "short.txt"),
        "sampling": SamplingConfig(max_tokens=MAX_TOKENS, stop=list(stop), untagged="thinking"),
    }
    run(think_config([source], source.parent / name, [server.url], **(settings | changed)))
    return source.parent / name


def stored_documents(output: Path) -> list[str]:
    """The training set as Megatron-Core reads it, without ends of documents."""
    tokenizer = Tokenizer(output / "train.tokenizer.json")
    return [tokenizer.decode(ids[:-1]) for ids in IndexedDataset(str(output / "train"))]


def test_the_command_loses_no_document(server, source, tmp_path, capsys):
    with source.open("a") as stream:
        stream.write('{"id": "d0", "text": "again"}\n{"id": "empty", "text": ""}\n')
    flags = {
        "--input": source,
        "--output": tmp_path / "out",
        "--servers": server.url,
        "--server.model": server.model,
        "--server.in_flight": 1,
        "--sampling.max_tokens": MAX_TOKENS,
        "--assemble.vocab_size": 400,
        "--assemble.filters.languages": "[]",
    }
    assert main(["think", *(str(word) for pair in flags.items() for word in pair)]) == 0
    done, left = thoughts(tmp_path / "out"), rejects(tmp_path / "out")
    told = f"{len(done)} thoughts in 1 parts, rejected: 1 duplicate_id, 1 empty_document, {len(left) - 2} no_thinking"
    assert told in capsys.readouterr().out
    assert sorted([*(line["id"] for line in done), *(line["id"] for line in left)]) == sorted(
        [*TEXTS, "d0", "in.jsonl:14"]
    )
    # Replies whose tokens ran out before the tag.
    untagged = [line for line in left if line["reason"] == "no_thinking"]
    assert untagged and all(line["document"]["text"] == TEXTS[line["id"]] for line in untagged)
    assert done and all(line["finish_reason"] == "stop" or line["thinking_tokens"] == MAX_TOKENS for line in done)
    template = load_template("default")
    for line in done:
        (message,) = template.messages(line["text"], {}, lambda text: text, 0)
        rendered = server.tokenizer.encode(f"user: {message['content']}\nassistant: ", add_special_tokens=False)
        assert line["prompt_tokens"] == len(rendered.ids)
        # Each word is a token, and so is the tag.
        assert line["thinking_tokens"] == len(line["thinking"].split()) + 1
        assert line["model"] == f"{server.model}@main"
    kept = [line for line in done if line["finish_reason"] == "stop"]
    expected = [f"{line['text']}\n\n<think>{line['thinking']}</think>" for line in kept]
    assert stored_documents(tmp_path / "out") == expected


def test_the_seed_decides_what_is_written(server, source, reference):
    again, other = written(server, source, "again"), written(server, source, "other", seed=1)
    assert contents(again)["00000.jsonl"] == contents(reference)["00000.jsonl"]
    lines = thoughts(reference)
    assert [line["id"] for line in lines] == [*TEXTS] and not rejects(reference)
    assert all(line["seed"] == seed_of(0, line["id"]) for line in lines)
    assert {line["finish_reason"] for line in lines} == {"stop", "length"}
    for line in lines:
        closed = line["finish_reason"] == "stop"
        assert line["thinking_tokens"] == (len(line["thinking"].split()) + 1 if closed else MAX_TOKENS)
    assert stored_documents(reference) == [f"{line['text']}\n\n<think>{line['thinking']}</think>" for line in lines]
    changed = sum(a["thinking"] != b["thinking"] for a, b in zip(lines, thoughts(other), strict=True))
    assert changed > len(TEXTS) / 2


def test_a_reply_ends_before_the_first_stop(server, source, reference):
    whole = {line["id"]: line for line in thoughts(reference)}
    ended = {line["id"]: line for line in thoughts(written(server, source, "ended", stop=(" three", END)))}
    assert {name: line["thinking"] for name, line in ended.items()} == {
        name: (" " + line["thinking"]).partition(" three")[0].strip() for name, line in whole.items()
    }
    shorter = [name for name in whole if ended[name]["thinking_tokens"] < whole[name]["thinking_tokens"]]
    assert shorter and all(ended[name]["finish_reason"] == "stop" for name in shorter)


def test_thinking_that_the_server_tells_apart_and_many_requests_at_a_time(server, source):
    output = written(
        server,
        source,
        "apart",
        in_flight=8,
        sampling=SamplingConfig(max_tokens=MAX_TOKENS),
        extra_body={"chat_template_kwargs": {"thinks": True}},
    )
    lines = thoughts(output)
    assert [line["id"] for line in lines] == [*TEXTS] and not rejects(output)
    assert all(line["thinking"] and "think>" not in line["thinking"] for line in lines)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"model": "other"}, "refuses even a short question with status 400.*pinned.*requested 'other'"),
        ({"extra_body": {"top_k": 5}}, "refuses even a short question with status 422.*top_k.*server.extra_body"),
        # It lists its cache, which is not there.
        ({"model": None}, "no server tells its model's name .*/models: status 500.*set server.model"),
    ],
)
def test_settings_that_the_server_does_not_take_put_no_document_aside(changed, message, server, source, tmp_path):
    with pytest.raises(GeneratorUnusable, match=message):
        written(server, source, "out", **changed)
    assert not thoughts(tmp_path / "out") and not rejects(tmp_path / "out")
