"""Replies that no server should give: each document ends as a thought or a reject, in bounded memory and time."""

import json
import resource
import socket
from pathlib import Path
from typing import Any

import pytest
from hostile_llm_server import REPLIES, HostileServer
from think_runs import rejects, think_config, thoughts

from megatron_ptrl.thinking.generators import GeneratorUnusable
from megatron_ptrl.thinking.pipeline import run

KEY = 'sk-odd/"key"\\with+what=HTTP{allows}'
CONNECTION = {"endless": "malformed_reply", "trickle": "timeout", "bomb": "malformed_reply", "cut_off": "server_error"}
CONNECTION |= {"no_http": "server_error", "long_header": "server_error"}


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": text.split()[0], "text": text}) + "\n" for text in texts))
    return path


def ask(tmp_path: Path, texts: list[str], **changed: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Thoughts and rejects by the first word of the document."""
    with HostileServer(tmp_path / "log") as server:
        source = write(tmp_path / "in.jsonl", texts)
        settings = {"attempts": 2, "backoff": 0.001, "timeout": 5.0} | changed
        run(think_config([source], tmp_path / "out", [server.url], **settings))
    found = {item["id"]: item for item in thoughts(tmp_path / "out")}
    rejected = {item["id"]: item for item in rejects(tmp_path / "out")}
    assert len(found) + len(rejected) == len(texts)
    return found, rejected


def test_wrong_json_is_rejected_or_made_good(tmp_path):
    found, rejected = ask(tmp_path, list(REPLIES))
    good = {name for name in REPLIES if name.startswith(("usage", "finish", "filtered", "cut", "tagged"))}
    assert set(found) == good | {"closed_then_named", "model_object"}
    assert {rejected.pop(name)["reason"] for name in ("empty", "tool_calls")} == {"no_thinking"}
    assert {item["reason"] for item in rejected.values()} == {"malformed_reply"}
    for item in found.values():
        assert item["thinking"] in ("why so", "why") and isinstance(item["finish_reason"], str)
        assert item["prompt_tokens"] in (None, 3) and item["thinking_tokens"] is None
    reasons = {name: item["finish_reason"] for name, item in found.items()}
    assert (reasons["filtered"], reasons["finish_null"]) == ("content_filter", "unknown")
    # The thinking was whole, whatever became of the answer.
    assert reasons["cut_in_the_answer"] == reasons["tagged_and_cut_behind"] == "stop"
    assert reasons["cut_in_the_thinking"] == "length" and found["closed_then_named"]["thinking"] == "why so"


def test_bodies_without_end_take_no_memory(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found, rejected = ask(tmp_path, [*CONNECTION, "good"], timeout=3.0, attempts=1)
    assert {name: item["reason"] for name, item in rejected.items()} == CONNECTION and set(found) == {"good"}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


def test_a_redirect_does_not_carry_the_key_away(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.settimeout(0.2)
        url = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/v1"
        with pytest.raises(GeneratorUnusable, match="status 307"):
            ask(tmp_path, [f"redirect {url}"])
        with pytest.raises(TimeoutError):
            elsewhere.accept()


def test_servers_that_say_nonsense_about_when_to_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_ptrl.thinking.servers.LONGEST_PAUSE", 0.01)
    headers = ["nan", "-5", "1e999", "soon", "Wed, 21 Oct 2099 07:28:00 GMT", "0"]
    found, rejected = ask(
        tmp_path, [*(f"retry_after_{i} {said}" for i, said in enumerate(headers)), "good"], attempts=1
    )
    assert set(found) == {"good"} and {item["reason"] for item in rejected.values()} == {"server_error"}


def test_a_key_that_comes_back_in_any_spelling_is_struck_out(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    found, rejected = ask(tmp_path, ["key_plain", "key_escaped", "key_slashes", "echo"], model=None)
    assert found["echo"]["thinking"] == "You sent ***, did you?"
    assert {item["detail"].count("***") for item in rejected.values()} == {1}
    captured = capfd.readouterr()
    spelt = [
        KEY,
        json.dumps(KEY)[1:-1],
        json.dumps(json.dumps(KEY)[1:-1])[1:-1],
        KEY.replace("/", "\\/"),
        "\\u0073\\u006b",
    ]
    seen = captured.out + captured.err
    seen += "".join(path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert not [spelling for spelling in spelt if spelling in seen]
