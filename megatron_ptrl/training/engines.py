"""`rollout.engine` -> the engine of a run or an evaluation, with its model's own chunks behind it."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_ptrl.config import EngineConfig, RunConfig
from megatron_ptrl.data.tokenizer import Tokenizer
from megatron_ptrl.errors import InputError
from megatron_ptrl.rollout.engine import RolloutEngine
from megatron_ptrl.rollout.megatron_engine import MegatronEngine, check_can_generate
from megatron_ptrl.training.generate import window_logits
from megatron_ptrl.training.hf_export import architecture


def check_engine(config: RunConfig, rollout: EngineConfig) -> None:
    """InputError where `rollout.engine` cannot answer for this model or layout, before anything is built."""
    if rollout.engine == "megatron":
        check_can_generate(config)
    else:
        architecture(config)


def make_engine(
    config: RunConfig,
    rollout: EngineConfig,
    chunks: list[Any],
    tokenizer: Tokenizer,
    *,
    probe_ids: list[int],
    folder: Path,
    trains: bool,
) -> RolloutEngine:
    """The engine of `chunks`, which are `config`'s.

    probe_ids: tokens of a prompt, by which servers are held against the trainer   folder: the default for their weights
    trains: on the responses, so that their log-probabilities have to be those they were drawn with
    """
    vocab_size, eod = tokenizer.vocab_size, tokenizer.eod
    if rollout.engine == "megatron":
        return MegatronEngine(config, chunks, eod=eod, vocab_size=vocab_size, batch=rollout.batch)
    try:
        from megatron_ptrl.rollout.http_engine import HttpEngine
    except ModuleNotFoundError as error:
        raise InputError(
            f"rollout.engine {rollout.engine} needs {error.name}; pip install megatron-ptrl[rl]"
        ) from error
    from megatron_ptrl.rollout.sglang import SGLang
    from megatron_ptrl.rollout.vllm import VLLM

    return HttpEngine(
        SGLang() if rollout.engine == "sglang" else VLLM(),
        rollout.servers,
        rollout.server,
        window=config.data.seq_length,
        eod=eod,
        vocab_size=vocab_size,
        weights=Path(rollout.server.weights or folder / "weights"),
        probe_ids=probe_ids,
        score=partial(trainers_logprobs, config, chunks, vocab_size),
        trains=trains,
    )


def trainers_logprobs(config: RunConfig, chunks: list[Any], vocab_size: int, ids: list[int]) -> list[float]:
    """log-probabilities of all of `ids` but the first, over the real tokens, in nats, on every rank. Collective.

    Cost: a forward pass over a window, and len(ids) x v logits on every rank.
    """
    logits = window_logits(config, chunks, ids, range(len(ids) - 1))[:, :vocab_size]
    labels = torch.tensor(ids[1:], device=logits.device)[:, None]
    return logits.double().log_softmax(-1).gather(1, labels)[:, 0].tolist()
