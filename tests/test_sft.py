"""`ptrl sft` with the real Megatron-Core: the loss of packed rows, the same figures under every layout, resuming."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankError
from sft_runs import fine_tuning, make_chats, run_sft, sft_config
from stage_runs import command
from tiny import Settings, assert_close_metrics, flags, read_metrics, run_tiny, tiny_config

SHAPED = {"loss__beta": -0.25, "loss__lambda_head": 0.1, "loss__lambda_tail": -0.1, "loss__top_k": 20}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp 2, sequence parallel": (2, {"parallel__tp": 2, "parallel__sequence_parallel": True}),
    "pp 2": (2, {"parallel__pp": 2}),
    "dp 2": (2, {}),
    "cp 2": (2, {"parallel__cp": 2}),
    "microbatches of 1, linear head": (1, {"train__micro_batch": 1, "loss__impl": "linear"}),
}
# Means over hundreds of tokens, summed in another order.
TOLERANCES = dict.fromkeys(("loss", "ce", "entropy", "grad_norm"), 1e-4)
TOLERANCES |= dict.fromkeys(("num_tokens", "consumed_samples", "learning_rate"), 1e-12)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", 40)


@pytest.fixture(scope="module")
def alone(ranks, prefix: str, chats: str, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of the finished run that all others are held against: one rank, microbatches of 2, a shaped loss."""
    valid = make_chats(tmp_path_factory.mktemp("valid") / "valid.jsonl", 9, seed=2)
    held_out = {"data__valid": [valid], "train__eval_samples": 99, "train__eval_every": 3}
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    often = {"checkpoint__save_every": 2, "checkpoint__keep_last": 99, "model__hidden_dropout": 0.1}
    settings = sft_config(prefix, chats, run_dir, **SHAPED, **held_out, **often)
    run_sft(ranks, 1, settings)
    return settings


def packed_and_single(rank: int, world_size: int, settings: Settings) -> tuple[float, float, float, int]:
    """(mean loss of an evaluation on packed rows, the same in fp64 from one conversation at a time, tokens, rows)."""
    from megatron_ptrl.training.mcore import unwrap

    with fine_tuning(settings, world_size) as run:
        means = run._held_out_means(run.train_data)
        model, total, count = unwrap(run.chunks[0]).eval(), 0.0, 0
        with torch.no_grad():
            for number in range(len(run.conversations)):
                ids, is_response = (torch.from_numpy(values.copy()) for values in run.conversations[number])
                ids = ids.long()[None]
                size = ids.shape[1]
                ahead = torch.ones(1, 1, size, size, dtype=torch.bool).triu(1)
                logprobs = model(ids, torch.arange(size)[None], ahead)[0].double().log_softmax(-1)
                of_response = -logprobs[:-1].gather(-1, ids[0, 1:, None])[:, 0][is_response[1:]]
                total, count = total + float(of_response.sum()), count + len(of_response)
        run.log.close()
        assert means["num_tokens"] == count and count < run.conversations.about["tokens"] / 2
        return means["ce"], total / count, count, len(run.train_data)


def test_the_loss_of_packed_rows_is_that_of_each_conversation_alone(ranks, prefix, chats, tmp_path):
    start = tiny_config(prefix, tmp_path / "start", train__steps=4, optimizer__lr=5e-3)
    run_tiny(ranks, 1, start)
    load = {"checkpoint__load": str(tmp_path / "start"), "train__epochs": 1}
    packed, single, _, rows = ranks.run(1, packed_and_single, sft_config(prefix, chats, tmp_path / "run", **load))[0]
    assert rows < 40 / 1.5, "several share a row"
    assert packed == pytest.approx(single, rel=1e-5)


def test_every_epoch_trains_every_response_once_and_the_last_step_is_filled_up(alone):
    rows = [row for row in read_metrics(alone["run_dir"]) if "loss" in row]
    (folder,) = [
        path for path in Path(alone["run_dir"], "data_cache").iterdir() if '"conversations": 40' in about(path)
    ]
    expected = json.loads(about(folder))["response_tokens"]
    assert sum(row["num_tokens"] for row in rows) == 2 * expected
    assert rows[-1]["step"] == len(rows) == int(settings_of(alone)["steps"])
    assert rows[-1]["learning_rate"] < rows[0]["learning_rate"]
    held_out = [row["step"] for row in read_metrics(alone["run_dir"]) if "valid_ce" in row]
    assert held_out == sorted({*range(3, len(rows) + 1, 3), len(rows)})


def about(folder: Path) -> str:
    return (folder / "about.json").read_text()


def settings_of(settings: Settings) -> dict[str, str]:
    lines = Path(settings["run_dir"], "config.yaml").read_text().splitlines()
    return dict(line.strip().split(": ", 1) for line in lines if ": " in line)


@pytest.fixture(scope="module")
def three_steps(ranks, alone: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """As `alone`, without dropout, which every layout draws otherwise."""
    run_dir = tmp_path_factory.mktemp("three") / "run"
    settings = alone | {"run_dir": str(run_dir), "model.hidden_dropout": 0.0, "train.steps": 3}
    settings |= {"checkpoint.save_every": 0}
    run_sft(ranks, 1, settings)
    return settings


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_learns_alike(ranks, tmp_path, three_steps, name):
    world_size, layout = LAYOUTS[name]
    changed = {option.replace("__", "."): value for option, value in layout.items()}
    found = run_sft(ranks, world_size, three_steps | {"run_dir": str(tmp_path / "run")} | changed)
    expected = read_metrics(three_steps["run_dir"])
    assert len(expected) == 4 and "valid_ce" in expected[-1]
    assert_close_metrics(found[:3], expected[:3], TOLERANCES)
    assert_close_metrics(found[3:], expected[3:], {"valid_ce": 1e-4, "valid_loss": 1e-4, "valid_num_tokens": 0.0})


def test_a_killed_run_repeats_its_figures_to_the_bit(ranks, alone, tmp_path):
    """As a kill leaves it: metrics after the last whole checkpoint, a save cut short."""
    whole = read_metrics(alone["run_dir"])
    shutil.copytree(alone["run_dir"], tmp_path / "run")
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert len(checkpoints) >= 4
    checkpoints[2].rename(checkpoints[2].with_name(f".{checkpoints[2].name}.partial"))
    for path in checkpoints[3:]:
        shutil.rmtree(path)
    settings = alone | {"run_dir": str(tmp_path / "run")}
    assert run_sft(ranks, 1, settings) == whole
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "continuing from" in log and "(step 4)" in log and "some are seen twice" not in log


def test_changed_conversations_are_told_when_a_run_goes_on(ranks, prefix, chats, tmp_path):
    file = shutil.copy(chats, tmp_path / "chats.jsonl")
    settings = sft_config(prefix, str(file), tmp_path / "run", train__steps=2)
    run_sft(ranks, 1, settings)
    make_chats(Path(file), 41)
    log = tmp_path / "run" / "log.txt"
    run_sft(ranks, 1, settings | {"train.steps": 3})
    assert "data.train is not what it was at the checkpoint: some are seen twice or never" in log.read_text()
    # More steps go on where the others ended.
    rows = run_sft(ranks, 1, settings | {"train.steps": 4})
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert "train.steps was 3, from here on it is 4" in log.read_text() and "another order" not in log.read_text()


def test_from_pretrain_by_the_command_line_to_answers(ranks, prefix, tmp_path):
    start = tiny_config(prefix, tmp_path / "start", train__steps=8, data__seq_length=96)
    run_tiny(ranks, 1, start)
    chats = Path(make_chats(tmp_path / "chats.jsonl", 60))
    chats.write_text(chats.read_text() + '{"text": "a document"}\n')
    held_out = {"data__valid": [make_chats(tmp_path / "valid.jsonl", 9, seed=3)], "train__eval_samples": 9}
    load = {"checkpoint__load": str(tmp_path / "start"), "optimizer__lr": 1e-2, "train__epochs": 5}
    words = flags(sft_config(prefix, str(chats), tmp_path / "run", **load, **held_out))
    planned = ranks.run(1, command, "sft", *words, "--dry_run")[0]
    assert planned[0] == 0 and not (tmp_path / "run").exists()
    code, text, err = ranks.run(1, command, "sft", *words)[0]
    assert (code, err) == (0, "")
    steps = f"{int(settings_of({'run_dir': str(tmp_path / 'run')})['steps'])} steps"
    assert steps in planned[1] and "60 conversations" in planned[1]
    assert "60 conversations" in text and "put aside: 1 x no messages, no prompt and response" in text
    rows = read_metrics(tmp_path / "run")
    trained = [row for row in rows if "loss" in row]
    assert trained[-1]["ce"] < trained[0]["ce"] / 2 and rows[-1]["valid_ce"] < trained[0]["ce"] / 2
    assert "starting from the weights of" in text and "held-out cross entropy" in text
    again = ranks.run(1, command, "sft", *words)[0]
    assert again[0] == 0 and "is complete" in again[1] and read_metrics(tmp_path / "run") == rows


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no tokenizer": ({"data.tokenizer": None}, "data.tokenizer is not set"),
    "no files": ({"data.train": []}, "data.train is empty"),
    "no such file": ({"data.train": ["missing.jsonl"]}, "missing.jsonl: no such file or folder"),
    "no such template": ({"data.template": "chatml"}, "data.template is chatml; expected plain"),
    "no isolation": ({"data.isolate_documents": False}, "data.isolate_documents is false; expected true"),
    "no epochs": ({"train.epochs": 0}, "train.epochs is 0; expected >= 1"),
    "a long warm-up": ({"optimizer.warmup_steps": 99}, "optimizer.warmup_steps 99 leaves nothing of the"),
    "rows too short": ({"data.seq_length": 4}, "no usable conversation in it: 40 x longer than data.seq_length 4"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_in_one_line(ranks, prefix, chats, tmp_path, name):
    changed, reason = BAD[name]
    code, _, err = ranks.run(1, command, "sft", *flags(sft_config(prefix, chats, tmp_path / "run") | changed))[0]
    assert code == 2 and reason in err and err.startswith("ptrl sft") and err.count("\n") == 1


def test_what_rank_0_finds_in_the_files_ends_all_ranks(ranks, prefix, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a document"}\n')
    with pytest.raises(RankError) as caught:
        run_sft(ranks, 2, sft_config(prefix, str(tmp_path / "bad.jsonl"), tmp_path / "run"))
    assert str(caught.value).count("InputError: ") == 2 and "no usable conversation in it" in str(caught.value)
