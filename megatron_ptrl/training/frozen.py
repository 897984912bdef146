"""A finished run's checkpoint -> the settings and the weights of its model, to be run forward only.

What a checkpoint says of its model is all that is needed; how its run shared the model among ranks does not matter.
"""

import json
from pathlib import Path
from typing import Any

import torch

from megatron_ptrl.cli import parse
from megatron_ptrl.config import ModelConfig, PretrainConfig, RunConfig
from megatron_ptrl.data.indexed import load_blend
from megatron_ptrl.data.tokenizer import DEFAULT_EOD, Tokenizer
from megatron_ptrl.errors import InputError
from megatron_ptrl.training import checkpoint, mcore

# How that run cut its layers into pipeline stages, and heads that only training uses.
_OF_ITS_RUN = (
    "pipeline_model_parallel_layout",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "mtp_num_layers",
)


def model_of(manifest: dict[str, Any]) -> ModelConfig:
    """The model that a checkpoint's manifest describes."""
    fields = {name: value for name, value in manifest["model"].items() if name not in _OF_ITS_RUN}
    words = [f"--model.{name}={_word(value)}" for name, value in fields.items()]
    return parse(PretrainConfig, words, prog="ptrl").model


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def tokenizer_of(manifest: dict[str, Any], named: str | None) -> Tokenizer:
    """The tokenizer file that is named, or that of the run of a checkpoint's manifest.

    Raises InputError where it is not there.
    """
    settings = manifest["settings"]
    named = named or settings.get("data.tokenizer")
    if named is None and settings.get("data.train"):
        named = load_blend(settings["data.train"])[0][1] + ".tokenizer.json"
    if named is None or not Path(named).is_file():
        raise InputError(f"the tokenizer of the checkpoint's run, {named}, is not there; name it by tokenizer")
    return Tokenizer(named, settings.get("data.eod_token") or DEFAULT_EOD)


def check_vocabulary(path: Path, manifest: dict[str, Any], tokenizer: Tokenizer, field: str) -> None:
    """InputError unless the model of the checkpoint at `path`, which `field` named, knows this tokenizer's ids."""
    if manifest["tokenizer"] != tokenizer.sha256:
        raise InputError(
            f"{field}: {path} was trained with another tokenizer (sha256 {manifest['tokenizer'][:12]}, vocabulary "
            f"{manifest['vocab_size']}) than {tokenizer.path} (sha256 {tokenizer.sha256[:12]}, vocabulary "
            f"{tokenizer.vocab_size}) of the data; tokenize the data with that one, by --tokenizer"
        )


def check_padding(path: Path, manifest: dict[str, Any], config: RunConfig, field: str) -> None:
    """InputError where `config`'s layout pads the vocabulary to another size than the checkpoint's at `path` did.

    The padding is in the softmax: columns that no training has seen would change every probability.
    """
    vocab_size, trained, tp = manifest["vocab_size"], manifest["layout"]["tp"], config.parallel.tp
    before, here = (mcore.padded_vocab_size(vocab_size, config.model, each) for each in (trained, tp))
    if before != here:
        raise InputError(
            f"{field}: {path} has its vocabulary of {vocab_size} padded to {before}, and parallel.tp {tp} would pad it "
            f"to {here}, which changes every probability; use a parallel.tp that divides {before}"
        )


def load_frozen_model(config: RunConfig, path: Path, vocab_size: int) -> list[torch.nn.Module]:
    """The chunks of `config.model` on this rank with the weights of the checkpoint. Collective over all ranks."""
    chunks = mcore.build_frozen_model(config, vocab_size)
    checkpoint.load_weights(path, chunks)
    return chunks
