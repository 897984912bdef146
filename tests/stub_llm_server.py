"""An OpenAI-compatible chat server that misbehaves on request, in a process of its own.

    python stub_llm_server.py LOG [--port 0] [--fault NAME] [--every 5] [--latency 0.002] [--like SERVER]
                                  [--gather N] [--allow N]

`StubServer` starts one from a test. It prints its port, then appends to LOG the id of each document that it answers
with thinking; a document says its id in its first word. What it writes is a function of the prompt and the seed.

So that a test need not be faster than a run: the first `--gather` requests are answered once all of them have come, and
after `--allow` answers the others wait until the test allows more.
"""

import argparse
import asyncio
import hashlib
import json
import os
import re
import subprocess
import sys
import urllib.request
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

STATUS = {"429": 429, "500": 500, "503": 503, "400": 400, "401": 401, "404": 404}
SCORES = {
    "prose": "The prediction holds, I would say.",
    "score_2": "Score: 2",
    "both_scores": "Score: 0\nScore: 1",
    "thought": "<think>\nScore: 0 if strict.\n</think>\nScore: 0? No. All in all:\nScore: 1",
}
FAULTS = (*STATUS, "drop", "hang", "not_json", "not_chat", "no_tag", "tags", "score", *SCORES)
LIKE = ("plain", "vllm", "vllm_older", "vllm_unparsed", "sglang", "sglang_unparsed", "transformers")


class StubServer:
    """The server's process; a context."""

    script = __file__

    def __init__(self, log: Path, *flags: str) -> None:
        self._log = log
        command = [sys.executable, "-S", self.script, str(log), *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def answered(self) -> Sequence[str]:
        """First words of the documents that were answered, in order."""
        return self._log.read_text().split()

    def forget(self) -> None:
        """Start the list of answers anew."""
        os.truncate(self._log, 0)

    def most_at_once(self) -> int:
        """Requests that were under way together."""
        with urllib.request.urlopen(self.url + "/models") as reply:
            return json.load(reply)["most_at_once"]

    def allow(self, answers: int) -> None:
        """Answer this many documents in all, and let the others wait."""
        with urllib.request.urlopen(f"{self.url}/allow/{answers}") as reply:
            reply.read()

    def kill(self) -> None:
        """As a crash would."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> "StubServer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()
        assert self.process.stdout
        self.process.stdout.close()


def judged(prompt: str) -> list[str]:
    """Reference and prediction of a judge's prompt, or nothing."""
    found = re.search(r"\nReference:\n(.*)\nPredicted:\n(.*)\n## Scoring Rules\n", prompt, re.DOTALL)
    return [found[1], found[2]] if found else []


def label_reply(document: str) -> str:
    """What is answered when labels are asked for; for some documents not what was asked."""
    draw = zlib.crc32(document.encode())
    if draw % 5 == 0:
        return "I would say Basic, for a General audience."
    reasoning = ("None", "Basic", "Intermediate", "Advanced")[draw % 4]
    return json.dumps({"domain": "history", "reasoning": reasoning, "audience": ("General", "Expert")[draw // 4 % 2]})


def completion(body: dict, fault: str, like: str) -> dict:
    prompt = body["messages"][-1]["content"]
    digest = hashlib.sha256(f"{prompt}{body['seed']}".encode()).hexdigest()
    thinking = f"Let me think. {digest} é東"
    message = {"role": "assistant", "content": None, "reasoning_content": thinking}
    if fault == "no_tag":
        message = {"role": "assistant", "content": "An answer at once."}
    if pair := judged(prompt):
        score = int(pair[0].lower().startswith(pair[1].lower()))
        message = {"role": "assistant", "content": SCORES.get(fault, f"Score: {score}")}
    if fault == "tags":
        message = {"role": "assistant", "content": f"<think>\nhm {digest}\n</think>\nThe answer."}
    if fault == "score":
        message = {"role": "assistant", "content": f"Score: 9 would be too much.\nScore: {len(prompt.split()[0]) % 6}"}
    document, asked, _ = prompt.partition("\n\n## End of the document ##")
    if asked:
        message = {"role": "assistant", "content": label_reply(document)}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": 7}
    reply = {"id": "x", "object": "chat.completion", "model": body["model"], "choices": [choice], "usage": usage}
    return reply if fault or asked else dressed(reply, thinking, like)


def dressed(reply: dict, thinking: str, like: str) -> dict:
    """The reply with the fields that a server of this kind puts around thinking which it has stopped at </think>.

    "unparsed" ones run without a reasoning parser behind a template that opens the tag, and cut the other one off.
    """
    (choice,), usage = reply["choices"], reply["usage"]
    usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
    kind, _, variant = like.partition("_")
    message = {"role": "assistant", "content": thinking if variant == "unparsed" else None}
    parsed = None if variant == "unparsed" else thinking
    if kind == "vllm":
        message |= dict.fromkeys(("refusal", "annotations", "audio", "function_call")) | {"tool_calls": []}
        message |= {"reasoning_content": parsed} if variant == "older" else {"reasoning": parsed}
        choice |= {"logprobs": None, "stop_reason": "</think>", "token_ids": None}
        usage["prompt_tokens_details"] = None
        reply |= dict.fromkeys(("service_tier", "system_fingerprint", "prompt_logprobs", "kv_transfer_params"))
    elif kind == "sglang":
        message |= {"reasoning_content": parsed, "tool_calls": None}
        choice |= {"logprobs": None, "matched_stop": "</think>"}
        usage |= {"prompt_tokens_details": None, "reasoning_tokens": 0}
        reply["metadata"] = {"weight_version": "default"}
    elif kind == "transformers":
        # Null fields are left out, and the tag stays in the text.
        message = {"role": "assistant", "content": f"{thinking}</think>"}
    else:
        return reply
    choice["message"] = message
    return reply | {"created": 1767225600}


class Stub:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.fault, self.every, self.latency = arguments.fault, arguments.every, arguments.latency
        self.like = arguments.like
        self.requests = self.under_way = self.most_at_once = 0
        self.gather, self.allowed, self.answers = arguments.gather, arguments.allow, 0
        self.changed = asyncio.Condition()
        self.log = open(arguments.log, "a", buffering=1)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        line = await reader.readline()
        if not line:
            return False
        headers = {}
        while (header := await reader.readline()) not in (b"\r\n", b""):
            name, _, value = header.decode().partition(":")
            headers[name.lower()] = value.strip()
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        if line.split()[1] == b"/v1/models":
            models = {"data": [{"id": "stub"}], "most_at_once": self.most_at_once}
            return await self._answer(writer, 200, json.dumps(models).encode())
        if line.startswith(b"GET /v1/allow/"):
            async with self.changed:
                self.allowed = int(line.split()[1].rpartition(b"/")[2])
                self.changed.notify_all()
            return await self._answer(writer, 200, b"{}")
        body = json.loads(content)
        prompt = body["messages"][-1]["content"]
        word = (judged(prompt) or [prompt])[-1].split()[0]
        self.requests += 1
        # Its own number: by the end of its wait others may have come.
        its_turn = self.requests % self.every == 0
        self.under_way += 1
        self.most_at_once = max(self.most_at_once, self.under_way)
        async with self.changed:
            self.changed.notify_all()
            await self.changed.wait_for(lambda: self.requests >= self.gather)
        # Not all the same, so that replies overtake each other.
        await asyncio.sleep(self.latency * (1 + zlib.crc32(word.encode()) % 5))
        self.under_way -= 1
        # "poison" documents fail every time, the others when it is their turn.
        fault = self.fault if self.fault and (word.startswith("poison") or its_turn) else ""
        if fault == "drop":
            return False
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault in STATUS:
            said = {"error": {"message": f"{fault} for {headers.get('authorization')}"}}
            return await self._answer(writer, STATUS[fault], json.dumps(said).encode())
        if fault in ("not_json", "not_chat"):
            return await self._answer(writer, 200, b"<html>busy</html>" if fault == "not_json" else b'{"choices": []}')
        async with self.changed:
            await self.changed.wait_for(lambda: self.answers < self.allowed)
            self.answers += 1
        self.log.write(word + "\n")
        return await self._answer(writer, 200, json.dumps(completion(body, fault, self.like)).encode())

    async def _answer(self, writer: asyncio.StreamWriter, status: int, content: bytes) -> bool:
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        await writer.drain()
        return True


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("log")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--fault", choices=FAULTS, default=None)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--latency", type=float, default=0.002)
    parser.add_argument("--gather", type=int, default=1)
    parser.add_argument("--allow", type=int, default=sys.maxsize)
    parser.add_argument("--like", choices=LIKE, default="plain")
    stub = Stub(parser.parse_args())
    server = await asyncio.start_server(stub.serve, "127.0.0.1", parser.parse_args().port, limit=1 << 26, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
