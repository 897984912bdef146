"""`ptrl think`'s first stage against a bare asyncio client: documents a second with 64 requests in flight.

    python benchmarks/think_rate.py [--documents 6000] [--rounds 3] [--output FILE.json]

The server, a process of its own, answers each request in 20 ms with the same bytes. The bare client sends requests made
beforehand, over the same HTTP library, and drops the replies; the stage reads the corpus, fills prompts, takes the
thinking out of the replies and keeps a journal. Both in turn, medians of the rates.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

import aiohttp

from megatron_ptrl.config import ServerConfig, ThinkConfig
from megatron_ptrl.data.input_parts import InputFile
from megatron_ptrl.thinking.generate_stage import Think
from megatron_ptrl.thinking.generators import make_generator
from megatron_ptrl.thinking.journal import Journal
from megatron_ptrl.thinking.prompts import load_template, make_cut

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


def main() -> None:
    """Print a table and, when asked, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=6000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert server.stdout
    url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
    rates: dict[str, list[float]] = {"bare client": [], "ptrl think": []}
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "in.jsonl"
            lines = (json.dumps({"id": f"d{i}", "text": TEXT, "domain": "web"}) for i in range(arguments.documents))
            source.write_text("".join(line + "\n" for line in lines))
            for number in range(arguments.rounds):
                rates["bare client"].append(arguments.documents / asyncio.run(bare(url, arguments.documents)))
                seconds = asyncio.run(stage(url, source, Path(folder) / str(number)))
                rates["ptrl think"].append(arguments.documents / seconds)
    finally:
        server.kill()
    medians = {name: statistics.median(found) for name, found in rates.items()}
    share = statistics.median(b / a for a, b in zip(*rates.values(), strict=True))
    print(f"# {platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}")
    print(f"# {arguments.documents:,} documents, {IN_FLIGHT} in flight, a server that takes 20 ms, one process each")
    print("client\tdocuments/s\tof the bare client's")
    for name, rate in medians.items():
        print(f"{name}\t{rate:,.0f}\t{share if name == 'ptrl think' else 1:.0%}")
    if arguments.output:
        figures = {"date": datetime.now(timezone.utc).isoformat(), "rates": rates, "medians": medians, "share": share}
        arguments.output.write_text(json.dumps({**figures, "documents": arguments.documents}, indent=1) + "\n")


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
        await think.run((InputFile(str(source), source.name, source.stat().st_size),), journal)
        journal.publish()
    seconds = time.perf_counter() - start
    await generator.close()
    return seconds


if __name__ == "__main__":
    main()
