"""The weights that are trained -> a folder that Hugging Face, vLLM and SGLang load, under any TP and PP, without a GPU.

    every rank: what it holds  --one weight at a time, sent to the first rank-->  model.safetensors, written as it comes
    config.json, generation_config.json, tokenizer.json, tokenizer_config.json

The vocabulary loses its padding, so that the servers' probabilities are over the real tokens, as the megatron engine's.
"""

import json
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ptrl.config import ModelConfig, RunConfig
from megatron_ptrl.conversion import safetensors
from megatron_ptrl.data.tokenizer import Tokenizer
from megatron_ptrl.errors import InputError
from megatron_ptrl.training import mcore
from megatron_ptrl.training.hf_names import Sizes, Weight, find, part_names, to_hf

# Settings of a model that Llama and Qwen do not have, and what they are without it.
_NOT_IN_HF: dict[str, Any] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": "silu",
    "num_moe_experts": None,
    "multi_latent_attention": False,
    "window_size": None,
    "softmax_type": "vanilla",
    "softmax_scale": None,
    "attention_output_gate": False,
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "rotary_interleaved": False,
    "no_rope_freq": None,
    "qk_l2_norm": False,
    "qk_clip": False,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
}
# What Megatron-Core's rope scaling does not let one choose.
LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True, slots=True)
class _Held:
    """A weight of the whole model: its line of the table, its layer, and which ranks have it in the order of TP."""

    name: str
    weight: Weight
    layer: int | None
    ranks: list[int]
    shapes: list[tuple[int, ...]]
    dtype: torch.dtype


def architecture(config: RunConfig) -> str:
    """Hugging Face's class for this model. Raises InputError for one that it has no class for."""
    model = config.model
    for name, neutral in _NOT_IN_HF.items():
        value = getattr(model, name, neutral)
        if value != neutral:
            raise InputError(
                f"model.{name} is {value}, which neither Llama nor Qwen has; expected {neutral}, to write a model for "
                "servers"
            )
    if model.qk_layernorm and (model.add_bias_linear or model.add_qkv_bias):
        raise InputError(
            "model.qk_layernorm with biases is a model that Hugging Face has no class for; expected add_bias_linear "
            "and add_qkv_bias false, as in Qwen3"
        )
    if model.qk_layernorm:
        return "Qwen3ForCausalLM"
    if model.add_qkv_bias and not model.add_bias_linear:
        if model.kv_channels not in (None, model.hidden_size // model.num_attention_heads):
            raise InputError(f"model.kv_channels is {model.kv_channels} with add_qkv_bias; expected null, as in Qwen2")
        return "Qwen2ForCausalLM"
    return "LlamaForCausalLM"


def hf_config(config: RunConfig, *, vocab_size: int, eod: int) -> dict[str, Any]:
    """config.json of the model. Raises InputError as `architecture`."""
    model, name = config.model, architecture(config)
    scaling = rope_scaling(model)
    settings = {
        "architectures": [name],
        "model_type": name.removesuffix("ForCausalLM").lower(),
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": mcore.ffn_size(model),
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "head_dim": model.kv_channels or model.hidden_size // model.num_attention_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.data.seq_length,
        "rms_norm_eps": model.layernorm_epsilon,
        "rope_theta": float(model.rotary_base),  # as loaders before transformers 5 read it
        "rope_parameters": {"rope_theta": float(model.rotary_base), **(scaling or {"rope_type": "default"})},
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": eod,
        "dtype": "bfloat16" if config.train.precision == "bf16" else "float32",
    }
    if scaling:
        settings["rope_scaling"] = scaling  # as loaders before transformers 5 read it
    if name != "Qwen2ForCausalLM":
        settings["attention_bias"] = model.add_bias_linear
    if name == "LlamaForCausalLM":
        settings["mlp_bias"] = model.add_bias_linear
    return settings


def rope_scaling(model: ModelConfig) -> dict[str, Any] | None:
    """Llama 3's scaling of the rotary positions as config.json has it, None for none."""
    if model.rope_scaling_factor is None:
        return None
    return {"rope_type": "llama3", "factor": model.rope_scaling_factor, **LLAMA3_SCALING}


def export_hf(config: RunConfig, chunks: Sequence[torch.nn.Module], tokenizer: Tokenizer, folder: Path) -> None:
    """Write the model and its tokenizer into `folder`, an empty one that the first rank sees.

    To be called by all ranks of a model-parallel group; its first rank writes, and all but the first data-parallel rank
    have nothing to do. Weights keep the precision that they are trained in.
    Cost on the first rank: the largest weight twice, on the CPU and where it is trained; each rank sends what it holds.
    Raises InputError for a model that Hugging Face has no class for, and for files that cannot be written: on the first
    rank only, after the others have sent all.
    """
    settings = hf_config(config, vocab_size=tokenizer.vocab_size, eod=tokenizer.eod)
    if parallel_state.get_data_parallel_rank(with_context_parallel=True):
        return
    mine = _mine(config, chunks)
    everything = _held(mine)
    sizes = Sizes(
        settings["num_attention_heads"], settings["num_key_value_heads"], settings["head_dim"], tokenizer.vocab_size
    )
    parts = _gathered(everything, mine, sizes)
    try:
        if dist.get_rank() == parallel_state.get_model_parallel_src_rank():
            write_descriptions(settings, tokenizer, folder)
            _write_weights(folder, everything, parts, sizes)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}; the weights for the servers could not be written") from error
    finally:
        # The other ranks send all they have, and somebody has to take it.
        deque(parts, maxlen=0)


def _mine(config: RunConfig, chunks: Sequence[torch.nn.Module]) -> dict[str, Tensor]:
    """This rank's parameters by Megatron's name, with the layer's number in the whole model."""
    found = {}
    for chunk in chunks:
        model = mcore.unwrap(chunk)
        for name, parameter in model.named_parameters():
            if name.startswith("mtp."):
                continue  # heads that only training uses
            if name == "output_layer.weight" and config.model.share_embeddings_and_output_weights:
                continue  # the last stage's copy of the embedding
            known = find(name)
            if known is None:
                raise InputError(f"the model has {name}, which neither Llama nor Qwen has; it cannot be exported")
            weight, layer = known
            if layer is None:
                found[weight.name] = parameter
            else:
                number = model.decoder.layers[layer].layer_number - 1
                found[f"decoder.layers.{number}.{weight.name}"] = parameter
    return found


def _held(mine: dict[str, Tensor]) -> list[_Held]:
    """All weights of the model, in an order that all ranks of the model-parallel group agree on. One all-gather."""
    group = parallel_state.get_model_parallel_group()
    listing = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in mine.items()}
    listings: list[Any] = [None] * dist.get_world_size(group)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    dist.all_gather_object(listings, (tp_rank, dist.get_rank(), listing), group=group)
    listings.sort()
    everything = []
    for name in dict.fromkeys(name for _, _, listing in listings for name in listing):
        known = find(name)
        assert known is not None
        having = [(rank, *listing[name]) for _, rank, listing in listings if name in listing]
        if known[0].kind == "whole":
            having = having[:1]
        ranks, shapes, dtypes = zip(*having, strict=True)
        everything.append(_Held(name, *known, list(ranks), list(shapes), dtypes[0]))
    return everything


def _gathered(everything: list[_Held], mine: dict[str, Tensor], sizes: Sizes) -> Iterator[list[Tensor]]:
    """On the first rank Hugging Face's parts of each weight in turn; elsewhere nothing, but what is held is sent."""
    group, root = parallel_state.get_model_parallel_group(), parallel_state.get_model_parallel_src_rank()
    here = dist.get_rank()
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    for held in everything:
        if here != root:
            if here in held.ranks:
                dist.send(mine[held.name].detach().contiguous(), root, group=group)
            continue
        shards = []
        for rank, shape in zip(held.ranks, held.shapes, strict=True):
            shard = mine[held.name].detach() if rank == here else torch.empty(shape, dtype=held.dtype, device=device)
            if rank != here:
                dist.recv(shard, rank, group=group)
            shards.append(shard)
        yield to_hf(held.weight, shards, sizes)


def write_descriptions(settings: dict[str, Any], tokenizer: Tokenizer, folder: Path) -> None:
    """Everything but the weights: config.json with `settings`, what to generate by, the tokenizer. Raises OSError."""
    files = {
        "config.json": settings,
        "generation_config.json": {"eos_token_id": tokenizer.eod, "do_sample": True, "temperature": 1.0},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": tokenizer.eod_token,
            "clean_up_tokenization_spaces": False,
            "model_max_length": settings["max_position_embeddings"],
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    shutil.copyfile(tokenizer.path, folder / "tokenizer.json")


def _write_weights(folder: Path, everything: list[_Held], parts: Iterator[list[Tensor]], sizes: Sizes) -> None:
    described = []
    for held in everything:
        shards = [torch.empty(shape, dtype=held.dtype, device="meta") for shape in held.shapes]
        for name, part in zip(part_names(held.weight, held.layer), to_hf(held.weight, shards, sizes), strict=True):
            described.append(safetensors.Described(name, tuple(part.shape), part.dtype))
    safetensors.write(folder, described, (tensor for tensors in parts for tensor in tensors))
