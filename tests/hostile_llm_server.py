"""A chat server whose every reply is wrong in its own way: the first word of a document says in which.

    python hostile_llm_server.py LOG

LOG gets the word of each request. A word that is none of REPLIES gets a good reply.
"""

import argparse
import asyncio
import gzip
import json
from typing import Any

from stub_llm_server import StubServer

LOOP = b"x" * (1 << 20)
GOOD = {"role": "assistant", "content": "the answer", "reasoning_content": "why so"}


def chat(message: Any = GOOD, finish: Any = "stop", **others: Any) -> bytes:
    """A chat completion with other values in it."""
    return json.dumps({"model": "m", "choices": [{"message": message, "finish_reason": finish}], **others}).encode()


REPLIES: dict[str, bytes] = {
    "choices_null": b'{"choices": null}',
    "choices_text": b'{"choices": "text"}',
    "message_null": chat(None),
    "message_text": chat("text"),
    "content_list": chat({"content": [{"type": "text", "text": "<think>a</think>"}]}),
    "reasoning_number": chat({"content": "x", "reasoning_content": 5}),
    "a_list": b"[1, 2]",
    "a_number": b"7",
    "deep": b"[" * 200_000,
    "long_number": b'{"choices": ' + b"9" * 5000 + b"}",
    "not_utf8": b'\xff\xfe{"choices"',
    "nothing": b"",
    "surrogate": chat({"content": "<think>\ud800</think>"}),
    "empty": chat({"content": None, "reasoning_content": None}),
    "usage_text": chat(usage="many"),
    "usage_odd": chat(usage={"prompt_tokens": -3, "completion_tokens": "7"}),
    "usage_float": chat(usage={"prompt_tokens": 3.0, "completion_tokens": True}),
    "finish_null": chat(finish=None),
    "finish_number": chat(finish=3),
    "filtered": chat(finish="content_filter"),
    "tool_calls": chat({"content": None, "tool_calls": [{}]}, "tool_calls"),
    "cut_in_the_answer": chat(finish="length"),
    "cut_in_the_thinking": chat({"content": None, "reasoning_content": "why"}, "length"),
    "tagged_and_cut_behind": chat({"content": "<think>why so</think> the ans"}, "length"),
    "closed_then_named": chat({"content": "why so</think> the tag <think> opens"}),
    "model_object": chat().replace(b'"m"', b'{"a": 1}'),
}


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, log: Any) -> None:
    try:
        while await reader.readline():
            length = 0
            authorization = b""
            while (header := await reader.readline()) not in (b"\r\n", b""):
                name, _, value = header.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
                authorization = value.strip() if name.lower() == b"authorization" else authorization
            body = json.loads(await reader.readexactly(length) or b"{}")
            prompt = body.get("messages", [{"content": "models"}])[-1]["content"]
            word = prompt.split()[0]
            log.write(word + "\n")
            if not await answer(word, prompt, authorization.removeprefix(b"Bearer ").decode("latin-1"), writer):
                return
    except ConnectionError:
        pass
    finally:
        writer.close()


async def answer(word: str, prompt: str, key: str, writer: asyncio.StreamWriter) -> bool:
    """Whether the connection can be used again."""
    content, headers, status = REPLIES.get(word, chat()), "", 200
    if word == "endless":
        writer.write(b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"%x\r\n%s\r\n" % (len(LOOP), LOOP))
            await writer.drain()
    if word == "trickle":
        writer.write(b"HTTP/1.1 200 X\r\nContent-Length: 1000000\r\n\r\n")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.05)
    if word == "bomb":
        content, headers = gzip.compress(LOOP) * 600, "Content-Encoding: gzip\r\n"
    if word == "cut_off":
        writer.write(b"HTTP/1.1 200 X\r\nContent-Length: 1000\r\n\r\n{")
        return False
    if word == "no_http":
        writer.write(b"\x00\x01garbage\r\n\r\n")
        return False
    if word == "long_header":
        headers = "X-Long: " + "x" * 100_000 + "\r\n"
    if word.startswith("redirect"):
        status, headers = 307, f"Location: {prompt.split()[1]}\r\n"
    if word.startswith("retry_after"):
        status, headers = 429, f"Retry-After: {prompt.split()[1]}\r\n"
    if word.startswith("key_"):
        escaped = "".join(f"\\u{ord(letter):04x}" for letter in key)
        said = {
            "key_plain": json.dumps(key),
            "key_escaped": f'"{escaped}"',
            "key_slashes": json.dumps(key).replace("/", "\\/"),
        }
        status, content = 400, b'{"error": {"got": ' + said.get(word, '""').encode() + b"}}"
    if word == "models":
        content = json.dumps({"data": [{"id": f"model of {key}"}]}).encode()
    if word == "echo":
        message = {"content": f"<think>You sent {key}, did you?</think>"}
        content, headers = chat(message, finish=f"stop {key}", system_fingerprint=key), f"X-Key: {key}\r\n"
        content = content.replace(b'"m"', json.dumps(key).encode())
    head = f"HTTP/1.1 {status} {key}\r\n{headers}Content-Length: {len(content)}\r\n\r\n"
    writer.write(head.encode("latin-1") + content)
    await writer.drain()
    return True


class HostileServer(StubServer):
    """The server's process; a context."""

    script = __file__


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("log")
    log = open(parser.parse_args().log, "a", buffering=1)
    server = await asyncio.start_server(lambda *pair: serve(*pair, log), "127.0.0.1", 0, limit=1 << 26)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
