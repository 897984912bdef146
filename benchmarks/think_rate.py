"""`ptrl think`'s first stage against a bare asyncio client: documents a second with 64 requests in flight.

The server, a process of its own, answers each request in 20 ms with the same bytes. The bare client sends requests made
beforehand, over the same HTTP library, and drops the replies; the stage reads the corpus, fills prompts, takes the
thinking out of the replies and keeps a journal. One process each, in turn.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp

from megatron_ptrl.config import ServerConfig, ThinkConfig
from megatron_ptrl.data.input_parts import InputFile
from megatron_ptrl.thinking.generate_stage import Think
from megatron_ptrl.thinking.generators import make_generator
from megatron_ptrl.thinking.journal import Journal
from megatron_ptrl.thinking.prompts import load_template, make_cut

BARE, OURS = "bare client", "ptrl think"
IN_FLIGHT = 64
TEXT = "some words of a document that is not very long, as they are on the web. " * 30

SERVER = r"""
import asyncio, json
CONTENT = json.dumps({"model": "m", "choices": [{"index": 0, "finish_reason": "stop", "message": {
    "role": "assistant", "content": None, "reasoning_content": "a thought, " * 100}}],
    "usage": {"prompt_tokens": 500, "completion_tokens": 300}}).encode()
REPLY = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(CONTENT) + CONTENT
class Server(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport, self.left, self.head = transport, 0, b""
    def data_received(self, data):
        while data:
            if self.left == 0:
                self.head += data
                head, end, data = self.head.partition(b"\r\n\r\n")
                if not end:
                    return
                self.head = b""
                self.left = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            taken = min(self.left, len(data))
            self.left, data = self.left - taken, data[taken:]
            if self.left == 0:
                asyncio.get_running_loop().call_later(0.02, self.transport.write, REPLY)
async def main():
    server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


@contextmanager
def answering() -> Iterator[str]:
    """The URL of a running server."""
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert server.stdout
    try:
        yield f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def measure(documents: int, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Of each round, for either client, documents a second and microseconds of processor time for a document."""
    results: dict[str, list[dict[str, float]]] = {BARE: [], OURS: []}
    with tempfile.TemporaryDirectory() as folder, answering() as url:
        source = Path(folder) / "in.jsonl"
        lines = (json.dumps({"id": f"d{i}", "text": TEXT, "domain": "web"}) for i in range(documents))
        source.write_text("".join(line + "\n" for line in lines))
        for number in range(rounds):
            results[BARE].append(timed(bare(url, documents), documents))
            results[OURS].append(timed(stage(url, source, Path(folder) / str(number)), documents))
    return results


def timed(client: Coroutine[None, None, float], documents: int) -> dict[str, float]:
    """What a client, which tells its seconds, took."""
    begin = time.process_time()
    seconds = asyncio.run(client)
    cpu = time.process_time() - begin
    return {"documents/s": documents / seconds, "us/document": cpu / documents * 1e6}


async def bare(url: str, documents: int) -> float:
    """Seconds for as many requests over aiohttp."""
    messages = load_template("default").messages(TEXT, {}, make_cut(2048, None), 0)
    payload = json.dumps({"model": "m", "messages": messages, "max_tokens": 8192, "seed": 0}).encode()
    left = iter(range(documents))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def work() -> None:
            for _ in left:
                async with session.post(url + "/chat/completions", data=payload) as response:
                    await response.read()

        start = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))
        return time.perf_counter() - start


async def stage(url: str, source: Path, output: Path) -> float:
    """Seconds for one part, from reading it to its finished files."""
    config = ThinkConfig(output=str(output), servers=[url], server=ServerConfig(model="m", in_flight=IN_FLIGHT))
    generator, tasks = make_generator(config)
    think = Think(config, load_template(config.prompt), make_cut(config.prompt_tokens, None), generator, tasks)
    start = time.perf_counter()
    with Journal(output, 0) as journal:
        journal.publish(await think.run((InputFile(str(source), source.name, source.stat().st_size),), journal))
    seconds = time.perf_counter() - start
    await generator.close()
    return seconds
