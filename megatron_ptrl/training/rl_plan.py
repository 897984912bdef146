"""What a run of `ptrl rl` will take, before anything is built: the dry run's text."""

import dataclasses

from megatron_ptrl.config import RLConfig
from megatron_ptrl.training.layout import Layout
from megatron_ptrl.training.plan import GIB, count_parameters, memory_per_rank


def kv_cache_bytes(config: RLConfig) -> float:
    """Keys and values of `rollout.batch` responses of full length, on one rank."""
    model, parallel = config.model, config.parallel
    width = model.kv_channels or model.hidden_size // model.num_attention_heads
    groups = (model.num_query_groups or model.num_attention_heads) / parallel.tp
    size = 2 if config.train.precision == "bf16" else 4
    per_token = 2 * model.num_layers / parallel.pp * groups * width * size
    return (
        per_token * config.data.seq_length * min(config.rollout.batch, config.rollout.prompts * config.rollout.samples)
    )


def describe(config: RLConfig, layout: Layout, padded_vocab: int, ffn: int, prompts: int) -> str:
    """The text. prompts: in all files"""
    parallel, rollout, policy = config.parallel, config.rollout, config.policy
    count = count_parameters(config.model, padded_vocab, ffn)
    # A pipeline that is full: the number of rows differs from step to step.
    full = dataclasses.replace(layout, num_microbatches=parallel.pp)
    memory = memory_per_rank(config, full, count, padded_vocab)
    if policy.kl_coef:
        memory["reference"] = memory["weights"]
    training = sum(memory.values())
    cache = kv_cache_bytes(config)
    resident = training - memory["activations"] - memory["logits"]
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in memory.items())
    responses = rollout.prompts * rollout.samples
    most = responses * config.data.seq_length
    kl = f"KL {policy.kl_coef:g} ({policy.kl_estimator})" if policy.kl_coef else "no KL"
    rows = {
        "parameters": f"{count.total:,} (embedding {count.embedding:,}, head {count.head:,})",
        "vocabulary": f"{padded_vocab:,} after padding",
        "ranks": f"{layout.world_size} = tp {parallel.tp} x pp {parallel.pp} x dp {layout.dp}, "
        f"sequence parallel {'on' if parallel.sequence_parallel else 'off'}",
        "memory per rank": f"{training / GIB:.2f} GiB, estimated ({parts}); while generating "
        f"{(resident + cache) / GIB:.2f} with a KV cache of {cache / GIB:.2f}",
        "step": f"{rollout.prompts} prompts x {rollout.samples} = {responses:,} responses of up to "
        f"{rollout.max_tokens:,} tokens, at most {most:,} tokens, {rollout.updates} updates, {config.train.precision}",
        "run": f"{config.train.steps:,} steps, {config.train.steps * rollout.prompts:,} prompts = "
        f"{config.train.steps * rollout.prompts / prompts:.2f} passes over prompts.files",
        "schedule": f"{config.optimizer.schedule}, lr {config.optimizer.lr:g} -> {config.optimizer.min_lr:g}, "
        f"warm-up {config.optimizer.warmup_steps} steps",
        "policy": f"clip {policy.clip_low:g}/{policy.clip_high:g}, {kl}, {policy.aggregation}, "
        f"deviation {'on' if policy.normalize_std else 'off'}, importance sampling {policy.importance_sampling}",
        "rollouts": f"{rollout.engine}, temperature {rollout.temperature:g}, top_p {rollout.top_p:g}",
        "judge": f"{config.judge.kind}, {config.judge.reward} reward, lambda of msr {config.prompts.msr_weight:g}",
    }
    return "\n".join(f"{name:<16} {text}" for name, text in rows.items())
