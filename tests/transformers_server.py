"""`transformers serve` in a process of its own, on a model of eight thousand parameters that writes a few words.

The files are what `save_pretrained` would leave; made by hand, they spare the test the seconds that its import takes.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import safetensors.torch
import tokenizers
import torch

from megatron_ptrl.data.tokenizer import train_tokenizer

WORDS = " so the sum is one and two or three".split(" ")[1:]
END = "</think>"
# As in newer reasoning models the opening tag is in the prompt, and the server tells thinking and answer apart.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "assistant: {% if thinks %}<think>{% endif %}"
)
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "assistant: ",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": END, "content": "text"},
        "content": {"content": "text"},
    },
}
HIDDEN, INNER, HEADS = 8, 16, 2
START_SECONDS = 120.0


def make_model(folder: Path) -> tokenizers.Tokenizer:
    """A Llama with random weights; its generation settings leave it no tokens but WORDS and, behind one, the tag."""
    folder.mkdir()
    train_tokenizer([" " + " ".join(WORDS)] * 9, folder / "tokenizer.json", 300)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([END])
    tokenizer.save(str(folder / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    written = {tokenizer.token_to_id(END), *(tokenizer.encode(" " + word).ids[0] for word in WORDS)}
    assert len(written) == len(WORDS) + 1
    settings = {
        "config": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "float32",
            "vocab_size": size,
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "num_hidden_layers": 1,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        # Without do_sample, temperature and seed would do nothing.
        "generation_config": {
            "do_sample": True,
            "suppress_tokens": [i for i in range(size) if i not in written],
            "begin_suppress_tokens": [tokenizer.token_to_id(END)],
        },
        "tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast", "response_template": RESPONSE_TEMPLATE},
    }
    for name, content in settings.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    shapes = {
        "model.embed_tokens.weight": (size, HIDDEN),
        **{f"model.layers.0.self_attn.{x}_proj.weight": (HIDDEN, HIDDEN) for x in "qkvo"},
        "model.layers.0.mlp.gate_proj.weight": (INNER, HIDDEN),
        "model.layers.0.mlp.up_proj.weight": (INNER, HIDDEN),
        "model.layers.0.mlp.down_proj.weight": (HIDDEN, INNER),
        "lm_head.weight": (size, HIDDEN),
    }
    random = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=random) / HIDDEN**0.5 for name, shape in shapes.items()}
    norms = ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm")
    weights |= {f"model.{name}.weight": torch.ones(HIDDEN) for name in norms}
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return tokenizer


class TransformersServer:
    """The server's process, ready; a context. It has no cache and may not look for anything outside this machine."""

    def __init__(self, folder: Path) -> None:
        self.model = str(folder / "model")
        self.tokenizer = make_model(folder / "model")
        self._log = folder / "log"
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", self.model, "--device", "cpu"]
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", "0"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **offline},
            )
        try:
            # Uvicorn says so once it listens. /v1/models lists the cache instead of the model, and fails without one.
            self.url = f"http://127.0.0.1:{self._wait_for(r'running on http://127.0.0.1:([0-9]+)')}/v1"
        except BaseException:
            self.close()
            raise

    def _wait_for(self, pattern: str) -> str:
        deadline = time.monotonic() + START_SECONDS
        while not (found := re.search(pattern, self.log())):
            assert self._process.poll() is None and time.monotonic() < deadline, self.log()
            time.sleep(0.05)
        return found[1]

    def log(self) -> str:
        """What the server has printed."""
        return self._log.read_text(errors="replace")

    def close(self) -> None:
        """End the process, by its own means if it can."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> "TransformersServer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
