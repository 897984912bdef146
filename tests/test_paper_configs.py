"""examples/configs: the YAML files of the papers' settings are read, planned, and of the size that they claim."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from test_plan import dry_run

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
# Of a layer of Youtu-LLM-2B: two steps to the queries, two to keys and values, a norm between each, the output.
LATENT_ATTENTION = 2048 * 1536 + 1536 + 1536 * 16 * 192 + 2048 * (512 + 64) + 512 + 512 * 16 * 256 + 2048 * 2048
# Vocabulary, and parameters of the published model: less the QK norms that OLMo 2 has over the whole width and ours per
# head, and with the ordinary attention that stands in for Youtu-LLM's.
LLAMA_3_8B = (128_256, 8_030_261_248)
PUBLISHED = {
    "remit-olmo-1b": (100_278, 1_484_916_736 - 16 * 2 * (2048 - 128)),
    "remit-smollm3-3b": (128_256, 3_075_098_624),
    "remit-youtu-llm-2b": (128_256, 1_961_560_064 + 32 * (4 * 2048 * 2048 - LATENT_ATTENTION)),
    "tpt-abundant": LLAMA_3_8B,
    "tpt-constrained": LLAMA_3_8B,
    "tpt-midtraining": (151_936, 1_543_714_304),
}
REMIT = [name for name in PUBLISHED if name.startswith("remit")]
# Tokens in all and of a step, peak rate, its shape, clipping: table 5 of the paper, 8k and 4M taken as powers of two.
TPT = {
    "tpt-abundant": (25_000 * 2**22, 2**22, 3e-4, "constant", 1.0),
    "tpt-constrained": (40e9, 2**22, 3e-4, "constant", 1.0),
    "tpt-midtraining": (12_500 * 2**23, 2**23, 6e-5, "cosine", 0.3),
}


def test_every_config_is_checked_here() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*PUBLISHED, "tpt-toy"}


@pytest.mark.parametrize("name", REMIT)
def test_a_config_of_the_paper_can_be_planned(ranks, prefix, tmp_path, name):
    words = ["--config", str(CONFIGS / f"{name}.yaml"), "--data.train", prefix, "--remit.sidecar", f"{prefix}.logprob"]
    words += ["--run_dir", str(tmp_path / "run"), "--dry_run_world_size", "8"]
    code, text, err = ranks.run(1, dry_run, words)[0]
    assert (code, err) == (0, "")
    settings = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    train = settings["train"]
    tokens = train["steps"] * train["global_batch"] * settings["data"]["seq_length"]
    assert tokens == pytest.approx(50e9, rel=1e-4) and f"{tokens:,} tokens" in text
    assert settings["optimizer"]["decay_steps"] == train["steps"]
    assert (settings["remit"]["weighting"], settings["remit"]["epsilon"]) == ("remit", 0.2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", TPT)
def test_a_config_of_tpt_has_the_settings_of_the_paper_and_can_be_planned(ranks, prefix, tmp_path, name):
    words = ["--config", str(CONFIGS / f"{name}.yaml"), "--data.train", prefix]
    words += ["--run_dir", str(tmp_path / "run"), "--dry_run_world_size", "32"]
    code, text, err = ranks.run(1, dry_run, words)[0]
    assert (code, err) == (0, "")
    settings = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    train, optimizer = settings["train"], settings["optimizer"]
    step = train["global_batch"] * settings["data"]["seq_length"]
    total, batch, rate, shape, clip = TPT[name]
    assert step == batch and train["steps"] * step == pytest.approx(total, rel=1e-4)
    assert f"{train['steps'] * step:,} tokens" in text
    assert (optimizer["lr"], optimizer["schedule"], optimizer["clip_grad"]) == (rate, shape, clip)
    assert (optimizer["weight_decay"], optimizer["warmup_steps"]) == (0.1, 100)
    assert (optimizer["adam_beta1"], optimizer["adam_beta2"]) == (0.9, 0.95)
    assert not (tmp_path / "run").exists()


def test_the_constrained_config_differs_from_the_abundant_one_in_its_steps_alone():
    abundant, constrained = (
        yaml.safe_load((CONFIGS / f"tpt-{name}.yaml").read_text()) for name in ("abundant", "constrained")
    )
    assert abundant.pop("train") | {"steps": 9537} == constrained.pop("train") and abundant == constrained


def test_the_toy_can_be_planned(ranks, prefix, tmp_path):
    words = ["--config", str(CONFIGS / "tpt-toy.yaml"), "--data.train", prefix, "--run_dir", str(tmp_path / "run")]
    code, text, err = ranks.run(1, dry_run, words)[0]
    assert (code, err) == (0, "") and f"{200 * 8 * 256:,} tokens" in text


def counted(rank: int, world_size: int, name: str) -> tuple[int, Any]:
    from megatron_ptrl.training import host

    host.install_if_no_cuda()
    from megatron_ptrl.cli import parse
    from megatron_ptrl.config import PretrainConfig
    from megatron_ptrl.training import layers, mcore, plan

    words = ["--config", str(CONFIGS / f"{name}.yaml")]
    words += ["--remit.sidecar", "any"] if "remit" in name else []
    config = parse(PretrainConfig, words, prog="ptrl pretrain")
    layers.check_supported(config)
    built = mcore.transformer_config(config)
    padded = mcore.padded_vocab_size(PUBLISHED[name][0], config.model, 1)
    rotary = built.no_rope_freq[:4] if built.no_rope_freq else None
    return plan.count_parameters(config.model, padded, mcore.ffn_size(config.model)).total, rotary


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_model_has_the_size_of_the_published_one(ranks, name):
    total, without_positions = ranks.run(1, counted, name)[0]
    assert total == PUBLISHED[name][1]
    assert without_positions == ([0, 0, 0, 1] if "smollm3" in name else None)
