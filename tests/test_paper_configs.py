"""examples/configs: the YAML files of the papers' settings are read, planned, and of the size that they claim."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from rl_runs import make_prompts
from sft_runs import make_chats
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
    **{f"{stage}-llama3.2-3b": (128_256, 3_212_749_824) for stage in ("sft", "rlpt")},
    **{f"{stage}-qwen3-4b": (151_936, 4_022_468_096) for stage in ("sft", "rlpt")},
    **{f"{stage}-qwen3-8b": (151_936, 8_190_735_360) for stage in ("sft", "rlpt")},
}
SFT = [name for name in PUBLISHED if name.startswith("sft")]
RLPT = [name for name in PUBLISHED if name.startswith("rlpt")]
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


@pytest.mark.parametrize("name", RLPT)
def test_a_config_of_rlpt_has_the_settings_of_the_paper_and_can_be_planned(ranks, prefix, tmp_path, name):
    words = ["--config", str(CONFIGS / f"{name}.yaml"), "--prompts.files", make_prompts(tmp_path / "prompts.jsonl", 64)]
    words += ["--data.tokenizer", f"{prefix}.tokenizer.json", "--run_dir", str(tmp_path / "run")]
    code, text, err = ranks.run(1, dry_run, [*words, "--dry_run_world_size", "64"], "rl")[0]
    assert (code, err) == (0, "")
    settings = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    rollout, optimizer = settings["rollout"], settings["optimizer"]
    assert (rollout["prompts"], rollout["samples"], rollout["max_tokens"], rollout["temperature"]) == (512, 8, 8192, 1)
    assert (optimizer["lr"], optimizer["schedule"], settings["policy"]["kl_coef"]) == (1e-6, "constant", 0)
    assert "512 prompts x 8 = 4,096 responses of up to 8,192 tokens" in text and "no KL, token_mean" in text
    # Keys and values of 36 or 28 layers, 8 groups of 128 over the tensor-parallel ranks, in two bytes.
    layers, tp = settings["model"]["num_layers"], settings["parallel"]["tp"]
    assert f"a KV cache of {2 * layers * 8 / tp * 128 * 2 * 10752 * rollout['batch'] / 2**30:.2f}" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", SFT)
def test_a_config_of_the_cold_start_has_the_settings_of_the_paper_and_can_be_planned(ranks, prefix, tmp_path, name):
    words = ["--config", str(CONFIGS / f"{name}.yaml"), "--data.train", make_chats(tmp_path / "chats.jsonl", 99)]
    words += ["--data.tokenizer", f"{prefix}.tokenizer.json", "--run_dir", str(tmp_path / "run")]
    code, text, err = ranks.run(1, dry_run, [*words, "--dry_run_world_size", "64"], "sft")[0]
    assert (code, err) == (0, "")
    settings = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert (settings["train"]["global_batch"], settings["train"]["epochs"]) == (1024, 3)
    assert "cosine, lr 2e-05 -> 0, warm-up 0 steps" in text and "99 conversations" in text
    assert settings["model"] == yaml.safe_load((CONFIGS / f"{name.replace('sft', 'rlpt')}.yaml").read_text())["model"]
    assert not (tmp_path / "run").exists()


def counted(rank: int, world_size: int, name: str) -> tuple[int, Any]:
    from megatron_ptrl.training import host

    host.install_if_no_cuda()
    from megatron_ptrl.cli import parse
    from megatron_ptrl.config import PretrainConfig, RLConfig, SFTConfig
    from megatron_ptrl.training import layers, mcore, plan

    words = ["--config", str(CONFIGS / f"{name}.yaml")]
    words += ["--remit.sidecar", "any"] if "remit" in name else []
    stages = {"rlpt": RLConfig, "sft": SFTConfig}
    config = parse(stages.get(name.split("-")[0], PretrainConfig), words, prog="ptrl")
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
