"""One step of a case on a toy model: the collective calls it makes, and those that the formulas say it makes."""

import contextlib
import dataclasses
import functools
import signal
from collections.abc import Iterator
from typing import Any

from megatron_ptrl.training import host

host.install_if_no_cuda()

import numpy  # noqa: E402
import torch  # noqa: E402
from collective_calls import Calls, merged  # noqa: E402
from collective_cases import Case  # noqa: E402

from megatron_ptrl.cli import parse  # noqa: E402
from megatron_ptrl.config import (  # noqa: E402
    DataConfig,
    LossConfig,
    ModelConfig,
    PaceConfig,
    ParallelConfig,
    PretrainConfig,
    RLConfig,
    RolloutConfig,
    TrainConfig,
)
from megatron_ptrl.config.rl import PromptRowsConfig  # noqa: E402
from megatron_ptrl.data.rollouts import TrainedResponse, microbatches  # noqa: E402
from megatron_ptrl.data.windows import Windows  # noqa: E402
from megatron_ptrl.rollout.engine import Request  # noqa: E402
from megatron_ptrl.rollout.megatron_engine import MegatronEngine  # noqa: E402
from megatron_ptrl.training import collectives as formulas  # noqa: E402
from megatron_ptrl.training import loop, mcore, policy_step  # noqa: E402
from megatron_ptrl.training.collectives import Collective  # noqa: E402
from megatron_ptrl.training.layout import Layout, check_layout  # noqa: E402
from megatron_ptrl.training.online_reference import OnlineReference  # noqa: E402
from megatron_ptrl.training.optimizer import build_optimizer  # noqa: E402
from megatron_ptrl.training.scorer import Scorer  # noqa: E402
from megatron_ptrl.training.signals import Signals  # noqa: E402
from megatron_ptrl.training.weighting import TokenWeighting  # noqa: E402

VOCAB, SEQ_LENGTH, ROWS, TOKENS = 512, 32, 2, 5
# Parameters of 128, 64 or a multiple of both, so that the padding in Megatron-Core's buffers is that of its end alone.
MODEL = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 64}


def counted(rank: int, world_size: int, case: Case) -> dict[str, list[Collective]]:
    """What was `counted` on this rank and what is `expected`, both sorted. Needs the default process group."""
    config = _config(case)
    mcore.initialize(config)
    layout = check_layout(config, world_size)
    run = {"pretrain": _pretrain, "score": _score, "rl": _reinforce, "generate": _generate}[case.stage]
    with _signals_kept():
        calls, expected = run(config, layout, case)
    mcore.parallel_state.destroy_model_parallel()
    return {"counted": merged(calls.seen), "expected": merged(expected)}


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@functools.cache
def _any_model() -> ModelConfig:
    """With the fields of Megatron-Core, which only parsing brings."""
    return parse(PretrainConfig, [], prog="ptrl pretrain").model


def _config(case: Case) -> Any:
    model = {**MODEL, "ffn_hidden_size": 128, "share_embeddings_and_output_weights": case.tied, **case.model}
    settings = {
        "model": dataclasses.replace(_any_model(), **model),
        "parallel": ParallelConfig(**case.parallel),
    }
    if case.stage in ("rl", "generate"):
        return RLConfig(
            **settings,
            data=PromptRowsConfig(seq_length=SEQ_LENGTH),
            train=PaceConfig(micro_batch=ROWS, precision=case.precision),
            rollout=RolloutConfig(max_tokens=TOKENS),
        )
    train = TrainConfig(global_batch=4 * ROWS, micro_batch=ROWS, precision=case.precision)
    data, loss = DataConfig(seq_length=SEQ_LENGTH), case.loss
    if case.stage == "score":
        data, loss = DataConfig(seq_length=SEQ_LENGTH, isolate_documents=True), LossConfig(top_k=1)
    return PretrainConfig(**settings, data=data, loss=loss, train=train, remit=case.remit)


def _sizes(config: Any, layout: Layout, stage: formulas.Stage) -> formulas.Sizes:
    place = mcore.parallel_state.get_pipeline_model_parallel_rank()
    ffn = mcore.ffn_size(config.model)
    return formulas.sizes_of(config, layout, VOCAB, ffn, stage=stage, place=place)


def _pretrain(config: Any, layout: Layout, case: Case) -> tuple[Calls, list[Collective]]:
    m, remit = layout.num_microbatches, config.remit
    expected = formulas.collectives(_sizes(config, layout, "pretrain"), formulas.parts("pretrain", config))
    reference = None
    if remit.online:
        model = ModelConfig(**{**MODEL, "num_layers": 2, "hidden_size": 128}, ffn_hidden_size=128)
        its = PretrainConfig(
            model=model, parallel=config.parallel, data=config.data, train=config.train, loss=LossConfig(top_k=1)
        )
        expected += formulas.collectives(_sizes(its, layout, "score"), formulas.parts("score", its), forward_only=True)
        reference = OnlineReference(its, mcore.build_frozen_model(its, VOCAB))
    chunks = mcore.build_model(config, VOCAB)
    optimizer, signals = build_optimizer(config, chunks), Signals()
    weighting = TokenWeighting(remit) if remit.weighting != "none" else None
    batch = _batch(config)
    with Calls() as calls:
        batches: Any = iter([dict(batch) for _ in range(m)])
        if reference:
            batches = reference.score(batches, m)
        loop.train_step(config, chunks, optimizer, batches, m, weighting)
        signals.agree()
    return calls, expected


def _batch(config: Any) -> dict[str, Any]:
    shape = (ROWS, SEQ_LENGTH)
    generator = torch.Generator().manual_seed(1)
    batch = {
        "tokens": torch.randint(VOCAB, shape, generator=generator),
        "labels": torch.randint(VOCAB, shape, generator=generator),
        "loss_mask": torch.ones(shape),
        "position_ids": torch.arange(SEQ_LENGTH).expand(shape).contiguous(),
        "attention_mask": None,
    }
    if config.remit.sidecar:
        batch["reference_logprob"] = -10 * torch.rand(shape, generator=generator)
        batch["document_ids"] = (batch["position_ids"] // 8).contiguous()
    return batch


class _Documents:
    """Random tokens."""

    path_prefix = "random"

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> numpy.ndarray:
        assert length is not None
        return numpy.random.default_rng(idx).integers(VOCAB, size=length)


def _score(config: Any, layout: Layout, case: Case) -> tuple[Calls, list[Collective]]:
    chunks = mcore.build_frozen_model(config, VOCAB)
    windows = Windows(numpy.full(4 * ROWS, SEQ_LENGTH), window=SEQ_LENGTH, overlap=SEQ_LENGTH // 2, chunk=10**6)
    scorer = Scorer(config, chunks, _Documents(), windows)
    scorer.score_first_tokens(0, VOCAB)
    packed = scorer.pack(0)
    m = scorer.num_microbatches(packed)
    with Calls() as calls:
        scorer.score(packed, m)
    layout = Layout(layout.world_size, layout.dp, m)
    expected = formulas.collectives(_sizes(config, layout, "score"), formulas.parts("score", config), forward_only=True)
    return calls, expected


def _reinforce(config: Any, layout: Layout, case: Case) -> tuple[Calls, list[Collective]]:
    chunks = mcore.build_model(config, VOCAB)
    optimizer, signals = build_optimizer(config, chunks), Signals()
    draw = numpy.random.default_rng(1)
    responses = [
        TrainedResponse(
            prompt_ids=draw.integers(VOCAB, size=8).tolist(),
            token_ids=draw.integers(VOCAB, size=8).astype(numpy.int32),
            logprobs=numpy.full(8, -6.0, numpy.float32),
            advantage=float(number % 2) - 0.5,
        )
        for number in range(16)
    ]
    place = mcore.parallel_state.get_data_parallel_rank()
    batches = microbatches(responses, seq_length=SEQ_LENGTH, micro_batch=ROWS, dp_rank=place, dp_size=layout.dp)
    with Calls() as calls:
        policy_step.train_step(config, chunks, optimizer, batches)
        signals.agree()
    layout = Layout(layout.world_size, layout.dp, len(batches))
    return calls, formulas.collectives(_sizes(config, layout, "rl"), formulas.parts("rl", config))


def _generate(config: Any, layout: Layout, case: Case) -> tuple[Calls, list[Collective]]:
    """Prompts of two tokens, the first of which are read in a pass that looks like one that writes a token."""
    count = 3
    engine = MegatronEngine(config, mcore.build_model(config, VOCAB), eod=-1, vocab_size=VOCAB, batch=count)
    requests = [Request(prompt_ids=[number, 7], max_tokens=TOKENS, seed=number) for number in range(count)]
    with Calls() as calls:
        engine.generate(requests, temperature=1.0, top_p=1.0)
    sizes = dataclasses.replace(_sizes(config, layout, "rl"), B=count)
    passes = formulas.collectives(sizes, {"generate"})
    return calls, [
        dataclasses.replace(one, count=one.count * (TOKENS + (one.operation != "broadcast"))) for one in passes
    ]
