"""`ptrl convert`: transformers and our model compute the same from the same weights, which come back bit for bit."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hf_models import MODELS, logits_of, make
from stage_runs import command
from tiny import run_tiny, tiny_config

from megatron_ptrl.conversion.hf_config import model_fields_of

pytest.importorskip("transformers")
TOKENS = torch.arange(40) * 7 % 512
# Llama 3's scaling changes what turns once in more than 2048 tokens.
LONG_TOKENS = torch.arange(2300) * 7 % 512


def ptrl(rank: int, world_size: int, *words: str) -> tuple[int, str]:
    """`ptrl` in a process of the pool: its exit code, and all it said."""
    code, out, err = command(rank, world_size, *words)
    return code, out + err


def convert(ranks: Any, source: Path, output: Path, *words: str) -> str:
    code, told = ranks.run(1, ptrl, "convert", "--input", str(source), "--output", str(output), *words)[0]
    assert code == 0, told
    return told


def our_logits(rank: int, world_size: int, run_dir: str, tokens: torch.Tensor) -> torch.Tensor:
    """(s, padded v) of a converted model, by its own config.yaml."""
    from megatron_ptrl.training import host

    host.install_if_no_cuda()
    from megatron_ptrl.cli import parse
    from megatron_ptrl.config import PretrainConfig
    from megatron_ptrl.data.tokenizer import Tokenizer
    from megatron_ptrl.training import checkpoint, mcore
    from megatron_ptrl.training.frozen import load_frozen_model
    from megatron_ptrl.training.resume import check_same_model

    config = parse(PretrainConfig, ["--config", f"{run_dir}/config.yaml", "--parallel.tp=1"], prog="ptrl")
    path = checkpoint.newest_whole(Path(run_dir) / "checkpoints").path
    tokenizer = Tokenizer(config.data.tokenizer, config.data.eod_token)
    check_same_model(path, config, tokenizer)
    mcore.initialize(config)
    (model,) = load_frozen_model(config, path, tokenizer.vocab_size)
    with torch.no_grad():
        return model(tokens[None], torch.arange(len(tokens))[None], None).float()[0]


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers_and_weights_come_back_to_the_bit(ranks, prefix, tmp_path, name):
    import transformers

    source, run, back = tmp_path / "source", tmp_path / "run", tmp_path / "back"
    model = make(source, name, f"{prefix}.tokenizer.json", max_shard_size="60KB" if name == "qwen3" else "5GB")
    assert (source / "model.safetensors.index.json").is_file() == (name == "qwen3")
    tokens = LONG_TOKENS if name == "llama 3" else TOKENS
    theirs = logits_of(model, tokens)
    assert float(theirs.std()) > 0.5
    told = convert(ranks, source, run)
    assert "vocabulary 512 in 520 rows" in told and "'<|endoftext|>'" in told
    ours = ranks.run(1, our_logits, str(run), tokens)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)

    told = convert(ranks, run, back, "--shard_bytes", "60000")
    assert len(list(back.glob("model-*.safetensors"))) > 3 and "520" not in told
    again = transformers.AutoModelForCausalLM.from_pretrained(back)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(logits_of(again, tokens), theirs)
    assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert (back / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_llama_3s_scaling_matters_at_this_length(prefix, tmp_path):
    scaled = make(tmp_path / "scaled", "llama 3", f"{prefix}.tokenizer.json")
    plain = {"rope_type": "default", "rope_theta": 500000.0}
    unscaled = make(tmp_path / "plain", "llama 3", f"{prefix}.tokenizer.json", rope_parameters=plain)
    difference = logits_of(scaled, LONG_TOKENS) - logits_of(unscaled, LONG_TOKENS)
    assert float(difference.abs().max()) > 0.01


def test_every_layout_trains_the_converted_model(ranks, prefix, tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    make(source, "qwen3", f"{prefix}.tokenizer.json")
    convert(ranks, source, run, "--seq_length", "64")
    settings = {
        name: value
        for name, value in tiny_config(prefix, tmp_path, train__steps=1, optimizer__warmup_steps=0).items()
        if not name.startswith("model.")
    }
    settings = {"config": str(run / "config.yaml"), **settings, "checkpoint.load": str(run)}
    first = {}
    for layout, world_size in (("alone", 1), ("tp", 2), ("pp", 2)):
        changed = {} if layout == "alone" else {f"parallel.{layout}": 2}
        (figures,) = run_tiny(ranks, world_size, {**settings, "run_dir": str(tmp_path / layout), **changed})
        first[layout] = figures
    assert first["alone"]["ce"] > 6  # random weights of this size are sure of wrong tokens
    for layout in ("tp", "pp"):
        for figure in ("ce", "entropy", "grad_norm"):
            assert first[layout][figure] == pytest.approx(first["alone"][figure], rel=1e-5), (layout, figure)


def test_a_run_of_ours_becomes_a_model_that_transformers_load(ranks, prefix, tmp_path):
    import transformers

    run, out = tmp_path / "run", tmp_path / "out"
    settings = tiny_config(prefix, run, train__steps=4, parallel__tp=2, model__make_vocab_size_divisible_by=768)
    run_tiny(ranks, 2, {**settings, "data.tokenizer": f"{prefix}.tokenizer.json", "data.eod_token": "<|endoftext|>"})
    convert(ranks, run, out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    ours = ranks.run(1, our_logits, str(run), TOKENS)[0]
    assert ours.shape == (40, 768)
    torch.testing.assert_close(logits_of(model, TOKENS), ours[:, :512], rtol=0, atol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(out).eos_token == "<|endoftext|>"
    code, told = ranks.run(1, ptrl, "convert", "--input", str(run), "--output", str(out))[0]
    assert code == 2 and "which exists; name a new folder" in told


def test_bf16_stays_bf16(ranks, prefix, tmp_path):
    import transformers

    source, run, back = tmp_path / "source", tmp_path / "run", tmp_path / "back"
    model = make(source, "qwen2", f"{prefix}.tokenizer.json", dtype=torch.bfloat16)
    convert(ranks, source, run)
    assert "precision: bf16" in (run / "config.yaml").read_text()
    convert(ranks, run, back)
    after = transformers.AutoModelForCausalLM.from_pretrained(back).state_dict()
    before = model.state_dict()
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert all(torch.equal(before[key], after[key]) for key in before)


def peak_of(rank: int, world_size: int, *words: str) -> float:
    """MB that `ptrl` needs at the most in a process of the pool, beyond those at the start."""
    import ctypes
    import gc

    gc.collect()
    # What is freed goes back to the system at once, or the peak would have what the allocator keeps of earlier tests.
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 17)  # M_MMAP_THRESHOLD
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    code, told = ptrl(rank, world_size, *words)
    assert code == 0, told
    return _status("VmHWM") - before


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1e3


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of memory there")
def test_the_model_is_never_in_memory_as_a_whole(ranks, prefix, tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    sizes = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 12}
    make(source, "llama", f"{prefix}.tokenizer.json", **sizes)
    size = (source / "model.safetensors").stat().st_size / 1e6
    largest = 8192 * 512 * 4 / 1e6
    assert size > 8 * largest
    for words in ((source, run), (run, tmp_path / "back")):
        peak = ranks.run(1, peak_of, "convert", "--input", str(words[0]), "--output", str(words[1]))[0]
        assert peak < 3 * largest + 10, (peak, size, largest)


def test_its_settings_are_those_of_every_stage_that_trains(ranks, prefix, tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    make(source, "qwen2", f"{prefix}.tokenizer.json")
    convert(ranks, source, run)
    for stage in ("PretrainConfig", "SFTConfig", "RLConfig"):
        model, tokenizer = ranks.run(1, settings_of, stage, str(run / "config.yaml"))[0]
        assert model["add_qkv_bias"] and model["hidden_size"] == 64 and model["share_embeddings_and_output_weights"]
        assert tokenizer == str(run / "hf" / "tokenizer.json") and Path(tokenizer).is_file()


def settings_of(rank: int, world_size: int, stage: str, path: str) -> tuple[dict[str, Any], str]:
    from megatron_ptrl import config
    from megatron_ptrl.cli import parse
    from megatron_ptrl.training.resume import model_fields

    words = ["--config", path, *(["--data.seq_length=16384"] if stage == "RLConfig" else [])]
    run = parse(getattr(config, stage), words, prog="ptrl")
    return model_fields(run.model), run.data.tokenizer


def test_no_run_continues_from_weights_alone(ranks, prefix, tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    make(source, "llama", f"{prefix}.tokenizer.json")
    convert(ranks, source, run)
    words = ("pretrain", "--config", str(run / "config.yaml"), "--run_dir", str(run), "--data.train", prefix)
    code, told = ranks.run(1, ptrl, *words)[0]
    assert code == 2 and f"start one with --checkpoint.load {run} and another run_dir" in told


def edit_config(folder: Path, **changed: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def rewrite(folder: Path, change: Any) -> None:
    """`change` the dict of tensors of a folder's model."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def garble(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:8] + b"[" + path.read_bytes()[9:])


Q = "model.layers.1.self_attn.q_proj.weight"
REFUSED: dict[str, tuple[Any, str]] = {
    "mixture": (lambda f: edit_config(f, architectures=["Qwen3MoeForCausalLM"]), "architecture Qwen3MoeForCausalLM"),
    "sliding": (lambda f: edit_config(f, use_sliding_window=True), "use_sliding_window is True; expected False"),
    "layers": (lambda f: edit_config(f, layer_types=["sliding_attention"]), "layer_types has sliding_attention"),
    "yarn": (lambda f: edit_config(f, rope_parameters={"rope_type": "yarn"}), "rope_type is yarn; expected default or"),
    "old yarn": (
        lambda f: edit_config(f, rope_parameters=None, rope_scaling={"type": "yarn"}),
        "rope_type is yarn; expected default or",
    ),
    "short rope": (
        lambda f: edit_config(f, rope_scaling={**LLAMA3_SHORT}, rope_parameters=None),
        "original_max_position_embeddings is 4096; expected 8192",
    ),
    "gelu": (lambda f: edit_config(f, hidden_act="gelu"), "hidden_act is gelu; expected silu"),
    "bias": (lambda f: edit_config(f, attention_bias=True), "attention_bias is true; expected false"),
    "quantized": (lambda f: edit_config(f, quantization_config={"bits": 4}), "quantization_config is {'bits': 4}"),
    "heads": (lambda f: edit_config(f, num_attention_heads="4"), "num_attention_heads is 4; expected a whole number"),
    "words": (lambda f: edit_config(f, vocab_size=500), "vocab_size is 500, and .* has tokens up to 511"),
    "end": (lambda f: edit_config(f, eos_token_id=None), "eos_token_id is None, no token of .*--eod_token"),
    "missing": (lambda f: rewrite(f, lambda t: t.pop(Q)), f"has no {Q}, which its config.json asks for"),
    "unknown": (lambda f: rewrite(f, lambda t: t.update(other=t[Q].clone())), "has other, which is unknown"),
    "shape": (
        lambda f: rewrite(f, lambda t: t.update({Q: t[Q][:-1]})),
        rf"{Q} has shape \(63, 64\); expected \(64, 64\)",
    ),
    "type": (lambda f: rewrite(f, lambda t: t.update({Q: t[Q].long()})), f"{Q} is of type I64; expected one of F32"),
    "types": (
        lambda f: rewrite(f, lambda t: t.update({Q: t[Q].bfloat16()})),
        f"{Q}, .* expected the same, they are packed",
    ),
    "tied": (
        lambda f: edit_config(f, tie_word_embeddings=True),
        "lm_head.weight, which config.json says is the embedding .* but it differs",
    ),
    "cut": (cut, r"model.safetensors has \d+ bytes, and its tensors end at \d+; it was cut short"),
    "garbled": (garble, "its header is not one of safetensors"),
    "pickled": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "pytorch_model.bin is pickled, save the model as safetensors",
    ),
    "tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: no such file; expected a fast tokenizer"),
    "nothing": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
}
LLAMA3_SHORT = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 4096,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_refused_by_name(ranks, prefix, tmp_path, name):
    source, output = tmp_path / "source", tmp_path / "output"
    make(source, "llama", f"{prefix}.tokenizer.json")
    change, message = REFUSED[name]
    change(source)
    code, told = ranks.run(1, ptrl, "convert", "--input", str(source), "--output", str(output))[0]
    assert code == 2 and told.count("\n") == 1, told
    with pytest.raises(ValueError, match=message):
        raise ValueError(told)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_tied_models_copy_of_the_embedding_is_let_through(ranks, prefix, tmp_path):
    source = tmp_path / "source"
    make(source, "qwen2", f"{prefix}.tokenizer.json")
    rewrite(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    convert(ranks, source, tmp_path / "run")


def test_a_checkpoint_of_another_model_than_the_one_it_is_to_be_like(ranks, prefix, tmp_path):
    for name in ("llama", "qwen2"):
        make(tmp_path / name, name, f"{prefix}.tokenizer.json")
    convert(ranks, tmp_path / "llama", tmp_path / "run")
    words = ("--input", str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--like", str(tmp_path / "qwen2"))
    code, told = ranks.run(1, ptrl, "convert", *words)[0]
    assert code == 2 and "is of a model with add_qkv_bias True, this checkpoint has False" in told


def test_the_token_that_a_run_has_learnt_to_end_with_comes_first(ranks, prefix, tmp_path):
    import transformers

    source, run, out = tmp_path / "source", tmp_path / "run", tmp_path / "out"
    make(source, "qwen2", f"{prefix}.tokenizer.json", eos_token_id=[5, 7])
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 5, "temperature": 0.5}))
    word = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{prefix}.tokenizer.json").convert_ids_to_tokens(5)
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": word}, "legacy": True}))
    convert(ranks, source, run, "--eod_token", "<|endoftext|>")
    convert(ranks, run, out)
    files = ("config.json", "generation_config.json", "tokenizer_config.json")
    config, generation, tokenizer = (json.loads((out / name).read_text()) for name in files)
    assert config == {**json.loads((source / "config.json").read_text()), "eos_token_id": [0, 5, 7]}
    assert generation == {"eos_token_id": [0, 5], "temperature": 0.5}
    assert tokenizer == {"eos_token": "<|endoftext|>", "legacy": True}


def test_a_head_of_qwen3_is_128_wide_unless_its_config_says_otherwise():
    import transformers

    config = transformers.Qwen3Config(hidden_size=64, num_attention_heads=4, rope_theta=10000.0).to_dict()
    config |= {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 4, "layer_types": None}
    assert model_fields_of(config, Path("there"))["kv_channels"] == config.pop("head_dim")
    assert model_fields_of(config, Path("there"))["kv_channels"] == transformers.Qwen3Config().head_dim
    assert model_fields_of({**config, "head_dim": None}, Path("there"))["kv_channels"] is None


def test_what_of_the_input_cannot_be_read_is_named(ranks, prefix, tmp_path):
    source, output = tmp_path / "source", tmp_path / "output"
    make(source, "llama", f"{prefix}.tokenizer.json")
    code, told = ranks.run(1, unreadable, "vocab.json", str(source), str(output))[0]
    assert code == 2 and f"{source / 'vocab.json'}: Permission denied; {output} was not written" in told, told


def unreadable(rank: int, world_size: int, name: str, source: str, output: str) -> tuple[int, str]:
    """`ptrl convert` of a folder with a file that may not be read; as root one may read all, so `open` says it."""
    path = Path(source) / name
    path.write_text("{}")
    true_open = open

    def refusing(file: Any, *arguments: Any, **named: Any) -> Any:
        if str(file) == str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return true_open(file, *arguments, **named)

    with mock.patch("builtins.open", refusing):
        return ptrl(rank, world_size, "convert", "--input", source, "--output", output)


KILL = """
import os, signal, sys
from megatron_ptrl.__main__ import main
from megatron_ptrl.training import checkpoint
checkpoint.write_manifest = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
main(sys.argv[1:])
"""


def test_a_killed_conversion_leaves_nothing_that_looks_whole(ranks, prefix, tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    make(source, "llama", f"{prefix}.tokenizer.json")
    words = ["convert", "--input", str(source), "--output", str(run)]
    done = subprocess.run([sys.executable, "-c", KILL, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == -9, done.stderr
    (left,) = set(tmp_path.iterdir()) - {source}
    assert left.name == ".run.partial" and list(left.rglob("*.distcp"))
    code, told = ranks.run(1, ptrl, "convert", "--input", str(left), "--output", str(tmp_path / "out"))[0]
    assert code == 2 and "no whole checkpoint" in told
    convert(ranks, source, run)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "run"}
