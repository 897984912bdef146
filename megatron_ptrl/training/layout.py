"""How the ranks are laid out, and whether that can work: asked before anything is built."""

import os
from dataclasses import dataclass
from typing import Any

from megatron_ptrl.config import RunConfig
from megatron_ptrl.errors import InputError


@dataclass(frozen=True)
class Layout:
    """Sizes that follow from the config and the number of ranks."""

    world_size: int
    dp: int
    num_microbatches: int
    """Of a step on each data-parallel rank; 0 where that differs from step to step."""


def check_launched(world_size: int) -> None:
    """InputError where there should be ranks and nothing says how they find one another."""
    if world_size > 1 and "MASTER_ADDR" not in os.environ:
        raise InputError(f"WORLD_SIZE is {world_size} and MASTER_ADDR is not set; launch the ranks with torchrun")


def check_layout(config: RunConfig, world_size: int) -> Layout:
    """The layout of `world_size` ranks, or InputError with the reason why it cannot work."""
    parallel, train = config.parallel, config.train
    model_ranks = parallel.tp * parallel.pp * parallel.cp
    if world_size % model_ranks:
        raise InputError(
            f"{world_size} ranks do not divide by parallel.tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} = "
            f"{model_ranks}; launch a multiple of {model_ranks} (torchrun --nproc-per-node) or change the sizes"
        )
    dp = world_size // model_ranks
    per_round, rows = train.micro_batch * dp, config.rows_per_step or 0
    if rows % per_round:
        raise InputError(
            f"train.global_batch {rows} does not divide by train.micro_batch {train.micro_batch} x "
            f"{dp} data-parallel ranks = {per_round}; make it a multiple of {per_round}"
        )
    layout = Layout(world_size, dp, rows // per_round)
    _check_tensor(config)
    _check_pipeline(config, layout)
    _check_experts(config, layout)
    return layout


def _check_tensor(config: RunConfig) -> None:
    parallel, model, seq_length = config.parallel, config.model, config.data.seq_length
    groups = model.num_query_groups or model.num_attention_heads
    _divides("model.num_attention_heads", model.num_attention_heads, "model.num_query_groups", groups)
    _divides("model.num_attention_heads", model.num_attention_heads, "parallel.tp", parallel.tp)
    _divides("model.num_query_groups", groups, "parallel.tp", parallel.tp)
    if model.ffn_hidden_size:
        _divides("model.ffn_hidden_size", model.ffn_hidden_size, "parallel.tp", parallel.tp)
    if parallel.sequence_parallel and parallel.tp == 1:
        raise InputError(
            "parallel.sequence_parallel is true with parallel.tp 1; it splits over tp ranks, so set tp > 1"
        )
    if parallel.sequence_parallel:
        _divides("data.seq_length", seq_length, "parallel.cp x tp", parallel.cp * parallel.tp)
    if parallel.cp > 1:
        _divides("data.seq_length", seq_length, "2 x parallel.cp", 2 * parallel.cp)


def _check_pipeline(config: RunConfig, layout: Layout) -> None:
    parallel, model = config.parallel, config.model
    if config.loss.impl == "linear" and getattr(model, "defer_embedding_wgrad_compute", False):
        raise InputError(
            "loss.impl is linear with model.defer_embedding_wgrad_compute, which keeps the gradient of all logits for "
            "later; set it to false, or loss.impl to reward_shaped"
        )
    if parallel.vpp is not None:
        if parallel.pp == 1 or parallel.vpp < 2:
            raise InputError(
                f"parallel.vpp is {parallel.vpp} with parallel.pp {parallel.pp}; the interleaved schedule needs pp > 1 "
                "and at least 2 chunks a stage; leave parallel.vpp null otherwise"
            )
        _divides("the number of microbatches", layout.num_microbatches, "parallel.pp (interleaved)", parallel.pp)
    uneven: tuple[Any, ...] = tuple(
        getattr(model, name, None)
        for name in (
            "pipeline_model_parallel_layout",
            "num_layers_in_first_pipeline_stage",
            "num_layers_in_last_pipeline_stage",
        )
    )
    if not any(uneven):
        stages = parallel.pp * (parallel.vpp or 1)
        _divides("model.num_layers", model.num_layers, "parallel.pp x vpp", stages)


def _check_experts(config: RunConfig, layout: Layout) -> None:
    parallel, experts = config.parallel, getattr(config.model, "num_moe_experts", None)
    if experts is None:
        if parallel.ep > 1:
            raise InputError(f"parallel.ep is {parallel.ep} and model.num_moe_experts is not set; expected experts")
        return
    top_k = getattr(config.model, "moe_router_topk", 1)
    if not 1 <= top_k <= experts:
        raise InputError(f"model.moe_router_topk is {top_k}; expected 1 to the {experts} of model.num_moe_experts")
    _divides("model.num_moe_experts", experts, "parallel.ep", parallel.ep)
    expert_ranks = (parallel.etp or parallel.tp) * parallel.ep * parallel.pp
    _divides("the number of ranks", layout.world_size, "parallel.etp x ep x pp", expert_ranks)
    if parallel.tp > 1 and not parallel.sequence_parallel:
        raise InputError(
            "experts with parallel.tp > 1 need parallel.sequence_parallel true: Megatron-Core trains no other"
        )


def _divides(what: str, size: int, by_what: str, by: int) -> None:
    if size % by:
        raise InputError(f"{what} {size} does not divide by {by_what} {by}; change one of them")
