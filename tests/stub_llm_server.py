"""An OpenAI-compatible chat server that misbehaves on request, in a process of its own.

    python stub_llm_server.py LOG [--port 0] [--fault NAME] [--every 5] [--latency 0.002]

`StubServer` starts one from a test. It prints its port, then appends to LOG the id of each document that it answers
with thinking; a document says its id in its first word. What it writes is a function of the prompt and the seed.
"""

import argparse
import asyncio
import hashlib
import json
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

STATUS = {"429": 429, "500": 500, "503": 503, "400": 400, "401": 401, "404": 404}
FAULTS = (*STATUS, "drop", "hang", "not_json", "not_chat", "no_tag", "tags", "score")


class StubServer:
    """The server's process; a context."""

    def __init__(self, log: Path, *flags: str) -> None:
        self._log = log
        command = [sys.executable, "-S", __file__, str(log), *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def answered(self) -> Sequence[str]:
        """First words of the documents that were answered, in order."""
        return self._log.read_text().split()

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


def completion(body: dict, fault: str) -> dict:
    prompt = body["messages"][-1]["content"]
    digest = hashlib.sha256(f"{prompt}{body['seed']}".encode()).hexdigest()
    message = {"role": "assistant", "content": None, "reasoning_content": f"Let me think. {digest} é東"}
    if fault == "no_tag":
        message = {"role": "assistant", "content": "An answer at once."}
    if fault == "tags":
        message = {"role": "assistant", "content": f"<think>\nhm {digest}\n</think>\nThe answer."}
    if fault == "score":
        message = {"role": "assistant", "content": f"Score: 9 would be too much.\nScore: {len(prompt.split()[0]) % 6}"}
    return {
        "id": "x",
        "object": "chat.completion",
        "model": body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": len(prompt.split()), "completion_tokens": 7},
    }


class Stub:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.fault, self.every, self.latency = arguments.fault, arguments.every, arguments.latency
        self.requests = 0
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
            return await self._answer(writer, 200, json.dumps({"data": [{"id": "stub"}]}).encode())
        body = json.loads(content)
        word = body["messages"][-1]["content"].split()[0]
        self.requests += 1
        # Not all the same, so that replies overtake each other.
        await asyncio.sleep(self.latency * (1 + zlib.crc32(word.encode()) % 5))
        # "poison" documents fail every time, the others when it is their turn.
        fault = self.fault if self.fault and (word.startswith("poison") or self.requests % self.every == 0) else ""
        if fault == "drop":
            return False
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault in STATUS:
            said = {"error": {"message": f"{fault} for {headers.get('authorization')}"}}
            return await self._answer(writer, STATUS[fault], json.dumps(said).encode())
        if fault in ("not_json", "not_chat"):
            return await self._answer(writer, 200, b"<html>busy</html>" if fault == "not_json" else b'{"choices": []}')
        self.log.write(word + "\n")
        return await self._answer(writer, 200, json.dumps(completion(body, fault)).encode())

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
    stub = Stub(parser.parse_args())
    server = await asyncio.start_server(stub.serve, "127.0.0.1", parser.parse_args().port, limit=1 << 26, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
