"""What Megatron-LM's arguments say of a model and its training, both ways; what one side cannot say is refused."""

import dataclasses
from argparse import Namespace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import flags

from megatron_ptrl.cli import parse
from megatron_ptrl.config import ConvertConfig, PretrainConfig
from megatron_ptrl.config.run import OptimizerConfig
from megatron_ptrl.conversion import convert_stage
from megatron_ptrl.conversion.hf_input import parsed, write_settings
from megatron_ptrl.conversion.megatron_args import settings_of
from megatron_ptrl.conversion.megatron_optimizer import ISOLATION, cannot_continue, schedule_args
from megatron_ptrl.conversion.megatron_output import _SAID, args_of, check_model, flags_beyond_args
from megatron_ptrl.conversion.megatron_tensors import tensors_of
from megatron_ptrl.conversion.torch_dist import Part, write
from megatron_ptrl.data.tokenizer import DEFAULT_EOD, Tokenizer
from megatron_ptrl.errors import InputError
from megatron_ptrl.training import checkpoint, mcore
from megatron_ptrl.training.checkpoint import Progress
from megatron_ptrl.training.resume import DEFINE_THE_MODEL, describe, model_fields

HERE = Path("there")
SIZES = {"model.hidden_size": 64, "model.num_attention_heads": 4, "model.ffn_hidden_size": 128, "train.steps": 100}
GELU = {"model.gated_linear_unit": False, "model.activation_func": "gelu", "model.add_bias_linear": True}


@cache
def default_run() -> PretrainConfig:
    return parse(PretrainConfig, flags(SIZES), prog="ptrl")


def run_with(settings: dict[str, Any]) -> PretrainConfig:
    run = default_run()
    for name, value in settings.items():
        section, _, field = name.partition(".")
        run = dataclasses.replace(run, **{section: dataclasses.replace(getattr(run, section), **{field: value})})
    return run


def said(run: PretrainConfig) -> dict[str, Any]:
    """All that Megatron-LM is told of a run of ours, by name."""
    layout = {"tp": 1, "pp": 1, "cp": 1, "world_size": 1}
    args = args_of(run, 512, layout, {"step": 3, "consumed_samples": 48})
    return {**vars(args), **schedule_args(run), "flags": flags_beyond_args(run)}


OTHER = {
    "num_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "ffn_hidden_size": 256,
    "kv_channels": 32,
    "normalization": "LayerNorm",
    "layernorm_epsilon": 1e-5,
    "qk_layernorm": False,
    "gated_linear_unit": False,
    "add_bias_linear": True,
    "add_qkv_bias": True,
    "activation_func": "gelu",
    "share_embeddings_and_output_weights": False,
    "rotary_base": 500_000,
    "make_vocab_size_divisible_by": 128,
    "rope_scaling_factor": 8.0,
    "rotary_interleaved": True,
}


def test_every_field_that_defines_the_network_is_said_to_megatron_lm_or_refused():
    run = run_with({})
    check_model(model_fields(run.model), HERE)
    assert set(OTHER) == set(_SAID) < set(DEFINE_THE_MODEL)
    for name in DEFINE_THE_MODEL:
        if name in OTHER:
            model = dataclasses.replace(run.model, **{name: OTHER[name]})
            assert said(dataclasses.replace(run, model=model)) != said(run), name
        else:
            with pytest.raises(InputError, match=f"^there: model.{name} is other, which the arguments"):
                check_model({**model_fields(run.model), name: "other"}, HERE)


# (activation, gate, biases, fused) -> (swiglu, GELU by tanh, whether the flag against it is printed), or a refusal.
ACTIVATIONS = [
    (("silu", True, False, False), (True, False, False)),
    (("silu", True, True, True), (True, False, False)),
    (("gelu", False, True, False), (False, False, True)),
    (("gelu", False, True, True), (False, True, False)),
    (("gelu", False, False, False), (False, False, True)),
    (("gelu", True, False, False), "activation_func is gelu with gated_linear_unit true"),
    (("relu", False, False, False), "activation_func is relu with gated_linear_unit false"),
    (("relu", True, False, False), "activation_func is relu with gated_linear_unit true"),
    (("silu", False, False, False), "activation_func is silu with gated_linear_unit false"),
]
NAMES = ("activation_func", "gated_linear_unit", "add_bias_linear", "bias_activation_fusion")


@pytest.mark.parametrize(("values", "expected"), ACTIVATIONS)
def test_an_activation_goes_out_as_what_it_is_or_not_at_all(values, expected):
    run = run_with({f"model.{name}": value for name, value in zip(NAMES, values, strict=True)})
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            check_model(model_fields(run.model), HERE)
        return
    check_model(model_fields(run.model), HERE)
    told = said(run)
    assert (told["swiglu"], told["bias_gelu_fusion"], "--no-bias-gelu-fusion" in told["flags"]) == expected


RUNS: dict[str, dict[str, Any]] = {
    "default": {},
    "fused GELU": {**GELU, "model.bias_activation_fusion": True},
    "GELU": GELU,
    "interleaved positions": {"model.rotary_interleaved": True},
    "isolated documents": {"data.isolate_documents": True},
    "constant": {"optimizer.schedule": "constant", "optimizer.warmup_steps": 3},
    "cosine": {"optimizer.decay_steps": 80, "optimizer.weight_decay": 0.03},
    "wsd": {"optimizer.schedule": "wsd", "optimizer.decay_steps": 20, "optimizer.wsd_decay": "minus_sqrt"},
    "wsd by default": {"optimizer.schedule": "wsd"},
}


def network(run: PretrainConfig) -> dict[str, Any]:
    """What Megatron-Core would build, in values that can be compared."""
    fields = dataclasses.asdict(mcore.transformer_config(run))
    return {name: value for name, value in fields.items() if "init_method" not in name}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_comes_back_as_it_went(name, tmp_path):
    run = run_with(RUNS[name])
    args = Namespace(**said(run))
    assert cannot_continue(args, COMMON) is None
    back = settings_of(args, HERE)
    write_settings(tmp_path, parsed(back))
    again = parse(PretrainConfig, ["--config", str(tmp_path / "config.yaml")], prog="ptrl")
    assert network(again) == network(run)
    assert again.data.isolate_documents == run.data.isolate_documents
    found = OptimizerConfig(**back["optimizer"])
    assert dataclasses.replace(found, decay_steps=None) == dataclasses.replace(run.optimizer, decay_steps=None)
    assert schedule_args(dataclasses.replace(run, optimizer=found)) == schedule_args(run)


MINIMAL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 64, "global_batch_size": 8}
COMMON = {
    "optimizer": {},
    "opt_param_scheduler": {},
    "iteration": 3,
    "content_metadata": {"distrib_optim_sharding_type": "fully_reshardable"},
}


def taken_over(section: str, told: dict[str, Any]) -> dict[str, Any]:
    return settings_of(Namespace(**{**MINIMAL, "train_iters": 100, **told}), HERE)[section]


# A model without a gate and with biases has --bias-gelu-fusion unless it is switched off.
FUSED = [
    ({}, True),
    ({"bias_gelu_fusion": True}, True),
    ({"bias_gelu_fusion": False}, False),
    ({"add_bias_linear": False}, False),
    ({"swiglu": True}, False),
]


@pytest.mark.parametrize(("told", "expected"), FUSED)
def test_gelu_is_the_one_by_tanh_where_megatron_lm_fuses_it_with_its_bias(told, expected):
    assert taken_over("model", told).get("bias_activation_fusion", False) == expected


WSD = {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 20}
SCHEDULES = [
    (WSD, {"schedule": "wsd", "decay_steps": 20, "wsd_decay": "exponential"}),
    ({**WSD, "lr_wsd_decay_style": "cosine", "lr_decay_iters": 100}, {"wsd_decay": "cosine", "decay_steps": 20}),
    ({**WSD, "lr_warmup_fraction": 0.1}, {"warmup_steps": 10}),  # of all steps, not of those of the decay
    ({"lr_warmup_fraction": 0.29}, {"warmup_steps": 29}),  # 0.29 * 100 is less than 29
    ({"lr_decay_iters": 50, "lr_warmup_fraction": 0.1}, {"decay_steps": 50, "warmup_steps": 5}),
    ({"lr_decay_samples": 480, "lr_warmup_samples": 80}, {"decay_steps": 60, "warmup_steps": 10}),
    ({"weight_decay": 0.01, "start_weight_decay": 0.2, "end_weight_decay": 0.2}, {"weight_decay": 0.2}),
]


@pytest.mark.parametrize(("told", "expected"), SCHEDULES)
def test_a_schedule_is_taken_over(told, expected):
    found = taken_over("optimizer", told)
    assert {name: found[name] for name in expected} == expected


ISOLATED = dict.fromkeys(ISOLATION, True)
BEHIND: list[tuple[dict[str, Any], str | None]] = [
    ({**WSD, "lr_decay_iters": 100}, None),
    ({**WSD, "lr_decay_iters": 90}, "its WSD schedule ends after 90 iterations of 100"),
    ({**WSD, "lr_decay_samples": 720}, "its WSD schedule ends after 90 iterations of 100"),
    ({**WSD, "lr_wsd_decay_style": "steps"}, "its lr_wsd_decay_style is steps; expected one of linear, cosine"),
    ({"lr_decay_iters": 90}, None),
    ({"lr_decay_style": "linear"}, "its learning rate decays by linear"),
    ({"lr_warmup_init": 1e-5, "lr_warmup_iters": 4}, "its warm-up is not over and began at --lr-warmup-init 1e-05"),
    ({"lr_warmup_init": 1e-5, "lr_warmup_iters": 3}, None),  # it is over
    ({"start_weight_decay": 0.1, "end_weight_decay": 0.1, "weight_decay_incr_style": "linear"}, None),
    ({"start_weight_decay": 0.0, "end_weight_decay": 0.1}, "its weight decay goes from 0.0 to 0.1"),
    ({"decoupled_lr": 1e-4}, "its decoupled_lr is 0.0001; expected None"),
    ({"decoupled_weight_decay": False}, "its decoupled_weight_decay is False; expected True"),
    ({"apply_wd_to_qk_layernorm": True}, "its apply_wd_to_qk_layernorm is True; expected False"),
    ({"grad_norm_skip_threshold": 10.0}, "its grad_norm_skip_threshold is 10.0; expected inf"),
    ({"step_batch_size_schedule": "0:8 800:16"}, "its batch grows (--step-batch-size-schedule 0:8 800:16)"),
    (ISOLATED, None),
    (
        {"eod_mask_loss": True},
        "with --eod-mask-loss but without --reset-position-ids and --reset-attention-mask; expected all three or none",
    ),
    (
        {**ISOLATED, "reset_position_ids": False},
        "with --reset-attention-mask and --eod-mask-loss but without --reset-p",
    ),
    ({**ISOLATED, "create_attention_mask_in_dataloader": False}, "but without --reset-attention-mask; expected"),
]


@pytest.mark.parametrize(("told", "reason"), BEHIND)
def test_an_optimizer_stays_behind_where_no_run_of_ours_could_go_on_with_it(told, reason):
    args = Namespace(**{**MINIMAL, "train_iters": 100, "consumed_train_samples": 24, "bf16": True, **told})
    found = cannot_continue(args, COMMON)
    assert found is None if reason is None else reason in str(found)
    isolates = settings_of(args, HERE)["data"].get("isolate_documents", False)
    assert isolates == (told is ISOLATED)


def saved(folder: Path, prefix: str, settings: dict[str, Any], change: Any = lambda tensors: None) -> Path:
    """A checkpoint of weights, of a run with these settings; `change` gets its tensors by name and shape."""
    tokenizer = Tokenizer(f"{prefix}.tokenizer.json", DEFAULT_EOD)
    run = run_with({**settings, "data.tokenizer": str(tokenizer.path)})
    path = folder / "run" / "checkpoints" / "step_00000000"
    path.mkdir(parents=True)
    tensors = tensors_of(run.model, 512)
    change(tensors)
    parts = [Part(name, shape, (0,) * len(shape), shape, torch.float32) for name, shape in tensors.items()]
    write(path, [parts], lambda part: torch.zeros(part.shape), common={})
    about = {**describe(run, tokenizer), "weights_only": True}
    checkpoint.write_manifest(path, Progress(), about, {"tp": 1, "pp": 1, "cp": 1, "world_size": 1})
    return folder / "run"


def convert(source: Path, output: Path | str) -> None:
    convert_stage.run(ConvertConfig(input=str(source), output=str(output), to="megatron_lm"))


def test_what_is_written_says_what_the_model_is(prefix, tmp_path, capsys):
    convert(saved(tmp_path, prefix, {**GELU, "data.isolate_documents": True}), tmp_path / "theirs")
    args = torch.load(tmp_path / "theirs" / "release" / "common.pt", weights_only=False)["args"]
    assert not args.swiglu and args.add_bias_linear and not args.bias_gelu_fusion and args.eod_mask_loss
    printed = "--no-bias-gelu-fusion --reset-position-ids --reset-attention-mask --eod-mask-loss"
    assert printed in capsys.readouterr().out


NOT_WRITTEN: dict[str, tuple[dict[str, Any], Any, str]] = {
    "model": ({"model.num_moe_experts": 4}, lambda t: None, "step_00000000: model.num_moe_experts is 4"),
    "heads": ({"model.mtp_num_layers": 1}, lambda t: None, "step_00000000: model.mtp_num_layers is 1"),
    "tensor": ({}, lambda t: t.update({"more.weight": (2,)}), "has more.weight, which the model of its run.json does"),
    "padding": ({}, lambda t: t.update({"embedding.word_embeddings.weight": (576, 64)}), "by its run.json"),
}


@pytest.mark.parametrize("name", NOT_WRITTEN)
def test_what_megatron_lm_would_take_for_another_model_is_not_written(name, prefix, tmp_path):
    settings, change, message = NOT_WRITTEN[name]
    source = saved(tmp_path, prefix, settings, change)
    with pytest.raises(InputError, match=message):
        convert(source, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for output in (".", tmp_path / "empty"):
        with pytest.raises(InputError, match="the current folder, which would be replaced; name a new folder"):
            convert(tmp_path, output)
    assert list(tmp_path.iterdir()) == [tmp_path / "empty"]
