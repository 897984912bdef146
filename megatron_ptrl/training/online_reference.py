"""A frozen second model that goes over the microbatches of a step before the model that is trained.

remit.reference -> find_reference -> OnlineReference --score--> the same microbatches, with its log-probabilities

It shares the ranks, the pipeline schedule and the data's settings with the training run and brings its own model
config and precision. Without gradients, optimizer, dropout or multi-token-prediction heads.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from megatron_ptrl.config import LossConfig, PretrainConfig, RemitConfig
from megatron_ptrl.data.batches import Batch
from megatron_ptrl.data.tokenizer import Tokenizer
from megatron_ptrl.errors import InputError
from megatron_ptrl.losses.reward_shaped_ce import TokenStats
from megatron_ptrl.training import checkpoint, layers, loop, mcore
from megatron_ptrl.training.frozen import check_padding, check_vocabulary, load_frozen_model, model_of
from megatron_ptrl.training.layout import check_layout
from megatron_ptrl.training.mcore import RewardShapedGPTModel
from megatron_ptrl.training.resume import find_source
from megatron_ptrl.training.weighting import ONLINE

MANIFEST_KEY = "reference"
"""Under which a checkpoint of the run says which checkpoint the reference is."""


def find_reference(
    config: PretrainConfig,
    tokenizer: Tokenizer,
    world_size: int,
    find: Callable[[Path], checkpoint.Found] = checkpoint.newest_whole,
) -> tuple[Path, PretrainConfig, list[str]]:
    """(checkpoint, config of the reference in this run's layout, notes) of `remit.reference`; builds nothing.

    A run that continues keeps to the checkpoint that it has had, while the reference's own run may have gone on.

    find: `checkpoint.find_on_rank_0` where the ranks must agree
    Raises InputError when there is no whole checkpoint, it has another tokenizer, or the layout does not fit it.
    """
    path, notes = _find_checkpoint(config, find)
    manifest = checkpoint.read_manifest(path)
    check_vocabulary(path, manifest, tokenizer, "remit.reference")
    reference = _reference_config(config, manifest)
    check_padding(path, manifest, reference, "remit.reference")
    try:
        check_layout(reference, world_size)
        layers.check_supported(reference)
        mcore.transformer_config(reference)
    except InputError as error:
        raise InputError(f"remit.reference {path} in the layout of this run: {error}") from error
    return path, reference, notes


def _find_checkpoint(config: PretrainConfig, find: Callable[[Path], checkpoint.Found]) -> tuple[Path, list[str]]:
    load = cast(str, config.remit.reference)
    begun = find(Path(config.run_dir) / "checkpoints").path
    manifest = checkpoint.read_manifest(begun) if begun else {"settings": {}}
    had = manifest.get(MANIFEST_KEY) if manifest["settings"].get("remit.reference") == load else None
    if had is not None and find(Path(had)).path:
        return Path(had), [f"the weights of tokens come from {had}"]
    path, notes = find_source(load, "remit.reference", find)
    gone = [f"{had} gave the weights of tokens so far and is gone"] if had is not None else []
    return path, [*gone, *notes, f"the weights of tokens come from {path}"]


def _reference_config(config: PretrainConfig, manifest: dict[str, Any]) -> PretrainConfig:
    model, parallel = model_of(manifest), config.parallel
    if not getattr(model, "num_moe_experts", None):
        parallel = dataclasses.replace(parallel, ep=1, etp=None)
    return dataclasses.replace(
        config,
        model=model,
        parallel=parallel,
        # Nothing ranks here; the head of one is the cheapest.
        loss=LossConfig(impl=config.loss.impl, chunk_tokens=config.loss.chunk_tokens, top_k=1),
        train=dataclasses.replace(config.train, precision=manifest["settings"]["train.precision"]),
        remit=RemitConfig(),
    )


class OnlineReference:
    """A model that is only run forward, on the microbatches of another.

    config: its own, in the layout of the run     chunks: those of this rank, in eval mode
    Cost: its weights in its own precision, in the CPU's memory between its passes with `offload`, and a forward pass a
    step.
    """

    def __init__(self, config: PretrainConfig, chunks: list[torch.nn.Module], *, offload: bool = False) -> None:
        self._config, self._chunks = config, chunks
        for chunk in chunks:
            chunk.requires_grad_(False)
        self._stored = self._store() if offload else []

    @classmethod
    def load(
        cls, config: PretrainConfig, tokenizer: Tokenizer, world_size: int
    ) -> tuple["OnlineReference", Path, list[str]]:
        """The model of `remit.reference`, its checkpoint, notes for the log; seeds the random state anew at the end.

        Collective over all ranks. Raises InputError as `find_reference` does.
        """
        path, its_config, notes = find_reference(config, tokenizer, world_size, checkpoint.find_on_rank_0)
        chunks = load_frozen_model(its_config, path, tokenizer.vocab_size)
        mcore.seed(config)
        return cls(its_config, chunks, offload=config.remit.offload_reference), path, notes

    def score(self, batches: Iterator[Batch], num_microbatches: int) -> Iterator[Batch]:
        """The next `num_microbatches` batches, on the last stage with the log-probabilities of their labels.

        Each batch is read once and then used twice. Collective over the ranks of the model; draws no random numbers.
        """
        step = list(islice(batches, num_microbatches))
        for parameter, stored in self._stored:
            parameter.data = stored.cuda(non_blocking=True)
        with torch.no_grad():
            loop.run_schedule(
                self._config, self._chunks, _forward_step, iter(step), num_microbatches, forward_only=True, collect=True
            )
        for parameter, stored in self._stored:
            parameter.data = stored
        return iter(step)

    def _store(self) -> list[tuple[Tensor, Tensor]]:
        """Every weight, and its copy in the CPU's memory, which it lives in from now on."""
        stored: list[tuple[Tensor, Tensor]] = []
        for parameter in (p for chunk in self._chunks for p in chunk.parameters()):
            copy = parameter.data.cpu()
            parameter.data = copy.pin_memory() if torch.cuda.is_available() else copy
            stored.append((parameter, parameter.data))
        return stored


def _forward_step(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Any]:
    batch = next(batches)
    return loop.forward(model, loop.on_this_rank(batch)), partial(_keep, batch, mcore.unwrap(model))


def _keep(batch: Batch, model: RewardShapedGPTModel, loss: Tensor, non_loss_data: bool) -> None:
    """Into the batch itself, which the trained model gets next."""
    batch[ONLINE] = cast(TokenStats, model.token_stats).logprob.t().contiguous()
    model.token_stats = None
