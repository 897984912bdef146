"""Runs of Megatron-LM go on here and ours go on there: the same losses as without the change."""

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any
from unittest import mock

import megatron_lm
import pytest
import torch
from test_convert import convert, ptrl
from tiny import Settings, pretraining, read_metrics, run_tiny, tiny_config

from megatron_ptrl.conversion.megatron_args import settings_of
from megatron_ptrl.conversion.torch_dist import Reader, copy, write
from megatron_ptrl.errors import InputError

STEPS, SAVED = 6, 3
KINDS: dict[str, tuple[int, dict[str, Any], str | None]] = {
    "distributed optimizer, tp 2": (2, {"parallel__tp": 2}, megatron_lm.RESHARDABLE),
    "plain optimizer, bf16": (1, {"parallel__distributed_optimizer": False, "train__precision": "bf16"}, None),
}


def arguments(config: Any) -> Namespace:
    """Megatron-LM's, for the model and the training of a tiny run."""
    from megatron.core.transformer.enums import AttnBackend

    model, train, optimizer = config.model, config.train, config.optimizer
    return Namespace(
        attention_backend=AttnBackend.auto,
        save_path=Path("/somewhere"),
        params_dtype=torch.bfloat16,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        group_query_attention=True,
        num_query_groups=model.num_query_groups,
        kv_channels=16,
        normalization="RMSNorm",
        norm_epsilon=model.layernorm_epsilon,
        qk_layernorm=True,
        swiglu=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        untie_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_percent=1.0,
        rotary_base=10000,
        num_experts=None,
        seq_length=config.data.seq_length,
        bf16=train.precision == "bf16",
        global_batch_size=train.global_batch,
        micro_batch_size=train.micro_batch,
        train_iters=train.steps,
        seed=train.seed,
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        lr_decay_style="cosine",
        lr_decay_iters=None,
        lr_warmup_iters=optimizer.warmup_steps,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        tensor_model_parallel_size=config.parallel.tp,
        pipeline_model_parallel_size=1,
        world_size=config.parallel.tp,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        data_path=["somewhere"],
        split=config.data.split.replace(",", " / "),
    )


def saves_as_megatron_lm(
    rank: int, world_size: int, settings: Settings, folder: str, sharding: str | None, changed: dict[str, Any]
) -> None:
    """A whole run; after some of its steps Megatron-LM would have saved this, and we save ours."""
    with pretraining(settings, world_size) as run:
        run._begin()
        for step in range(STEPS):
            if step == SAVED:
                args = arguments(run.config)
                vars(args).update(changed)
                megatron_lm.save(run, Path(folder), args, sharding)
                run._save()
            run._step()


def goes_on_as_megatron_lm(rank: int, world_size: int, settings: Settings, folder: str) -> tuple[int, int]:
    """The rest of a run, from what Megatron-LM reads; returns its iteration and samples."""
    from megatron_ptrl.training.checkpoint import Progress

    with pretraining(settings, world_size) as run:
        common = megatron_lm.load(run, Path(folder))
        run.progress = Progress(common["iteration"], common["args"].consumed_train_samples)
        run._begin()
        for _ in range(SAVED, STEPS):
            run._step()
        return common["iteration"], common["args"].consumed_train_samples


COMMON_STATE = "common_state/shard_0_1"


def as_newer_versions_save(folder: Path) -> None:
    """Move common.pt to where Megatron-Core has it from 0.19 on: an object among the sharded ones."""
    older = folder.with_name("older")
    folder.rename(older)
    folder.mkdir()
    reader, common = Reader(older), torch.load(older / "common.pt", weights_only=False)
    objects = [(COMMON_STATE, common), *((name, reader.read_object(name)) for name in sorted(reader.objects))]
    copy(reader, folder, {}, lambda key: True, objects=objects)
    (folder / "common.pt").unlink()


def of_the_data(settings: Settings) -> Settings:
    return {name: value for name, value in settings.items() if name.startswith(("data.", "log.", "train.eval"))}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_megatron_lm_goes_on_here(ranks, prefix, tmp_path, kind):
    world_size, options, sharding = KINDS[kind]
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    settings = tiny_config(prefix, tmp_path / "whole", train__steps=STEPS, data__split="60,30,10", **options)
    ranks.run(world_size, saves_as_megatron_lm, settings, str(theirs), sharding, {})
    if sharding is None:
        as_newer_versions_save(theirs / "iter_0000003")
    told = convert(ranks, theirs, ours, "--tokenizer", f"{prefix}.tokenizer.json")
    assert "continuing at step 3 after 24 samples" in told
    # Its tokenizer is a copy of the data's.
    continued = {"config": str(ours / "config.yaml"), **of_the_data(settings), "run_dir": str(ours)}
    del continued["data.split"]  # config.yaml has it
    rows = run_tiny(ranks, world_size, continued)
    assert rows == read_metrics(tmp_path / "whole")[SAVED:] and len(rows) == STEPS - SAVED
    assert "the random state of dropout starts anew" in (ours / "log.txt").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_ours_goes_on_in_megatron_lm(ranks, prefix, tmp_path, kind):
    world_size, options, _ = KINDS[kind]
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    settings = tiny_config(prefix, ours, train__steps=STEPS, checkpoint__save_every=SAVED, **options)
    settings |= {"data.tokenizer": f"{prefix}.tokenizer.json"}
    whole = run_tiny(ranks, world_size, settings)
    shutil.rmtree(ours / "checkpoints" / f"step_{STEPS:08d}")
    told = convert(ranks, ours, theirs, "--to", "megatron_lm")
    assert "iteration 3 with its optimizer" in told
    assert told.endswith("--use-checkpoint-args --norm-epsilon 1e-06 --qk-layernorm\n")
    common = torch.load(theirs / "iter_0000003" / "common.pt", weights_only=False)
    assert common["args"].add_position_embedding  # as Megatron-LM's flag has it by default
    if options.get("parallel__tp"):
        assert [repr(group["step"]) for group in common["optimizer"]["optimizer"]["param_groups"]] == ["3", "3"]
    continued = {**settings, "run_dir": str(tmp_path / "continued")}
    answers = ranks.run(world_size, goes_on_as_megatron_lm, continued, str(theirs))
    assert answers == [(SAVED, SAVED * 8)] * world_size
    assert read_metrics(tmp_path / "continued") == whole[SAVED:]


def test_an_optimizer_in_buckets_stays_behind_and_says_how_to_take_it_along(ranks, prefix, tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    settings = tiny_config(prefix, tmp_path / "whole", train__steps=STEPS)
    ranks.run(1, saves_as_megatron_lm, settings, str(theirs), megatron_lm.BUCKETS, {})
    told = convert(ranks, theirs / "iter_0000003", ours, "--tokenizer", f"{prefix}.tokenizer.json")
    assert "weights alone" in told and "--dist-ckpt-optim-fully-reshardable" in told
    manifest = json.loads((ours / "checkpoints" / "step_00000000" / "run.json").read_text())
    assert manifest["step"] == 0 and manifest["weights_only"]
    convert(ranks, ours, tmp_path / "theirs as hf")
    named = ("--tokenizer", f"{prefix}.tokenizer.json")
    convert(ranks, tmp_path / "whole", tmp_path / "ours as hf", *named)
    weights = [(tmp_path / f"{whose} as hf" / "model.safetensors").read_bytes() for whose in ("theirs", "ours")]
    assert weights[0] == weights[1]


LAYER = "decoder.layers.self_attention"


def test_weights_from_hugging_face_become_a_release_of_megatron_lm(ranks, prefix, tmp_path):
    pytest.importorskip("transformers")
    from hf_models import make

    make(tmp_path / "hf", "qwen3", f"{prefix}.tokenizer.json")
    convert(ranks, tmp_path / "hf", tmp_path / "run")
    convert(ranks, tmp_path / "run", tmp_path / "theirs", "--to", "megatron_lm")
    assert (tmp_path / "theirs" / "latest_checkpointed_iteration.txt").read_text() == "release"
    names = Reader(tmp_path / "theirs" / "release").objects
    assert {"decoder.final_layernorm._extra_state/shard_0_1", f"{LAYER}.q_layernorm._extra_state/shard_3_4"} <= names
    convert(ranks, tmp_path / "theirs", tmp_path / "again", "--tokenizer", f"{prefix}.tokenizer.json")
    convert(ranks, tmp_path / "again", tmp_path / "back", "--like", str(tmp_path / "hf"))
    common = torch.load(tmp_path / "theirs" / "release" / "common.pt", weights_only=False)
    common["args"].untie_embeddings_and_output_weights = False
    torch.save(common, tmp_path / "theirs" / "release" / "common.pt")
    words = ("--input", str(tmp_path / "theirs"), "--tokenizer", f"{prefix}.tokenizer.json")
    code, refused = ranks.run(1, ptrl, "convert", *words, "--output", str(tmp_path / "tied"))[0]
    assert code == 2 and "has output_layer.weight, which the model of its args does not have" in refused
    from safetensors.torch import load_file

    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mixture": ({"num_experts": 8}, "num_experts is 8; expected None"),
    "positions": ({"position_embedding_type": "learned_absolute"}, "position_embedding_type is learned_absolute"),
    "mup": ({"use_mup": True}, "use_mup is True; expected False"),
    "sinks": ({"softmax_type": "learnable"}, "softmax_type is learnable; expected vanilla"),
    "gate": ({"attention_output_gate": True}, "attention_output_gate is True"),
    "variant": ({"experimental_attention_variant": "dsa"}, "experimental_attention_variant is dsa; expected None"),
    "clamp": ({"activation_func_clamp_value": 7.0}, "activation_func_clamp_value is 7.0; expected None"),
    "offset": ({"glu_linear_offset": 1.0}, "glu_linear_offset is 1.0; expected 0.0"),
    "residual": (
        {"apply_residual_connection_post_layernorm": True},
        "apply_residual_connection_post_layernorm is True",
    ),
    "fp16": ({"fp16": True}, "fp16 is True; expected False"),
    "no layers": ({"num_layers": None}, "its args have num_layers None; expected a whole number"),
}


SPLITS = [
    ({"data_path": ["a"], "split": "60 / 30 / 10"}, {"split": "60,30,10"}),
    ({"data_args_path": "paths.txt", "split": "969, 30, 1"}, {"split": "969,30,1"}),
    ({"train_data_path": ["0.5", "a", "0.5", "b"], "split": None}, {"split": "1"}),
    ({"per_split_data_args_path": "paths.json", "split": None}, {"split": "1"}),
    ({"mock_data": True, "split": "1,1,1"}, {}),
]


@pytest.mark.parametrize(("told", "split"), SPLITS)
def test_the_documents_that_were_trained_on_go_along_however_they_were_named(told, split):
    args = Namespace(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=64, global_batch_size=8, **told)
    assert settings_of(args, Path("there"))["data"] == {"seq_length": 64, **split}


def written_args(rank: int, world_size: int, folder: str, changed: dict[str, Any], settings: Settings) -> None:
    from tiny import parsed

    args = arguments(parsed(settings))
    vars(args).update(changed)
    torch.save({"args": args}, Path(folder) / "common.pt")


@pytest.mark.parametrize("name", REFUSED)
def test_another_model_than_ours_is_refused_by_the_arguments_name(ranks, prefix, tmp_path, name):
    changed, message = REFUSED[name]
    source = tmp_path / "source"
    source.mkdir()
    ranks.run(1, written_args, str(source), changed, tiny_config(prefix, tmp_path))
    code, told = ranks.run(1, ptrl, "convert", "--input", str(source), "--output", str(tmp_path / "out"))[0]
    assert code == 2 and message in told and told.count("\n") == 1


def tensors_of_models(rank: int, world_size: int, every: list[Settings]) -> list[list[dict[str, tuple[int, ...]]]]:
    """For each model, tensors by name and shape: ours, and those that Megatron-Core saves of it."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from tiny import parsed

    from megatron_ptrl.conversion.megatron_tensors import tensors_of
    from megatron_ptrl.training import layers, mcore

    pairs = []
    for settings in every:
        config = parsed(settings)
        mcore.initialize(config)
        # Ours without Transformer Engine are of one kind; Megatron-Core's are of the one that is asked for.
        with mock.patch.object(layers, "RMSNorm", WrappedTorchNorm):
            (model,) = mcore.build_frozen_model(config, 512)
        state = model.sharded_state_dict(prefix="", metadata={})
        apply_factories(state)
        leaves = [leaf for value in state.values() for leaf in (value if isinstance(value, list) else [value])]
        saved = {leaf.key: tuple(leaf.global_shape) for leaf in leaves if isinstance(leaf, ShardedTensor)}
        pairs.append([tensors_of(config.model, 512), saved])
        mcore.parallel_state.destroy_model_parallel()
    return pairs


def test_a_model_has_the_tensors_that_megatron_core_saves_of_it(ranks, prefix, tmp_path):
    plain = {"gated_linear_unit": False, "activation_func": "gelu", "qk_layernorm": False}
    kinds = (
        {},
        {"share_embeddings_and_output_weights": False, "kv_channels": 24, "add_qkv_bias": True},
        {"normalization": "LayerNorm", "add_bias_linear": True, "num_query_groups": 4, **plain},
        {"normalization": "LayerNorm", "add_bias_linear": True},
    )
    every = [tiny_config(prefix, tmp_path, **{f"model__{k}": v for k, v in kind.items()}) for kind in kinds]
    for ours, saved in ranks.run(1, tensors_of_models, every)[0]:
        assert ours == saved


TENSORS: dict[str, tuple[Any, str]] = {
    "missing": (lambda t: t.pop("decoder.final_layernorm.weight"), "has no decoder.final_layernorm.weight, which the"),
    "shape": (
        lambda t: t.update({"decoder.final_layernorm.weight": ((63,), None)}),
        r"decoder.final_layernorm.weight has shape \(63,\); expected \(64,\)",
    ),
    "unknown": (
        lambda t: t.update({"decoder.layers.self_attention.core_attention.softmax_offset": ((4, 4), None)}),
        "has decoder.layers.self_attention.core_attention.softmax_offset, which the model of its args does",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_checkpoint_with_other_tensors_than_its_args_say_is_refused(name):
    from megatron_ptrl.config import ModelConfig
    from megatron_ptrl.conversion.megatron_tensors import check_tensors, tensors_of

    change, message = TENSORS[name]
    model = ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=4)
    stored: dict[str, Any] = {key: (shape, None) for key, shape in tensors_of(model, 512).items()}
    stored["optimizer.state.exp_avg.embedding.word_embeddings.weight"] = ((512, 64), None)
    check_tensors(model, 512, stored, Path("there"), by="args")
    change(stored)
    with pytest.raises(InputError, match=message):
        check_tensors(model, 512, stored, Path("there"), by="args")


class Evil:
    """Unpickled with trust, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("newer", [False, True])
def test_nothing_in_common_pt_is_run(ranks, tmp_path, newer):
    source = tmp_path / "source"
    source.mkdir()
    evil = {"args": Evil(tmp_path / "touched")}
    if newer:
        write(source, [], lambda part: torch.empty(0), objects=[(COMMON_STATE, evil)], common={})
        (source / "common.pt").unlink()
    else:
        torch.save(evil, source / "common.pt")
    code, told = ranks.run(1, ptrl, "convert", "--input", str(source), "--output", str(tmp_path / "out"))[0]
    assert code == 2 and told.count("\n") == 1 and "has more in it than values" in told, told
    assert not (tmp_path / "touched").exists()


def test_a_tracker_without_its_checkpoint_and_a_checkpoint_without_a_tokenizer(ranks, prefix, tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    code, told = ranks.run(1, ptrl, "convert", "--input", str(tmp_path), "--output", str(tmp_path / "out"))[0]
    assert code == 2 and "iter_0000007 has no .metadata; expected a checkpoint" in told
