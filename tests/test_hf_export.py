"""What is exported is the model that is trained: transformers computes the same from it, under any layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_layouts import TP_PP_SP
from tiny import Settings, parsed, pretraining, tiny_config

from megatron_ptrl.errors import InputError

LARGE = {"model__init_method_std": 0.2, "model__rotary_base": 500, "model__layernorm_epsilon": 1e-3}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3ForCausalLM": {"model__kv_channels": 24},
    "LlamaForCausalLM": {"model__qk_layernorm": False, "model__share_embeddings_and_output_weights": False},
    "Qwen2ForCausalLM": {"model__qk_layernorm": False, "model__add_qkv_bias": True, "model__num_query_groups": 4},
    "Llama with biases": {"model__qk_layernorm": False, "model__add_bias_linear": True},
}


def exported(rank: int, world_size: int, settings: Settings, folder: str) -> torch.Tensor:
    """Writes the model, with biases and norms that are not those of a new one; returns logits of fixed tokens."""
    with pretraining(settings, world_size) as run:
        from megatron.core import parallel_state

        from megatron_ptrl.training.hf_export import export_hf
        from megatron_ptrl.training.mcore import unwrap

        for chunk in run.chunks:
            model = unwrap(chunk)
            for name, parameter in model.named_parameters():
                within = name.split(".layers.")[-1]
                if parameter.dim() == 1:
                    number = model.decoder.layers[int(within.split(".")[0])].layer_number if ".layers." in name else 0
                    size = parameter.numel()
                    cut = "bias" in name and ("qkv" in name or "fc1" in name)
                    whole = torch.linspace(-1, 1, size * (run.config.parallel.tp if cut else 1))
                    if "fc1" in name:  # each rank has its part of the gate, then of the up projection
                        parts = [half.chunk(run.config.parallel.tp) for half in whole.chunk(2)]
                        mine = torch.cat([half[parallel_state.get_tensor_model_parallel_rank()] for half in parts])
                    else:
                        mine = whole.chunk(run.config.parallel.tp)[parallel_state.get_tensor_model_parallel_rank()]
                        mine = mine if cut else whole
                    parameter.data.add_(mine * 0.3 / (1 + number))
        export_hf(run.config, run.chunks, run.tokenizer, Path(folder))
        if world_size > 1:
            return torch.zeros(0)
        tokens = torch.arange(40)[None] * 7 % 512
        run.chunks[0].eval()
        with torch.no_grad():
            return run.chunks[0](tokens, torch.arange(40)[None], None).float()[0]


def export(ranks: Any, prefix: str, tmp_path: Path, name: str, world_size: int = 1, **layout: Any) -> tuple[Path, Any]:
    folder = tmp_path / f"{name}{world_size}"
    folder.mkdir()
    settings = tiny_config(prefix, tmp_path / "run", **LARGE, **MODELS[name], **layout)
    return folder, ranks.run(world_size, exported, settings, str(folder))[0]


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same_logits(ranks, prefix, tmp_path, name):
    transformers = pytest.importorskip("transformers")
    folder, logits = export(ranks, prefix, tmp_path, name, model__make_vocab_size_divisible_by=768)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    assert type(model).__name__ == json.loads((folder / "config.json").read_text())["architectures"][0]
    assert type(model).__name__ == name.replace("Llama with biases", "LlamaForCausalLM")
    with torch.no_grad():
        theirs = model(torch.arange(40)[None] * 7 % 512).logits[0]
    assert theirs.shape == (40, 512) and logits.shape == (40, 768)
    assert float(logits.std()) > 0.5
    torch.testing.assert_close(theirs, logits[:, :512], rtol=0, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id
    text = "def f(x): return x  # a text"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


LAYOUTS = {
    "tp 2, pp 2": (4, TP_PP_SP),
    "pp 2, interleaved": (2, {"parallel__pp": 2, "parallel__vpp": 2}),
    "dp 2": (2, {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["Qwen3ForCausalLM", "Llama with biases"])
def test_every_layout_writes_the_same_weights(ranks, prefix, tmp_path, name, layout):
    world_size, changed = LAYOUTS[layout]
    alone, _ = export(ranks, prefix, tmp_path, name)
    shared, _ = export(ranks, prefix, tmp_path, name, world_size, **changed)
    assert read(shared / "model.safetensors") == read(alone / "model.safetensors")
    assert (shared / "config.json").read_text() == (alone / "config.json").read_text()


def read(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape and bytes of each tensor."""
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    del header["__metadata__"]
    return {
        name: (told["dtype"], tuple(told["shape"]), content[begin + told["data_offsets"][0] :][: _size(told)])
        for name, told in header.items()
    }


def _size(told: dict[str, Any]) -> int:
    return told["data_offsets"][1] - told["data_offsets"][0]


def test_bf16_weights_stay_bf16(ranks, prefix, tmp_path):
    name = "Qwen3ForCausalLM"
    alone, _ = export(ranks, prefix, tmp_path, name, train__precision="bf16")
    shared, _ = export(ranks, prefix, tmp_path, name, 2, train__precision="bf16", parallel__tp=2)
    weights = read(alone / "model.safetensors")
    assert weights == read(shared / "model.safetensors") and {told[0] for told in weights.values()} == {"BF16"}
    assert json.loads((alone / "config.json").read_text())["dtype"] == "bfloat16"


def round_trip(rank: int, world_size: int, settings: Settings) -> int:
    """Every weight of the model of one rank, cut for two, packed for Hugging Face, cut again."""
    with pretraining(settings, world_size) as run:
        from megatron_ptrl.training.hf_names import Sizes, find, from_hf, to_hf
        from megatron_ptrl.training.mcore import unwrap

        sizes, count = Sizes(4, 2, 16, run.tokenizer.vocab_size), 0
        for name, whole in unwrap(run.chunks[0]).named_parameters():
            weight, _ = find(name)
            shards = from_hf(weight, to_hf(weight, [whole], sizes), sizes, 2, padded_vocab=512)
            for again in (to_hf(weight, shards, sizes), to_hf(weight, [whole], sizes)):
                assert all(map(torch.equal, again, to_hf(weight, [whole], sizes)))
            (back,) = from_hf(weight, to_hf(weight, shards, sizes), sizes, 1, padded_vocab=512)
            assert torch.equal(back, whole), name
            count += 1
        return count


def test_the_table_goes_both_ways(ranks, prefix, tmp_path):
    assert ranks.run(1, round_trip, tiny_config(prefix, tmp_path / "run"))[0] == 2 + 4 * 8


def test_the_table_knows_transformer_engines_names():
    from megatron_ptrl.training.hf_names import find

    for fused, plain in (
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    ):
        known = find(f"decoder.layers.3.{fused}")
        assert known is not None and known == find(f"decoder.layers.3.{plain}")
    assert find("decoder.layers.0.mlp.router.weight") is None and find("input_layernorm.weight") is None


REFUSED = {
    "model.num_moe_experts is 2": {"model__num_moe_experts": 2},
    "model.activation_func is gelu": {"model__activation_func": "gelu"},
    "model.qk_layernorm with biases": {"model__add_qkv_bias": True},
}


def refused(rank: int, world_size: int, settings: Settings) -> str:
    from megatron_ptrl.training.hf_export import architecture

    with pytest.raises(InputError) as caught:
        architecture(parsed(settings))
    return str(caught.value)


@pytest.mark.parametrize("told", REFUSED)
def test_a_model_that_hugging_face_does_not_have_is_refused(ranks, prefix, tmp_path, told):
    assert told in ranks.run(1, refused, tiny_config(prefix, tmp_path, **REFUSED[told]))[0]


def full(rank: int, world_size: int, settings: Settings, folder: str) -> str:
    with pretraining(settings, world_size) as run:
        from megatron_ptrl.training.hf_export import export_hf

        try:
            export_hf(run.config, run.chunks, run.tokenizer, Path(folder))
        except InputError as error:
            return str(error)
        return "sent all"


def test_a_full_disk_is_told_and_leaves_no_rank_waiting(ranks, prefix, tmp_path):
    (tmp_path / "model.safetensors").symlink_to("/dev/full")
    told = ranks.run(2, full, tiny_config(prefix, tmp_path / "run", parallel__tp=2), str(tmp_path))
    assert "No space left on device; the weights for the servers" in told[0] and told[1] == "sent all"
