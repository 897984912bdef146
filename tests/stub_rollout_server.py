"""A server that speaks SGLang's and vLLM's protocols, with a small Llama or Qwen3 that it really loads and draws from.

    python stub_rollout_server.py [--port 0]

`StubRollouts` starts one from a test and sets its fault. It has no weights until it is given some, as a server that
was started with others. Fields that the real servers need and this one would not are checked, so that a request that
they would refuse is refused here.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

FAULTS = ("stale", "stale_version", "no_ids", "wrong_version", "503", "503_once", "hang", "raw_logprobs", "nan", "400")


class StubRollouts:
    """The server's process; a context."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
        self._url: str | None = None

    @property
    def url(self) -> str:
        """Known once it listens, so that several can start together."""
        if self._url is None:
            assert self.process.stdout
            self._url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"
        return self._url

    def set(self, fault: str = "") -> dict[str, Any]:
        """Misbehave in this way from now on; returns counts of what was asked since the last call, by path."""
        return json.load(urllib.request.urlopen(f"{self.url}/fault?{fault}"))

    def kill(self) -> None:
        """As a crash would."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> "StubRollouts":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()
        assert self.process.stdout
        self.process.stdout.close()


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and the tensors of model.safetensors, fp32."""
    import torch

    content = (folder / "model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    assert header.pop("__metadata__") == {"format": "pt"}
    types = {"F32": torch.float32, "BF16": torch.bfloat16}
    tensors = {}
    for name, told in header.items():
        first, last = told["data_offsets"]
        values = torch.frombuffer(bytearray(content[begin + first : begin + last]), dtype=types[told["dtype"]])
        tensors[name] = values.view(told["shape"]).float()
    return json.loads((folder / "config.json").read_text()), tensors


def logits(config: dict[str, Any], weights: dict[str, Any], ids: list[int]) -> Any:
    """(s, v): Llama, or Qwen3 where there are norms of queries and keys."""
    import torch
    import torch.nn.functional as F

    def norm(x: Any, name: str) -> Any:
        return F.rms_norm(x, x.shape[-1:], weights[name], config["rms_norm_eps"])

    def turn(x: Any) -> Any:
        half = x.shape[-1] // 2
        angle = torch.outer(
            torch.arange(len(ids)), config["rope_parameters"]["rope_theta"] ** (-torch.arange(half) / half)
        )
        cos, sin, first, second = angle.cos(), angle.sin(), x[..., :half], x[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    hidden = weights["model.embed_tokens.weight"][torch.tensor(ids)]
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        x = norm(hidden, layer + "input_layernorm.weight")
        q, k, v = (
            (x @ weights[f"{layer}self_attn.{part}_proj.weight"].T)
            .view(len(ids), -1, config["head_dim"])
            .transpose(0, 1)
            for part in "qkv"
        )
        if layer + "self_attn.q_norm.weight" in weights:
            q, k = norm(q, layer + "self_attn.q_norm.weight"), norm(k, layer + "self_attn.k_norm.weight")
        seen = F.scaled_dot_product_attention(turn(q)[None], turn(k)[None], v[None], is_causal=True, enable_gqa=True)
        hidden = hidden + seen[0].transpose(0, 1).flatten(1) @ weights[layer + "self_attn.o_proj.weight"].T
        x = norm(hidden, layer + "post_attention_layernorm.weight")
        gate, up = (x @ weights[f"{layer}mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        hidden = hidden + (F.silu(gate) * up) @ weights[layer + "mlp.down_proj.weight"].T
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return norm(hidden, "model.norm.weight") @ weights[head].T


class Stub:
    """Both protocols on one model."""

    def __init__(self) -> None:
        self.key = ""
        self.fault, self.version, self.counts = "", "default", {}  # type: ignore[var-annotated]
        self.config: dict[str, Any] = {}
        self.weights: dict[str, Any] = {}

    def fails_once(self, fault: str) -> bool:
        once, self.fault = self.fault == fault, "" if self.fault == fault else self.fault
        return once

    def generate(self, prompt: list[int], length: int, temperature: float, top_p: float, seed: int, stops: Any) -> Any:
        """(ids, log-probabilities as drawn, reason)"""
        import torch

        draw, ids, found = torch.Generator().manual_seed(seed), [], []
        while len(ids) < length:
            values = logits(self.config, self.weights, prompt + ids)[-1]
            order = (values / max(temperature, 1e-9)).softmax(-1).sort(descending=True)
            kept = order.values.cumsum(-1) - order.values < top_p
            place = int(torch.multinomial(order.values * kept, 1, generator=draw))
            chosen = int(order.indices[place])
            drawn = (order.values * kept / (order.values * kept).sum()).log()[place]
            found.append(float(values.log_softmax(-1)[chosen] if self.fault == "raw_logprobs" else drawn))
            ids.append(chosen)
            if chosen in stops:
                return ids, found, "stop"
        return ids, [float("nan")] * length if self.fault == "nan" else found, "length"

    def score(self, ids: list[int]) -> list[float]:
        import torch

        values = logits(self.config, self.weights, ids)[:-1].log_softmax(-1)
        return values.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()

    def take(self, folder: str, version: str | None) -> None:
        if self.fault != "stale":
            self.config, self.weights = load(Path(folder))
        if version is not None and self.fault != "stale_version":
            self.version = version

    async def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON."""
        if path.startswith("/fault"):
            self.fault = path.partition("?")[2]
            counts, self.counts = self.counts, {}
            return 200, counts
        self.counts[path] = self.counts.get(path, 0) + 1
        if path == "/update_weights_from_disk":
            self.take(body["model_path"], body["weight_version"])
            return 200, {"success": True, "message": "ok", "num_paused_requests": 0}
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            self.take(body["kwargs"]["weights_path"], None)
            return 200, {"results": [None]}
        if path == "/reset_prefix_cache":
            return 200, {"success": True}
        if path == "/update_weight_version":
            self.version = self.version if self.fault == "stale_version" else body["new_version"]
            return 200, {"success": True, "new_version": body["new_version"]}
        if path == "/weight_info":
            return 200, {"weight_version": self.version}
        if self.fault == "hang":
            await asyncio.sleep(3600)
        if self.fault == "503" or self.fails_once("503_once"):
            return 503, {"error": "busy"}
        if self.fault == "400":
            return 400, {"error": {"message": f"max_tokens is too large for {self.key}"}}
        return 200, self.sglang(body) if path == "/generate" else self.vllm(body)

    def sglang(self, body: dict[str, Any]) -> dict[str, Any]:
        asked = body["sampling_params"]
        assert asked.get("ignore_eos") is not True, "it would ignore stop_token_ids too"
        meta: dict[str, Any] = {"weight_version": "old" if self.fault == "wrong_version" else self.version}
        if not self.weights:
            return {"output_ids": [0], "meta_info": meta}
        length, prompt = asked["max_new_tokens"], body["input_ids"]
        if length and body.get("return_logprob"):
            ids, found, reason = self.generate(
                prompt, length, asked["temperature"], asked["top_p"], asked["sampling_seed"], asked["stop_token_ids"]
            )
            told = [[value, token, None] for token, value in zip(ids, found, strict=True)]
            meta |= {"finish_reason": {"type": reason}, "output_token_logprobs": told}
        if body.get("logprob_start_len") == 0:
            scores = [None, *self.score(prompt)]
            meta |= {"input_token_logprobs": [[s, t, None] for s, t in zip(scores, prompt, strict=True)]}
        if self.fault == "no_ids":
            meta.pop("output_token_logprobs", None)
        return {"text": "", "meta_info": meta}

    def vllm(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt, choice = body["prompt"], {"index": 0, "text": "", "finish_reason": "length"}
        if body.get("prompt_logprobs") is not None:
            told = [{str(t): {"logprob": s, "rank": 1}} for t, s in zip(prompt[1:], self.score(prompt), strict=True)]
            choice["prompt_logprobs"] = [None, *told]
        else:
            assert body["ignore_eos"] and body["logprobs"] == 0
            ids, found, choice["finish_reason"] = self.generate(
                prompt,
                body["max_tokens"],
                body["temperature"],
                body["top_p"],
                body["seed"],
                body["stop_token_ids"],
            )
            choice |= {"token_ids": ids, "logprobs": {"token_logprobs": found}}
            if self.fault == "no_ids":
                choice["token_ids"] = None
        return {"object": "text_completion", "choices": [choice]}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The requests of one connection."""
        try:
            while line := await reader.readline():
                length = 0
                while (header := await reader.readline()) not in (b"\r\n", b""):
                    name, _, value = header.decode().partition(":")
                    length = int(value) if name.lower() == "content-length" else length
                    self.key = value.strip() if name.lower() == "authorization" else self.key
                content = await reader.readexactly(length)
                status, said = await self.answer(line.split()[1].decode(), json.loads(content or b"{}"))
                text = json.dumps(said).encode()
                writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


async def main() -> None:
    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    server = await asyncio.start_server(Stub().serve, "127.0.0.1", parser.parse_args().port, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
