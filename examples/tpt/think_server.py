"""A server that speaks OpenAI's chat API and thinks by rule: what stands behind the seam where a language model would.

    python think_server.py [--port 0]

Prints its URL when it is ready. The seed of a request decides its wording, so that the same request gets the same
reply. A document without two numbers gets a reply without thinking, which `ptrl think` puts aside.
"""

import argparse
import json
import random
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from sums import think

MODEL = "sums-by-rule"


def complete(request: dict[str, Any]) -> dict[str, Any]:
    """The reply to a chat completion, its thinking told apart as servers of reasoning models do."""
    prompt = request["messages"][-1]["content"]
    thinking = think(prompt, random.Random(request.get("seed", 0)))
    message = {"role": "assistant", "content": "", "reasoning_content": thinking}
    usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len((thinking or "").split())}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"object": "chat.completion", "model": MODEL, "choices": [choice], "usage": usage}


class Handler(BaseHTTPRequestHandler):
    """POST /v1/chat/completions and GET /v1/models, over connections that stay open."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(complete(json.loads(body)))

    def _answer(self, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None: ...


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="0 for a free one")
    server = ThreadingHTTPServer(("127.0.0.1", parser.parse_args().port), Handler)
    print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
