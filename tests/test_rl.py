"""`ptrl rl` with the real Megatron-Core: the same figures and samples under every layout, and what they must be."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from rl_runs import Letters, make_prompts, read_rollouts, reinforcement, rl_config, run_rl
from tiny import Metrics, Settings, assert_close_metrics, read_metrics, run_tiny, tiny_config

from megatron_ptrl.data.tokenizer import Tokenizer
from megatron_ptrl.records import Judgement, Prompt

STEPS = 2
# Every part of the loss: a reference, two updates of which the second has another ratio, weights by the sampler's
# probabilities, the mean over responses, a lambda, further prompts for groups without a difference.
WHOLE = {
    "policy__kl_coef": 0.1,
    "policy__importance_sampling": "token",
    "policy__aggregation": "sequence_mean",
    "policy__clip_high": 0.28,
    "prompts__msr_weight": 0.5,
    "rollout__updates": 2,
    "rollout__resample": 1,
    "train__steps": STEPS,
}
# 640 columns for 512 tokens: padding must not move a figure.
PADDED = {"model__make_vocab_size_divisible_by": 640}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp 2, sequence parallel": (2, {"parallel__tp": 2, "parallel__sequence_parallel": True}),
    "pp 2": (2, {"parallel__pp": 2}),
    "dp 2": (2, {}),
    "dp 2, pp 2": (4, {"parallel__pp": 2}),
    "microbatches of 1": (1, {"train__micro_batch": 1}),
    "linear head, plain optimizer": (1, {"loss__impl": "linear", "parallel__distributed_optimizer": False}),
}
# Means over hundreds of tokens in another order. Log-probabilities of fp32 differ in their last bits, so that the
# figures that measure just that are compared by nothing but their size.
TOLERANCES = dict.fromkeys(("ce", "entropy", "ratio", "kl", "importance_weight", "ratio_max"), 1e-4)
TOLERANCES |= dict.fromkeys(("reward", "num_tokens", "consumed_samples", "consumed_tokens", "passes"), 0.0)
TOLERANCES |= {"grad_norm": 1e-3, "updates": 0.0, "response_tokens_mean": 0.0, "reward_asr": 0.0, "reward_msr": 0.0}


@pytest.fixture(scope="module")
def start(ranks: Ranks, prefix: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Run directory of a model that has seen a little text."""
    settings = tiny_config(prefix, tmp_path_factory.mktemp("start") / "run", train__steps=8, **PADDED)
    settings["optimizer.lr"] = 5e-3
    run_tiny(ranks, 1, settings)
    return str(settings["run_dir"])


def padded_config(*arguments: Any, **overrides: Any) -> Settings:
    return rl_config(*arguments, **PADDED, **overrides)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[str | float]:
    folder = tmp_path_factory.mktemp("prompts")
    return [0.6, make_prompts(folder / "asr.jsonl", 9), 0.4, make_prompts(folder / "msr.jsonl", 9, "msr")]


@pytest.fixture(scope="module")
def alone(ranks: Ranks, prefix: str, prompts: list, start: str, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of the finished run that all others are held against: one rank, microbatches of 2."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    settings = padded_config(prefix, prompts, run_dir, checkpoint__load=start, **WHOLE)
    run_rl(ranks, 1, settings)
    return settings


def drawn(run_dir: Path | str, steps: int) -> list[tuple]:
    """What was written to which prompt, and what it is worth."""
    names = ("step", "place", "prompt_id", "index", "prompt_ids", "token_ids", "text", "reward", "finish_reason")
    return [tuple(line[name] for name in names) for step in range(steps) for line in read_rollouts(run_dir, step + 1)]


def test_the_run_uses_every_part_of_the_loss(alone):
    rows = read_metrics(alone["run_dir"])
    assert [row["updates"] for row in rows] == [2.0] * STEPS
    assert all(abs(row["ratio"] - 1) > 1e-6 and row["kl"] > 1e-6 for row in rows)
    assert {row["passes"] for row in rows} == {2.0} and all(0 < row["reward"] < 1 for row in rows)
    assert rows[-1]["consumed_samples"] > STEPS * 4, "further prompts were asked for"
    assert all(row["token_mult_prob_error"] < 1 + 1e-5 and row["rollout_kl"] < 1e-9 for row in rows)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_draws_and_learns_alike(ranks, prefix, tmp_path, prompts, start, alone, name):
    world_size, layout = LAYOUTS[name]
    settings = padded_config(prefix, prompts, tmp_path / "run", checkpoint__load=start, **{**WHOLE, **layout})
    rows = run_rl(ranks, world_size, settings)
    assert drawn(tmp_path / "run", STEPS) == drawn(alone["run_dir"], STEPS)
    assert_close_metrics(rows, read_metrics(alone["run_dir"]), TOLERANCES)


def test_a_replay_learns_the_same_without_generating(ranks, prefix, tmp_path, prompts, start, alone):
    replay = {"rollout__replay": str(Path(alone["run_dir"]) / "rollouts")}
    settings = padded_config(prefix, prompts, tmp_path / "run", checkpoint__load=start, **WHOLE, **replay)
    assert run_rl(ranks, 1, settings, Unasked()) == read_metrics(alone["run_dir"])
    other = settings | {"run_dir": str(tmp_path / "other"), "train.seed": 7}
    with pytest.raises(AssertionError, match="has another prompt at place"):
        run_rl(ranks, 1, other)


DAMAGED = {
    "a number that is none": ({"logprobs": [None]}, "tokens and 0 finite log-probabilities; expected at least one"),
    "no tokens": ({"token_ids": [], "logprobs": []}, "0 tokens and 0 finite log-probabilities"),
    "a list of another kind": ({"token_ids": "abc"}, "expected lines as ptrl rl dumps them"),
    "no such field": ({"reward": ...}, "a line has no 'reward'"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_replay_is_refused(tmp_path, name):
    from megatron_ptrl.data.prompts import PlacedPrompt
    from megatron_ptrl.errors import InputError
    from megatron_ptrl.training import rollout_files
    from megatron_ptrl.training.rollouts import Group, Response, Round

    prompt = Prompt(id="p", task="asr", messages=[], target="", reference="")
    placed = PlacedPrompt(0, prompt, [1, 2])
    # To str.splitlines these end lines, to JSON they are letters.
    judgement = Judgement(reward=1.0, reason="judged", prediction="x\u2028y\x85", seconds=0.0)
    response = Response(torch.tensor([3]).numpy(), torch.tensor([-0.5]).numpy(), "stop", judgement)
    found = Round([Group(placed, [response], 0)], next_place=1, passes=1)
    assert rollout_files.write(tmp_path, 1, found, [[0.0]], str) is None
    assert rollout_files.read(tmp_path, 1, lambda place: placed).groups[0].responses[0].judgement == judgement
    first, last = rollout_files.path_of(tmp_path, 1).read_bytes().splitlines()
    changes, message = DAMAGED[name]
    line = {key: value for key, value in (json.loads(first) | changes).items() if value is not ...}
    rollout_files.path_of(tmp_path, 1).write_text(f"{json.dumps(line)}\n{last.decode()}\n")
    with pytest.raises(InputError, match=message):
        rollout_files.read(tmp_path, 1, lambda place: placed)


class Unasked(Letters):
    def judge(self, prompt: Prompt, response: str) -> Judgement:
        raise AssertionError("a replay brings its rewards along")


def gradient_by_hand(rank: int, world_size: int, settings: Settings) -> tuple[Metrics, float]:
    """(the first step's figures, the norm of REINFORCE's gradient on its responses, one at a time in torch)."""
    from megatron_ptrl.training.mcore import unwrap

    with reinforcement(settings, world_size) as run:
        model = unwrap(run.chunks[0])
        before = {name: value.clone() for name, value in model.state_dict().items() if value is not None}
        run._begin()
        figures = run._step()
        run.log.close()
        model.load_state_dict(before)
        groups: dict[int, list[dict[str, Any]]] = {}
        for line in read_rollouts(settings["run_dir"], 1):
            groups.setdefault(line["place"], []).append(line)
        total, tokens, answers = torch.zeros(()), 0, 0
        by_answer = settings["policy.aggregation"] == "sequence_mean"
        for group in groups.values():
            rewards = torch.tensor([line["reward"] for line in group])
            if rewards.std() == 0:
                continue
            for line, advantage in zip(group, (rewards - rewards.mean()) / (rewards.std() + 1e-6), strict=True):
                ids = torch.tensor([line["prompt_ids"] + line["token_ids"]])
                positions = torch.arange(ids.shape[1])[None]
                mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
                # The columns behind the tokenizer's tokens only pad the vocabulary.
                logits = model(ids, positions, mask)[0, :, : run.tokenizer.vocab_size].log_softmax(-1)
                answer = len(line["prompt_ids"])
                logprobs = logits[answer - 1 : -1].gather(-1, ids[0, answer:, None])[:, 0]
                tokens, answers = tokens + len(logprobs), answers + 1
                total = total - advantage * (logprobs.mean() if by_answer else logprobs.sum())
        divisor = answers if by_answer else tokens
        found = torch.autograd.grad(total / divisor, [p for p in model.parameters() if p.requires_grad])
        return figures, float(torch.stack([g.norm() for g in found]).norm())


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_the_first_update_is_reinforce_with_a_ratio_of_1(ranks, prefix, tmp_path, prompts, start, aggregation):
    options = {"optimizer__clip_grad": 0.0, "rollout__samples": 6, "policy__aggregation": aggregation}
    settings = padded_config(prefix, prompts, tmp_path / "run", checkpoint__load=start, **options)
    figures, expected = ranks.run(1, gradient_by_hand, settings)[0]
    assert (figures["ratio"], figures["ratio_max"], figures["clip_share"], figures["kl"]) == (1, 1, 0, 0)
    assert abs(figures["loss"]) < 1 and expected > 0.1
    assert figures["grad_norm"] == pytest.approx(expected, rel=1e-4)


def first_step(rank: int, world_size: int, settings: Settings) -> tuple[Metrics, torch.Tensor]:
    """(the figures of a run's first step, by how many learning rates it moved each parameter that it moved)."""
    from megatron_ptrl.training.mcore import unwrap

    with reinforcement(settings, world_size) as run:
        parameters = list(unwrap(run.chunks[0]).parameters())
        before = [parameter.detach().clone() for parameter in parameters]
        run._begin()
        row = run._step()
        run.log.close()
    moved = [(now.detach() - then).flatten() for now, then in zip(parameters, before, strict=True)]
    return row, torch.cat([part[part != 0] for part in moved]).abs() / row["learning_rate"]


def test_a_run_on_top_of_another_starts_anew_and_is_held_to_that_ones_end(ranks, prefix, tmp_path, prompts, alone):
    adam = {"optimizer__clip_grad": 0.0, "optimizer__weight_decay": 0.0, "optimizer__schedule": "cosine"}
    chained = {"checkpoint__load": alone["run_dir"], "policy__kl_coef": 0.1}
    settings = padded_config(prefix, prompts, tmp_path / "run", **chained, **adam)
    row, moved = ranks.run(1, first_step, settings)[0]
    end = Path(alone["run_dir"]) / "checkpoints" / f"step_{STEPS:08d}"
    told = (tmp_path / "run" / "log.txt").read_text()
    assert f"starting from the weights of {end}\n" in told and f"the policy is held to {end}\n" in told
    # The other run's reference, its own start, is further away than this by orders of magnitude.
    assert abs(row["kl"]) < 1e-9 and read_metrics(alone["run_dir"])[-1]["kl"] > 1e-6
    assert row["step"] == 1 and row["consumed_samples"] == 4 and read_rollouts(tmp_path / "run", 1)[0]["place"] == 0
    assert row["learning_rate"] == settings["optimizer.lr"]
    # Adam's first step is a learning rate long wherever a gradient is larger than its epsilon, its later ones are not.
    assert moved.quantile(0.1) > 0.9 and moved.max() < 1.001


class Unreliable(Letters):
    """Gives no judgement for every third response, and the second group has one that was judged."""

    def __init__(self) -> None:
        self.asked: dict[str, int] = {}

    def judge(self, prompt: Prompt, response: str) -> Judgement:
        index = self.asked[prompt.id] = self.asked.get(prompt.id, -1) + 1
        first = next(iter(self.asked)) == prompt.id
        if index == 2 or (not first and list(self.asked)[1] == prompt.id and index > 0):
            return Judgement(reward=None, reason="timeout", prediction="", seconds=1.0)
        return Judgement(reward=float(index == 0), reason="judged", prediction="", seconds=0.0)


def test_what_could_not_be_judged_is_in_nothing(ranks, prefix, tmp_path, prompts, start):
    settings = padded_config(prefix, prompts, tmp_path / "run", checkpoint__load=start, train__steps=1)
    settings |= {"rollout.max_unjudged": 0.5, "rollout.batch": 1}
    (row,) = run_rl(ranks, 1, settings, Unreliable())
    lines = read_rollouts(tmp_path / "run", 1)
    groups = [lines[i : i + 4] for i in range(0, 16, 4)]
    unjudged = [line for line in lines if line["reward"] is None]
    assert row["unjudged_share"] == row["outcome_timeout"] == len(unjudged) / 16 == 6 / 16
    assert row["reward"] == pytest.approx(4 / 10)
    single = [group for group in groups if sum(line["reward"] is not None for line in group) == 1]
    assert len(single) == 1 and all(line["advantage"] == 0 for line in single[0])
    trained = [line for group in groups if group not in single for line in group if line["reward"] is not None]
    assert row["num_tokens"] == sum(len(line["token_ids"]) for line in trained)
    # Of three that were judged one is right: (1 - 1/3) over the unbiased deviation, the root of 1/3.
    assert {round(line["advantage"], 3) for line in trained} == {1.155, -0.577}
    fewer = settings | {"rollout.max_unjudged": 0.3, "run_dir": str(tmp_path / "fewer")}
    with pytest.raises(AssertionError, match=r"6 of 16 responses could not be judged \(timeout 6\)"):
        run_rl(ranks, 1, fewer, Unreliable())


class Generous(Letters):
    def judge(self, prompt: Prompt, response: str) -> Judgement:
        return Judgement(reward=1.0, reason="judged", prediction="", seconds=0.0)


def test_a_step_without_any_difference_leaves_the_weights_alone(ranks, prefix, tmp_path, prompts, start):
    settings = padded_config(prefix, prompts, tmp_path / "run", checkpoint__load=start, rollout__resample=2)
    rows = run_rl(ranks, 1, settings, Generous())
    assert [row["updates"] for row in rows] == [0.0] * 3 and rows[-1]["consumed_samples"] == 3 * 3 * 4
    assert all(row["all_right_share"] == 1 and row["num_tokens"] == 0 and row["passes"] == 3 for row in rows)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert [f"step {n}: nothing was learnt from {n} steps" in log for n in (1, 2, 3)] == [True, True, False]
    assert log.count("\nnothing was learnt from 3 steps so far (responses all right in 3)") == 1, "at the end, too"
    assert log.count("the prompts are too easy") == 3
    # Of the weights that answered, on what they answered.
    assert all(0 < row["logprob_difference"] + 1e-9 < 1e-5 and row["ratio"] == 1 and row["entropy"] > 1 for row in rows)
    kept = settings | {"run_dir": str(tmp_path / "kept"), "rollout.drop_equal_groups": False, "train.steps": 1}
    (row,) = run_rl(ranks, 1, kept, Generous())
    assert row["num_tokens"] > 0 and row["updates"] == 1 and row["grad_norm"] == 0 and row["passes"] == 1
    assert all(list(row) == list(idle) for idle in rows), "every step logs the same figures"
    (learnt,) = run_rl(ranks, 1, settings | {"run_dir": str(tmp_path / "learnt"), "train.steps": 1})
    assert list(learnt) == list(row) and learnt["updates"] == 1


def test_truncated_responses_can_be_left_out(ranks, prefix, tmp_path, prompts, start):
    settings = padded_config(prefix, prompts, tmp_path / "run", checkpoint__load=start, train__steps=1)
    (row,) = run_rl(ranks, 1, settings | {"rollout.mask_truncated": True})
    lines = read_rollouts(tmp_path / "run", 1)
    assert row["truncated_share"] == sum(line["finish_reason"] == "length" for line in lines) / 16
    stopped = [line for line in lines if line["finish_reason"] == "stop" and line["advantage"] != 0]
    assert row["num_tokens"] == sum(len(line["token_ids"]) for line in stopped)


def test_a_full_disk_costs_the_dump_and_nothing_else(ranks, prefix, tmp_path, prompts, start):
    settings = padded_config(prefix, prompts, tmp_path / "run", checkpoint__load=start, train__steps=2)
    (tmp_path / "run" / "rollouts").mkdir(parents=True)
    (tmp_path / "run" / "rollouts" / ".step_00000001.jsonl.partial").symlink_to("/dev/full")
    rows = run_rl(ranks, 1, settings)
    assert len(rows) == 2 and rows[1]["updates"] == 1
    assert "step 1: its responses were not written" in (tmp_path / "run" / "log.txt").read_text()
    # Not a part of the file either, which would keep the disk full.
    assert [path.name for path in (tmp_path / "run" / "rollouts").iterdir()] == ["step_00000002.jsonl"]


def poisoned(rank: int, world_size: int, settings: Settings) -> str:
    from megatron_ptrl.errors import InputError
    from megatron_ptrl.rollout.engine import Generation

    class Broken:
        name, weight_version = "broken", 0

        def generate(self, requests: Any, **options: Any) -> list[Generation]:
            return [Generation([1, 2], [-1.0, float("nan")], "stop") for _ in requests]

        def sync(self, *arguments: Any) -> None: ...

        def close(self) -> None: ...

    with reinforcement(settings, world_size) as run:
        run._make_engine = Broken
        with pytest.raises(InputError) as caught:
            run.run()
        return str(caught.value)


def test_log_probabilities_that_are_not_finite_are_refused(ranks, prefix, tmp_path, prompts, start):
    settings = padded_config(prefix, prompts, tmp_path / "run", checkpoint__load=start)
    told = ranks.run(1, poisoned, settings)[0]
    assert "by the broken engine: the log-probability of token 1 is nan; expected a finite number" in told
    assert "\n" not in told and not (tmp_path / "run" / "checkpoints").exists()


def test_prompts_that_are_too_long_are_told(ranks, prefix, tmp_path, start):
    path = Path(make_prompts(tmp_path / "p.jsonl", 5))
    long = Prompt(id="long", task="asr", messages=[{"role": "user", "content": "x y " * 90}], target="t", reference="t")
    path.write_bytes(path.read_bytes() + long.to_line() + b"\n")
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}Q: {{ m.content }}{% endfor %}{% if add_generation_prompt %} A:{% endif %}"
    )
    options = {"train__steps": 2, "data__template": str(template)}
    settings = padded_config(prefix, [str(path)], tmp_path / "run", checkpoint__load=start, **options)
    rows = run_rl(ranks, 1, settings)
    rejects = [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]
    assert {line["id"] for line in rejects} == {"long"} and {line["reason"] for line in rejects} == {"too_long"}
    assert rows[-1]["consumed_samples"] == 8 + len(rejects)
    (line, *_) = read_rollouts(tmp_path / "run", 1)
    text = Tokenizer(prefix + ".tokenizer.json").decode(line["prompt_ids"])
    assert text.startswith("Q: ") and text.endswith(" A:"), "written by data.template"
