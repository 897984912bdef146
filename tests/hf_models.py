"""Tiny models made by transformers on the spot, with weights, biases and norms that are not those of new ones."""

import shutil
from pathlib import Path
from typing import Any

import torch

# Random weights of this size give logits that differ by more than one from token to token.
STD = 0.2
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "tied llama": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama 3": ("Llama", {"tie_word_embeddings": False, "rope_parameters": LLAMA3, "max_position_embeddings": 131072}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": False, "head_dim": 24}),
}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}


def make(folder: Path, name: str, tokenizer: str, *, vocab_size: int = 520, **changed: Any) -> Any:
    """The model `name` of `MODELS`, saved in `folder` with a copy of the tokenizer; more rows than tokens."""
    import transformers

    kind, settings = MODELS[name]
    save = {key: changed.pop(key) for key in ("dtype", "max_shard_size") if key in changed}
    config = getattr(transformers, f"{kind}Config")(
        **{**SIZES, "vocab_size": vocab_size, "eos_token_id": 0, **settings, **changed}
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter) * STD
            parameter.copy_(noise + (1 if parameter.dim() == 1 else 0))
    model = model.to(save.pop("dtype", torch.float32))
    model.save_pretrained(folder, **save)
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    return model


def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """(s, v) for tokens (s,)."""
    with torch.no_grad():
        return model(tokens[None]).logits[0].float()
