"""A run of ours -> arguments and flags of Megatron-LM that say the same. What they cannot say is refused by name."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_ptrl.config import ModelConfig, PretrainConfig
from megatron_ptrl.conversion.megatron_optimizer import ISOLATION
from megatron_ptrl.errors import InputError
from megatron_ptrl.training import mcore
from megatron_ptrl.training.optimizer import ALIKE_IN_MEGATRON
from megatron_ptrl.training.resume import DEFINE_THE_MODEL

# What of `DEFINE_THE_MODEL` follows from `args_of` and `flags_beyond_args`; the rest has to be as by default.
_SAID = (
    *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "kv_channels"),
    *("normalization", "layernorm_epsilon", "qk_layernorm", "gated_linear_unit", "add_bias_linear", "add_qkv_bias"),
    *("activation_func", "share_embeddings_and_output_weights", "rotary_base", "make_vocab_size_divisible_by"),
    *("rope_scaling_factor", "rotary_interleaved"),
)
_GATED_BY_ACTIVATION = {"silu": True, "gelu": False}


def check_model(fields: dict[str, Any], where: Path) -> None:
    """Raises InputError, naming `where`, for a network that Megatron-LM would take for another.

    fields: as `training.resume.model_fields` has them
    """
    defaults = {field.name: field.default for field, _ in mcore.transformer_fields()}
    for name in DEFINE_THE_MODEL:
        if name not in _SAID and fields.get(name, defaults[name]) != defaults[name]:
            raise InputError(
                f"{where}: model.{name} is {fields[name]}, which the arguments of a dense GPT of Megatron-LM's do not "
                f"say; expected {defaults[name]}"
            )
    activation, gated = fields["activation_func"], fields["gated_linear_unit"]
    if _GATED_BY_ACTIVATION.get(activation) != gated:
        raise InputError(
            f"{where}: model.activation_func is {activation} with gated_linear_unit {str(gated).lower()}, which "
            "Megatron-LM has no flag for; expected silu with a gate or gelu without"
        )


def args_of(run: PretrainConfig, vocab_size: int, layout: dict[str, int], progress: dict[str, int]) -> Namespace:
    """What Megatron-LM compares its own arguments with, and takes over with --use-checkpoint-args.

    vocab_size: real tokens   layout, progress: as a manifest of ours has them
    """
    model, batch = run.model, run.train.global_batch
    width = model.kv_channels or model.hidden_size // model.num_attention_heads
    groups = model.num_query_groups or model.num_attention_heads
    return Namespace(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=mcore.ffn_size(model),
        num_attention_heads=model.num_attention_heads,
        group_query_attention=groups != model.num_attention_heads,
        num_query_groups=groups,
        kv_channels=width,
        normalization=model.normalization,
        norm_epsilon=model.layernorm_epsilon,
        qk_layernorm=model.qk_layernorm,
        swiglu=model.gated_linear_unit,
        bias_gelu_fusion=_has_tanh(model),
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        untie_embeddings_and_output_weights=not model.share_embeddings_and_output_weights,
        position_embedding_type="rope",
        # Compared with the flag's default, which changes nothing for a model with rope.
        add_position_embedding=True,
        use_rotary_position_embeddings=False,
        rotary_base=model.rotary_base,
        rotary_percent=1.0,
        rotary_interleaved=getattr(model, "rotary_interleaved", False),
        use_rope_scaling=model.rope_scaling_factor is not None,
        rope_scaling_factor=model.rope_scaling_factor or 8.0,
        squared_relu=False,
        num_experts=None,
        mtp_num_layers=None,
        apply_layernorm_1p=False,
        apply_query_key_layer_scaling=False,
        max_position_embeddings=run.data.seq_length,
        seq_length=run.data.seq_length,
        make_vocab_size_divisible_by=model.make_vocab_size_divisible_by,
        padded_vocab_size=mcore.padded_vocab_size(vocab_size, model, layout["tp"]),
        bf16=run.train.precision == "bf16",
        fp16=False,
        seed=run.train.seed,
        tensor_model_parallel_size=layout["tp"],
        pipeline_model_parallel_size=layout["pp"],
        context_parallel_size=layout["cp"],
        world_size=layout["world_size"],
        data_parallel_size=layout["world_size"] // (layout["tp"] * layout["pp"] * layout["cp"]),
        sequence_parallel=run.parallel.sequence_parallel,
        use_distributed_optimizer=run.parallel.distributed_optimizer,
        optimizer="adam",
        **{name: getattr(run.optimizer, name) for name in ALIKE_IN_MEGATRON},
        global_batch_size=batch,
        micro_batch_size=run.train.micro_batch,
        train_iters=run.train.steps,
        iteration=progress["step"],
        consumed_train_samples=progress["consumed_samples"],
        consumed_valid_samples=0,
        skipped_train_samples=0,
        data_parallel_random_init=False,
        ckpt_format="torch_dist",
        use_dist_ckpt=True,
        **dict.fromkeys(ISOLATION, run.data.isolate_documents),
        # Our random state has another form; without this Megatron-LM would ask for its own.
        no_save_rng=True,
    )


def flags_beyond_args(run: PretrainConfig) -> str:
    """What Megatron-LM needs to be told of the model and the data, as --use-checkpoint-args does not take it over."""
    model = run.model
    flags = [f"--norm-epsilon {model.layernorm_epsilon}"]
    if model.qk_layernorm:
        flags.append("--qk-layernorm")
    if model.rope_scaling_factor is not None:
        flags.append(f"--use-rope-scaling --rope-scaling-factor {model.rope_scaling_factor}")
    if model.activation_func == "gelu" and not _has_tanh(model):
        flags.append("--no-bias-gelu-fusion")
    if run.data.isolate_documents:
        # Where rows differ in how many tokens the loss is of, the mean over all of them is another than that of means.
        flags += [*(f"--{name.replace('_', '-')}" for name in ISOLATION), "--calculate-per-token-loss"]
    return " ".join(flags)


def _has_tanh(model: ModelConfig) -> bool:
    """Whether GELU is Megatron-Core's approximation by tanh, which is the fused one."""
    fused = bool(getattr(model, "bias_activation_fusion", False))
    return fused and model.activation_func == "gelu" and model.add_bias_linear
