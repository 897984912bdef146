"""Checkpoints from elsewhere, and for elsewhere."""

from dataclasses import dataclass
from typing import Literal

from megatron_ptrl.config.checks import require


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """A model of Hugging Face's (Llama, Qwen2, Qwen3) or a checkpoint of Megatron-LM's -> a run directory, and back."""

    input: str = ""
    """What to convert: the folder of a Hugging Face model (safetensors); a folder of Megatron-LM's checkpoints
    (torch_dist), or one of them; or a run directory of ours, or one of its checkpoints. Its files say which it is."""
    output: str = ""
    """Folder to write, which does not exist yet or is empty."""
    to: Literal["hf", "megatron_lm"] = "hf"
    """What a checkpoint of ours becomes; anything else becomes a run directory of ours."""
    tokenizer: str | None = None
    """A tokenizer.json; null for the one beside the model, or that of the checkpoint's run. Megatron-LM's checkpoints
    do not have one."""
    eod_token: str | None = None
    """End-of-document token of a model that comes from Hugging Face; null for the (first) eos_token_id of its
    config.json, and `<|endoftext|>` for Megatron-LM's."""
    seq_length: int | None = None
    """data.seq_length in the config.yaml that is written; null for what the model can read, at most 4096, or
    Megatron-LM's."""
    like: str | None = None
    """Folder of a Hugging Face model whose config.json, generation settings, chat template and rows of the vocabulary
    the output takes over; null for hf/ in the run directory, where a conversion has put them, else what follows from
    the checkpoint."""
    shard_bytes: int = 5_000_000_000
    """Largest file of weights of a Hugging Face model; a tensor that is larger has a file of its own."""

    def __post_init__(self) -> None:
        for name in ("input", "output"):
            require(bool(getattr(self, name)), f"{name} is empty; expected a folder")
        length = self.seq_length
        require(length is None or length >= 1, f"seq_length is {length}; expected >= 1")
        require(self.shard_bytes >= 1, f"shard_bytes is {self.shard_bytes}; expected >= 1")
