"""What a run would need, by arithmetic: parameters, memory of a rank, tokens, layout, schedule. Builds nothing."""

from dataclasses import dataclass

from megatron_ptrl.config import ModelConfig, ParallelConfig, PretrainConfig, RunConfig, SFTConfig
from megatron_ptrl.training.layout import Layout

GIB = 1 << 30


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of the whole model, by where they live."""

    embedding: int
    head: int
    """0 when tied to the embedding."""
    per_layer_dense: int
    """Of one layer, everything but the experts of a mixture."""
    per_layer_experts: int
    num_layers: int
    num_moe_layers: int
    final_norm: int
    per_layer_norms: int
    """Of `per_layer_dense`; every tensor-parallel rank holds them."""
    per_layer_query_key_norms: int
    """Of these, the norms of queries and keys."""

    @property
    def total(self) -> int:
        """All parameters."""
        layers = self.num_layers * self.per_layer_dense + self.num_moe_layers * self.per_layer_experts
        return self.embedding + self.head + layers + self.final_norm


def count_parameters(model: ModelConfig, padded_vocab: int, ffn: int) -> ParameterCount:
    """Parameters of the decoder (multi-token-prediction heads are not counted)."""
    h = model.hidden_size
    head_width = model.kv_channels or h // model.num_attention_heads
    groups = model.num_query_groups or model.num_attention_heads
    query, key_value = model.num_attention_heads * head_width, 2 * groups * head_width
    norm = h if model.normalization == "RMSNorm" else 2 * h
    attention = h * (query + key_value) + query * h
    if model.add_bias_linear or model.add_qkv_bias:
        attention += query + key_value
    attention += h if model.add_bias_linear else 0
    query_key_norms = 2 * head_width if model.qk_layernorm else 0
    attention += query_key_norms
    experts = getattr(model, "num_moe_experts", None)
    moe_layers = _moe_layers(model) if experts else 0
    dense_mlp = _mlp(model, ffn)
    dense = attention + 2 * norm + dense_mlp
    expert_part = 0
    if experts:
        expert_ffn = getattr(model, "moe_ffn_hidden_size", None) or ffn
        shared = getattr(model, "moe_shared_expert_intermediate_size", None)
        expert_part = experts * _mlp(model, expert_ffn) + experts * h + (_mlp(model, shared) if shared else 0)
        expert_part -= dense_mlp
    return ParameterCount(
        embedding=padded_vocab * h,
        head=0 if model.share_embeddings_and_output_weights else padded_vocab * h,
        per_layer_dense=dense,
        per_layer_experts=expert_part,
        num_layers=model.num_layers,
        num_moe_layers=moe_layers,
        final_norm=norm,
        per_layer_norms=2 * norm + query_key_norms,
        per_layer_query_key_norms=query_key_norms,
    )


@dataclass(frozen=True)
class StageParameters:
    """Parameters on a rank of one pipeline stage of a dense model without biases, to the last one."""

    total: int
    norms: int
    query_key_norms: int


def parameters_of_stage(count: ParameterCount, parallel: ParallelConfig, place: int) -> StageParameters:
    """Of a rank of stage `place`, from 0. A matrix that is tied lies on the first stage and on the last one."""
    layers = count.num_layers // parallel.pp
    first, last = place == 0, place == parallel.pp - 1
    norms = layers * count.per_layer_norms + (count.final_norm if last else 0)
    matrices = layers * (count.per_layer_dense - count.per_layer_norms)
    matrices += count.embedding if first else 0
    matrices += count.head or (0 if first else count.embedding) if last else 0
    return StageParameters(matrices // parallel.tp + norms, norms, layers * count.per_layer_query_key_norms)


def _mlp(model: ModelConfig, ffn: int) -> int:
    up = 2 * ffn if model.gated_linear_unit else ffn
    biases = up + model.hidden_size if model.add_bias_linear else 0
    return model.hidden_size * (up + ffn) + biases


def _moe_layers(model: ModelConfig) -> int:
    frequency = getattr(model, "moe_layer_freq", 1)
    if isinstance(frequency, list):
        return sum(frequency)
    return -(-model.num_layers // frequency)


def memory_per_rank(config: RunConfig, layout: Layout, count: ParameterCount, padded_vocab: int) -> dict[str, float]:
    """Bytes on the fullest rank (first or last stage): weights, gradients, optimizer, activations, logits.

    Activations by the 34 s b h bytes a layer of bf16 of arXiv:2205.05198 without the s^2 terms, which torch's and
    Transformer Engine's attention do not store, so that recomputing attention alone saves nothing more; the first stage
    holds `pp` microbatches of its layers, and of its next chunks where it has several. Logits are counted once, as the
    kernels need them, with `loss.recompute_logits` false beside the head's gradient in fp32; the loss in torch
    operators needs about ten times that.
    """
    parallel, model = config.parallel, config.model
    stage_layers = count.num_layers / parallel.pp
    moe_layers = count.num_moe_layers / parallel.pp
    layers = stage_layers * count.per_layer_dense + moe_layers * count.per_layer_experts / parallel.ep
    mine = (layers + max(count.embedding, count.head) + count.final_norm) / parallel.tp
    if parallel.pp == 1 and count.head:
        mine += count.head / parallel.tp
    bf16 = config.train.precision == "bf16"
    sharing = layout.dp * parallel.cp if parallel.distributed_optimizer else 1
    tokens = config.train.micro_batch * config.data.seq_length / parallel.cp
    width = 34 if bf16 else 68
    split = parallel.tp if parallel.sequence_parallel else 1
    replicated = 10 * (width / 34) * (1 - 1 / parallel.tp) if split == 1 else 0
    per_token_layer = (width / parallel.tp + replicated) * model.hidden_size
    with_logits = min(tokens, config.loss.chunk_tokens) if config.loss.impl == "linear" else tokens
    logits = with_logits * padded_vocab / parallel.tp * (2 if bf16 else 4)
    if config.loss.impl == "megatron":
        logits += with_logits * padded_vocab / parallel.tp * 4  # the softmax, kept in fp32
    if not config.loss.recompute_logits:
        logits += model.hidden_size * padded_vocab / parallel.tp * 4
    return {
        "weights": mine * (2 if bf16 else 4),
        "gradients": mine * 4,
        "optimizer": mine * (12 if bf16 else 8) / sharing,
        "activations": tokens * _held_layers(config, layout, stage_layers, width, per_token_layer),
        "logits": logits,
    }


def _held_layers(config: RunConfig, layout: Layout, layers: float, width: int, per_token: float) -> float:
    """Bytes of activations a token, of all layers and microbatches that the first stage holds at once.

    per_token: of a layer that is kept whole. One that is recomputed leaves its input, 2 h bytes in bf16.
    """
    model, parallel = config.model, config.parallel
    chunks = parallel.vpp or 1
    # Interleaved, arXiv:2205.05198: p stages of v chunks hold 1 + (p - 1) / (p v) times what p whole stages hold.
    more = 1 + (parallel.pp - 1) / (parallel.pp * chunks) if chunks > 1 else 1.0
    in_flight = min(parallel.pp * more, layout.num_microbatches)
    if getattr(model, "recompute_granularity", None) != "full":
        return per_token * layers * in_flight
    at_once = getattr(model, "recompute_num_layers", None) or 1
    a_input = width / 17 * model.hidden_size / (parallel.tp if parallel.sequence_parallel else 1)
    if getattr(model, "recompute_method", None) == "block":
        recomputed = min(at_once * chunks, layers)
        return ((layers - recomputed) * per_token + recomputed * a_input) * in_flight + per_token
    return layers / at_once * a_input * in_flight + at_once * per_token


def reference_memory(reference: PretrainConfig, layout: Layout, padded_vocab: int, ffn: int) -> float:
    """Bytes on the fullest rank of the weights of `remit.reference`, in the layout of the run."""
    count = count_parameters(reference.model, padded_vocab, ffn)
    return memory_per_rank(reference, layout, count, padded_vocab)["weights"]


def describe(
    config: PretrainConfig,
    layout: Layout,
    padded_vocab: int,
    ffn: int,
    data_tokens: int,
    reference_bytes: float | None = None,
) -> str:
    """The dry run's text.

    reference_bytes: what `reference_memory` gives, with a reference that runs along. Offloaded, it takes what the
    activations of the run, which are not there yet when it runs, leave uncovered.
    """
    count = count_parameters(config.model, padded_vocab, ffn)
    memory = memory_per_rank(config, layout, count, padded_vocab)
    if reference_bytes is not None:
        covered = memory["activations"] + memory["logits"] if config.remit.offload_reference else 0.0
        memory["reference"] = max(reference_bytes - covered, 0.0)
    passes = config.train.steps * config.train.global_batch * config.data.seq_length / data_tokens
    rows = sampled_run(config, layout, count, padded_vocab, memory, f"{passes:.2f} passes over data.train")
    if config.remit.weighting != "none":
        remit = config.remit
        setting = f"epsilon {remit.epsilon:g}" if remit.weighting == "remit" else f"keep {remit.keep:g}"
        source = f"reference {remit.reference}" if remit.online else f"side-cars {', '.join(remit.sidecar or [])}"
        rows["weights"] = f"{remit.weighting}, {setting}, by {remit.center}, {source}"
    return table(rows)


def sampled_run(
    config: PretrainConfig | SFTConfig,
    layout: Layout,
    count: ParameterCount,
    padded_vocab: int,
    memory: dict[str, float],
    passes: str,
) -> dict[str, str]:
    """The lines, by name, of a run with `global_batch` rows a step. passes: how often it sees its data, in words"""
    parallel, train = config.parallel, config.train
    step_tokens = train.global_batch * config.data.seq_length
    total = sum(memory.values())
    stages = parallel.pp * (parallel.vpp or 1)
    bubble = (parallel.pp - 1) / (layout.num_microbatches * (parallel.vpp or 1) + parallel.pp - 1)
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in memory.items())
    return {
        "parameters": f"{count.total:,} (embedding {count.embedding:,}, head {count.head:,})",
        "vocabulary": f"{padded_vocab:,} after padding",
        "ranks": f"{layout.world_size} = tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} x dp {layout.dp}, "
        f"ep {parallel.ep}, sequence parallel {'on' if parallel.sequence_parallel else 'off'}",
        "pipeline": f"{stages} chunks of {config.model.num_layers / stages:g} layers, "
        f"{layout.num_microbatches} microbatches, bubble {bubble:.1%}",
        "memory per rank": f"{total / GIB:.2f} GiB, estimated ({parts})",
        "step": f"{train.global_batch} x {config.data.seq_length} = {step_tokens:,} tokens, {train.precision}",
        "run": f"{train.steps:,} steps, {train.steps * step_tokens:,} tokens = {passes}",
        "schedule": f"{config.optimizer.schedule}, lr {config.optimizer.lr:g} -> {config.optimizer.min_lr:g}, "
        f"warm-up {config.optimizer.warmup_steps} steps",
        "loss": f"{config.loss.impl}, beta {config.loss.beta:g}, lambda_head {config.loss.lambda_head:g}, "
        f"lambda_tail {config.loss.lambda_tail:g}, top_k {config.loss.top_k}",
    }


def table(rows: dict[str, str]) -> str:
    """The dry run's lines, each behind its name."""
    return "\n".join(f"{name:<16} {text}" for name, text in rows.items())
