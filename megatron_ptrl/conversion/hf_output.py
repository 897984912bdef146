"""A checkpoint of ours -> a folder that transformers, vLLM and SGLang load, a tensor at a time, without a model.

`training.hf_export` writes the same from a model that is being trained.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ptrl.config import ConvertConfig, DataConfig, PretrainConfig, TrainConfig
from megatron_ptrl.conversion import safetensors
from megatron_ptrl.conversion.hf_config import model_fields_of, read_config
from megatron_ptrl.conversion.hf_input import DESCRIPTIONS, HF
from megatron_ptrl.conversion.safetensors import Described
from megatron_ptrl.conversion.torch_dist import Part, Reader
from megatron_ptrl.conversion.weights import Piece, pieces, sizes_of, to_hugging_face
from megatron_ptrl.data.tokenizer import Tokenizer
from megatron_ptrl.errors import InputError
from megatron_ptrl.training import checkpoint
from megatron_ptrl.training.frozen import check_vocabulary, model_of, tokenizer_of
from megatron_ptrl.training.hf_export import hf_config, write_descriptions
from megatron_ptrl.training.resume import find_source

# Beside the weights: training state, and heads that only training uses.
_NOT_OF_THE_MODEL = ("optimizer.", "mtp.")


def to_hf_folder(config: ConvertConfig, output: Path, final: Path) -> str:
    """Write the checkpoint that `config.input` names into the empty folder `output`; returns what to say of `final`.

    Raises InputError for a model that Hugging Face has no class for, and for weights that are missing or unknown.
    """
    path, notes = find_source(config.input, "input", checkpoint.newest_whole)
    manifest = checkpoint.read_manifest(path)
    tokenizer = tokenizer_of(manifest, config.tokenizer)
    check_vocabulary(path, manifest, tokenizer, "input")
    settings = manifest["settings"]
    run = PretrainConfig(
        model=model_of(manifest),
        data=DataConfig(seq_length=settings["data.seq_length"]),
        train=TrainConfig(precision=settings["train.precision"]),
    )
    described = hf_config(run, vocab_size=tokenizer.vocab_size, eod=tokenizer.eod)
    like = _like(config, path)
    if like is not None:
        described = _taken_over(like, described)
    reader = Reader(path)
    found = _pieces(run, reader, described["vocab_size"], path)
    if like is None:
        write_descriptions(described, tokenizer, output)
    else:
        _copy_descriptions(like, tokenizer, output)
    count = _write_weights(run, found, reader, described["vocab_size"], output, config.shard_bytes)
    files = sum(1 for _ in output.glob("*.safetensors"))
    return "\n".join(
        [*notes, f"{final}: {count:,} parameters of {path} as {described['architectures'][0]}, {files} file(s)"]
    )


def _like(config: ConvertConfig, path: Path) -> Path | None:
    """The folder whose descriptions are taken over: the one that is named, or that of a run that came from one."""
    if config.like is not None:
        return Path(config.like)
    beside = path.parent.parent / HF
    return beside if (beside / "config.json").is_file() else None


def _taken_over(like: Path, ours: dict[str, Any]) -> dict[str, Any]:
    """config.json of `like`. Raises InputError where it is of another model than `ours`."""
    theirs = read_config(like)
    theirs_fields = model_fields_of(theirs, like / "config.json")
    for name, value in model_fields_of(ours, like).items():
        # Dropout is a matter of the training.
        if name != "attention_dropout" and theirs_fields[name] != value:
            raise InputError(
                f"{like / 'config.json'} is of a model with {name} {theirs_fields[name]}, this checkpoint has {value}; "
                "name another folder by --like"
            )
    return theirs


def _copy_descriptions(like: Path, tokenizer: Tokenizer, output: Path) -> None:
    for name in DESCRIPTIONS:
        if (like / name).is_file():
            shutil.copyfile(like / name, output / name)
    shutil.copyfile(tokenizer.path, output / "tokenizer.json")
    for name in ("config.json", "generation_config.json"):
        _change(output / name, "eos_token_id", lambda theirs: _ends(tokenizer.eod, theirs))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        _change(output / name, "eos_token", lambda theirs: _end(tokenizer.eod_token, theirs))


def _ends(ours: int, theirs: Any) -> Any:
    """Servers stop at each of these, and pad with the first: the token that this run has learnt to end with."""
    ids = [] if theirs is None else theirs if isinstance(theirs, list) else [theirs]
    if ids[:1] == [ours]:
        return theirs
    return [ours, *(each for each in ids if each != ours)] if ids else ours


def _end(ours: str, theirs: Any) -> Any:
    # With the token's text there may be how it is found in a text.
    return theirs if (theirs.get("content") if isinstance(theirs, dict) else theirs) == ours else ours


def _change(path: Path, key: str, value_for: Callable[[Any], Any]) -> None:
    """Give `key` of a JSON file, if there is one, its new value; a file that has that value stays as it came."""
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path.name} of the model that this is to be like is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path.name} of the model that this is to be like is no JSON object")
    value = value_for(content.get(key))
    if value != content.get(key):
        path.write_text(json.dumps({**content, key: value}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _pieces(run: PretrainConfig, reader: Reader, rows: int, path: Path) -> list[tuple[Piece, Part]]:
    """Each weight of the model and its place in the checkpoint, which holds these and no others."""
    layers, sizes = run.model.num_layers, sizes_of(run.model, rows)
    padded, _ = reader.tensors.get("embedding.word_embeddings.weight", ((rows, 0), None))
    if padded[0] < rows:
        raise InputError(f"{path} has {padded[0]} rows of the embedding; expected at least {rows}")
    found = []
    for piece in pieces(run.model, sizes, padded[0]):
        shape, dtype = reader.tensors.get(piece.key, (None, torch.float32))
        part = piece.part(layers, dtype)
        if shape is None:
            raise InputError(f"{path} has no {piece.key}, which the model that it describes needs")
        if shape != part.shape:
            raise InputError(f"{path}: {piece.key} has shape {shape}; expected {part.shape}")
        found.append((piece, part))
    known = {piece.key for piece, _ in found}
    for key in reader.tensors:
        if key not in known and not key.startswith(_NOT_OF_THE_MODEL):
            raise InputError(f"{path} has {key}, which neither Llama nor Qwen has; it cannot be exported")
    return found


def _write_weights(
    run: PretrainConfig, found: list[tuple[Piece, Part]], reader: Reader, rows: int, output: Path, shard_bytes: int
) -> int:
    """Returns the number of parameters."""
    sizes = sizes_of(run.model, rows)
    described = [Described(name, shape, part.dtype) for piece, part in found for name, shape in piece.hf.items()]

    def tensors() -> Iterator[Tensor]:
        for piece, part in found:
            yield from to_hugging_face(piece, reader.read(part), sizes)

    safetensors.write(output, described, tensors(), shard_bytes)
    return sum(torch.Size(each.shape).numel() for each in described)
