"""The command line: bad input ends in one line and exit code 2, and what it prints it also reads."""

import contextlib
import io
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rl_runs import make_prompts, rl_config
from tiny import VOCAB, flags, tiny_config

from megatron_ptrl.__main__ import _STAGES, main
from megatron_ptrl.cli import parse
from megatron_ptrl.config import ReportConfig, TokenizeConfig

Answer = tuple[int, str, str]


def call(rank: int, world_size: int, command_lines: list[list[str]]) -> list[Answer]:
    """(exit code, stdout, stderr) of each, in a process of the pool: a stage that trains may patch torch."""
    answers = []
    for words in command_lines:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(words)
            except SystemExit as end:
                code = int(end.code or 0)
        answers.append((code, out.getvalue(), err.getvalue()))
    return answers


def call_without(rank: int, world_size: int, package: str, command_lines: list[list[str]]) -> list[Answer]:
    """`call` where `package` and what imports it are not there."""
    # Not patch.dict, which would drop the modules that are imported meanwhile too, and their classes be made twice.
    had = sys.modules.get(package)
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        return call(rank, world_size, command_lines)
    finally:
        del sys.modules[package]
        if had is not None:
            sys.modules[package] = had


def refused(answer: Answer, *parts: str) -> None:
    code, out, err = answer
    assert code == 2 and out == "", answer
    assert err.startswith("ptrl ") and err.count("\n") == 1 and "Traceback" not in err, err
    assert [part for part in parts if part not in err] == [], err


@pytest.mark.parametrize(
    "words, parts",
    [
        (["train"], ["there is no stage train", ", ".join(_STAGES)]),
        (["pretrain", "--train.stepz", "3"], ["no configuration key train.stepz", "nearest field is train.steps"]),
    ],
)
def test_a_real_process_ends_with_one_line_and_code_2(words, parts):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "megatron_ptrl", *words], capture_output=True, text=True, timeout=120
    )
    refused((result.returncode, result.stdout, result.stderr), *parts)


PARSING: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown group": ({"trian.steps": 3}, ["trian.steps", "train.steps"]),
    "unknown field of Megatron's": ({"model.moe_router_topkk": 2}, ["model.moe_router_topkk", "model.moe_router_topk"]),
    "hyphen": ({"run-dir": "r"}, ["no configuration key run-dir", "nearest field is run_dir"]),
    "abbreviation": ({"train.step": 3}, ["no configuration key train.step", "nearest field is train.steps"]),
    "text for a number": ({"train.steps": "many"}, ["train.steps", "int", "many"]),
    "fraction for an integer": ({"model.num_layers": 2.5}, ["model.num_layers", "int", "2.5"]),
    "number for a switch": ({"parallel.sequence_parallel": 3}, ["parallel.sequence_parallel", "bool", "3"]),
    "unknown choice": ({"optimizer.schedule": "linear"}, ["optimizer.schedule", "cosine", "linear"]),
    "beta -1": ({"loss.beta": -1.0}, ["beta is -1.0", "expected > -1"]),
    "beta infinite": ({"loss.beta": ".inf"}, ["beta"]),
    "beta NaN": ({"loss.beta": ".nan"}, ["beta"]),
    "lambda NaN": ({"loss.lambda_tail": ".nan"}, ["lambda_tail"]),
    "top_k 0": ({"loss.top_k": 0}, ["top_k is 0", ">= 1"]),
    "megatron with beta": ({"loss.impl": "megatron", "loss.beta": 0.5}, ["impl is megatron", "reward_shaped"]),
    "gradients without linear": ({"loss.recompute_logits": False}, ["loss.recompute_logits", "impl reward_shaped"]),
    "no layers": ({"model.num_layers": 0}, ["model.num_layers is 0", ">= 1"]),
    "heads": ({"model.hidden_size": 66}, ["model.hidden_size 66", "model.num_attention_heads 4", "kv_channels"]),
    "tp 0": ({"parallel.tp": 0}, ["parallel.tp is 0"]),
    "min_lr": ({"optimizer.min_lr": 1.0}, ["optimizer.min_lr is 1.0", "lr 0.002"]),
    "keep nothing": ({"checkpoint.keep_last": 0}, ["checkpoint.keep_last is 0"]),
}
BEFORE_TRAINING: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no data": ({"data.train": []}, ["data.train is empty", "ptrl tokenize"]),
    "batch": ({"train.global_batch": 9}, ["train.global_batch 9", "train.micro_batch 2", "a multiple of 2"]),
    "too few ranks": ({"parallel.tp": 2}, ["1 ranks", "parallel.tp 2", "launch a multiple of 2"]),
    "warm-up": ({"optimizer.warmup_steps": 10}, ["optimizer.warmup_steps 10", "10 steps"]),
    "wsd": (
        {"optimizer.schedule": "wsd", "optimizer.decay_steps": 9},
        ["optimizer.warmup_steps 2", "decay_steps 9", "train.steps 10"],
    ),
    "sample from MTP": ({"model.mtp_num_layers": 1, "sample.tokens": 4}, ["sample.tokens", "mtp_num_layers"]),
    "LayerNorm": ({"model.normalization": "LayerNorm"}, ["model.normalization is LayerNorm", "RMSNorm"]),
    "long": ({"data.seq_length": 10**7}, ["too few for one sequence of data.seq_length 10000000"]),
    "top_k": (
        {"loss.top_k": VOCAB + 1, "loss.lambda_tail": -0.1},
        [f"top_k is {VOCAB + 1}", f"at most the {VOCAB} tokens"],
    ),
}


def test_what_cannot_be_parsed_or_is_out_of_range_is_refused(ranks, prefix, tmp_path):
    lines = [["pretrain", *flags(tiny_config(prefix, tmp_path) | changed)] for changed, _ in PARSING.values()]
    for answer, (_, parts) in zip(ranks.run(1, call, lines)[0], PARSING.values(), strict=True):
        refused(answer, *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", BEFORE_TRAINING)
def test_what_cannot_be_trained_is_refused(ranks, prefix, tmp_path, name):
    changed, parts = BEFORE_TRAINING[name]
    (answer,) = ranks.run(1, call, [["pretrain", *flags(tiny_config(prefix, tmp_path) | changed)]])[0]
    code, _, err = answer
    refused((code, "", err), *parts)


def break_index(prefix: str) -> str:
    Path(prefix + ".idx").unlink()
    return "no such file"


def break_tokens(prefix: str) -> str:
    path = Path(prefix + ".bin")
    path.write_bytes(path.read_bytes()[:-2])
    return "bytes, expected"


def break_tokenizer(prefix: str) -> str:
    path = Path(prefix + ".tokenizer.json")
    path.write_text(path.read_text() + " ")
    return "was tokenized with"


@pytest.mark.parametrize("damage", [break_index, break_tokens, break_tokenizer])
def test_damaged_data_are_refused(ranks, prefix, tmp_path, damage):
    for path in Path(prefix).parent.glob("corpus.*"):
        shutil.copy(path, tmp_path)
    copy = str(tmp_path / "corpus")
    expected = damage(copy)
    (answer,) = ranks.run(1, call, [["pretrain", *flags(tiny_config(copy, tmp_path / "run"))]])[0]
    refused((answer[0], "", answer[2]), copy, expected)


def test_a_wrong_key_in_yaml_and_a_missing_file_are_refused(ranks, tmp_path):
    nested, top = tmp_path / "nested.yaml", tmp_path / "top.yaml"
    nested.write_text("optimizer:\n  learning_rate: 1\n  warmup_step: 3\n")
    top.write_text("optimiser:\n  lr: 1\n")
    lines = [["pretrain", "--config", str(path)] for path in (nested, top, tmp_path / "none.yaml")]
    in_nested, in_top, missing = ranks.run(1, call, lines)[0]
    refused(in_nested, "optimizer.")
    refused(in_top, "optimiser", "optimizer")
    refused(missing, "none.yaml")


def test_printed_settings_are_read_back_as_the_same_settings(ranks, prefix, tmp_path):
    changed = {"model.num_moe_experts": 4, "model.moe_layer_freq": [0, 1, 1, 0], "loss.beta": -0.25}
    changed |= {"data.train": ["0.7", prefix, "0.3", prefix], "data.eod_token": "<|endoftext|>", "parallel.vpp": None}
    words = flags(tiny_config(prefix, tmp_path) | changed)
    ((code, printed, _),) = ranks.run(1, call, [["pretrain", *words, "--print_config"]])[0]
    assert code == 0
    file = tmp_path / "printed.yaml"
    file.write_text(printed)
    (_, again, _), (_, changed_again, _) = ranks.run(
        1,
        call,
        [
            ["pretrain", "--config", str(file), "--print_config"],
            ["pretrain", "--config", str(file), "--loss.beta", "0.5", "--print_config"],
        ],
    )[0]
    assert again == printed
    settings = yaml.safe_load(printed)
    assert settings["data"]["train"] == ["0.7", prefix, "0.3", prefix] and settings["loss"]["beta"] == -0.25
    assert settings["model"]["moe_layer_freq"] == [0, 1, 1, 0]
    settings["loss"]["beta"] = 0.5
    assert yaml.safe_load(changed_again) == settings, "a flag behind a file changes just its own field"


def test_a_runs_own_config_repeats_the_run(ranks, prefix, tmp_path):
    changed = {"train.steps": 3, "model.num_layers": 1, "model.num_moe_experts": 2, "loss.lambda_tail": -0.1}
    words = ["pretrain", *flags(tiny_config(prefix, tmp_path / "run") | changed)]
    ((code, _, err),) = ranks.run(1, call, [words])[0]
    assert code == 0, err
    own = tmp_path / "run" / "config.yaml"
    first, again = ranks.run(
        1, call, [[*words, "--print_config"], ["pretrain", "--config", str(own), "--print_config"]]
    )[0]
    assert first == again
    assert first[1]


def test_a_list_takes_several_words_and_json():
    def read(*words: str) -> list[str]:
        return parse(TokenizeConfig, list(words), prog="ptrl tokenize").input

    assert read("--input", "a", "b", "--output", "c") == ["a", "b"]
    assert read("--output", "c", "--input", "a") == ["a"]
    assert read("--output", "c", '--input=["a", "b"]') == ["a", "b"]
    assert read("--output", "c", "--input", '["a", "b"]') == ["a", "b"]


def test_a_blend_keeps_its_weights_and_order(ranks, prefix, tmp_path):
    words = ["pretrain", "--data.train", "0.7", "a", "0.3", "b", "--run_dir", "r", "--print_config"]
    ((_, printed, _),) = ranks.run(1, call, [words])[0]
    assert yaml.safe_load(printed)["data"]["train"] == ["0.7", "a", "0.3", "b"]


def test_bare_words_are_the_runs_of_a_report():
    config = parse(ReportConfig, ["one", "two", "--output", "out"], prog="ptrl report", positional="runs")
    assert (config.runs, config.output) == (["one", "two"], "out")


def test_every_stage_has_a_help_page(ranks):
    help_pages = ranks.run(1, call, [[], ["--help"], *([stage, "--help"] for stage in _STAGES)])[0]
    (code_without, usage, _), (code, usage_again, _), *pages = help_pages
    assert (code_without, code) == (2, 0) and usage == usage_again
    assert all(f"  {stage} " in usage for stage in _STAGES)
    for stage, (code, text, _) in zip(_STAGES, pages, strict=True):
        assert code == 0 and f"usage: ptrl {stage}" in text
        assert "Config(" not in text, "a heading that is no sentence but a signature"
    assert "--loss.beta" in pages[list(_STAGES).index("pretrain")][1]


def test_a_judge_whose_package_is_missing_is_refused_before_anything_is_built(ranks, prefix, tmp_path):
    run_dir = tmp_path / "run"
    asked = ["--judge.kind", "openai", "--judge.servers", "http://localhost:1"]
    lines = [
        ["rl", *flags(rl_config(prefix, [make_prompts(tmp_path / "prompts.jsonl", 4)], run_dir)), *asked],
        ["evaluate", "--checkpoint", str(run_dir), "--prompts", str(tmp_path / "prompts.jsonl"), *asked],
    ]
    for package, words in (("aiohttp", lines), ("rapidfuzz", [line[: -len(asked)] for line in lines])):
        for answer in ranks.run(1, call_without, package, words)[0]:
            refused(answer, f"needs {package}; pip install megatron-ptrl[rl]")
    assert not run_dir.exists()


def test_what_a_damaged_file_holds_does_not_reach_the_terminal(tmp_path, capsys):
    """Colours, line ends, C1 escapes and marks that turn the direction of a text are shown as `repr` does."""
    (tmp_path / "metrics.jsonl").write_bytes("\x1b]0;title\x07\x1b[31m é\x9b2J \u202ereversed\r x\n{}\n".encode())
    code = main(["report", str(tmp_path)])
    refused((code, *capsys.readouterr()), "metrics.jsonl:1 is not JSON", r"\x1b]0;title\x07\x1b[31m é\x9b2J \u202erev")

    code = main(["report", str(tmp_path / "a\x1b[2J\nb")])
    refused((code, *capsys.readouterr()), r"a\x1b[2J\nb has no metrics.jsonl")
