"""examples/flywheel: the whole loop at its smallest, and the parts that decide what its table means."""

import json
import random
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_examples import run_small
from tiny import Settings, pretraining, tiny_config

FOLDER = Path(__file__).parents[1] / "examples" / "flywheel"
sys.path.insert(0, str(FOLDER))

from problems import draw_problem, is_held_out, is_right  # noqa: E402


@pytest.mark.slow
def test_the_loop_runs_from_text_to_a_table_and_a_report(tmp_path: Path) -> None:
    header, _, *models = run_small("flywheel", tmp_path, "--methods", "vanilla", "remit")
    assert header == ["", "seeds", "right", "CE problems", "CE prose", "mean weight"]
    assert [row[:2] for row in models] == [["pre-trained", "1"], ["RL-tuned", "1"], ["vanilla", "1"], ["remit", "1"]]
    by_name = {row[0]: row[2:] for row in models}
    assert by_name["vanilla"] != by_name["remit"] != by_name["pre-trained"]
    logged = [json.loads(line) for line in (tmp_path / "remit-1" / "metrics.jsonl").open()]
    weights = [line["remit_weight_mean"] for line in logged if "remit_weight_mean" in line]
    assert len(weights) == 4 and by_name["remit"][-1] == f"{statistics.mean(weights):.4f}"
    assert by_name["vanilla"][-1] == "-"
    assert "weights of" in (tmp_path / "rl_tuned" / "log.txt").read_text()
    report = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"ce.png", "weight_histogram.png", "token_weights.html", "summary.md"} <= report


def test_a_worked_solution_is_right_and_a_slip_makes_it_wrong() -> None:
    rng = random.Random(0)
    for _ in range(500):
        good, bad = draw_problem(rng, held_out=False), draw_problem(rng, held_out=False, wrong=True)
        asked = [int(number) for number in re.findall(r"\d+", good.prompt)]
        assert good.answer in (sum(asked), asked[0] * asked[-1])
        assert is_right(good.solution, good.answer) and not is_right(bad.solution, bad.answer)
        # What the steps say is what is true of them.
        for left, right in re.findall(r"([\d+*]+)=(\d+)", good.solution):
            assert eval(left) == int(right)


@pytest.mark.parametrize("text", ["", " Answer", " Answer 120", " Answer 12 0", " Answer 12. No", "12"])
def test_an_answer_that_is_not_the_number_at_the_end_earns_nothing(text: str) -> None:
    assert is_right(" 1+1=2. Answer 12\n", 12) and not is_right(text, 12)


def test_held_out_operands_occur_in_no_training_problem() -> None:
    def operands(held_out: bool) -> set[tuple[str, ...]]:
        rng = random.Random(1)
        drawn = (draw_problem(rng, held_out=held_out) for _ in range(3000))
        return {(*re.findall(r"\d+", p.prompt), str(p.answer)) for p in drawn}

    assert not operands(True) & operands(False)
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    assert statistics.mean(is_held_out(a, b, "+") for a, b in pairs) == pytest.approx(1 / 8, abs=0.01)
    for modulus in (4, 8, 10):
        for rest in range(modulus):
            share = statistics.mean(is_held_out(a, b, "+") for a, b in pairs if (a + b) % modulus == rest)
            assert share == pytest.approx(1 / 8, abs=0.04), "totals that only held-out problems have"


def settings(prefix: str, folder: Path) -> Settings:
    # Large, untied weights: a young model with small ones says one token for ever.
    large = {"model__share_embeddings_and_output_weights": False, "model__init_method_std": 0.3}
    return tiny_config(prefix, folder, data__isolate_documents=True, model__num_layers=2, **large)


PROMPTS = [[5, 9, 77, 300, 12, 40], [8], [3, 1, 4]]


def sampled(rank: int, world_size: int, wanted: Settings) -> dict[str, Any]:
    """Greedy answers of the batch and of each prompt by itself, and losses against fp64 from the logits."""
    sys.path.insert(0, str(FOLDER))
    with pretraining(wanted, world_size) as run:
        from policy import forward, make_rows, sample

        model, settings = run.chunks[0], {"new_tokens": 7, "temperature": 0.0, "generator": torch.Generator()}
        together = sample(model, run.tokenizer, PROMPTS, **settings)
        alone = [sample(model, run.tokenizer, [prompt], **settings)[0] for prompt in PROMPTS]
        rows = make_rows(PROMPTS, together)
        with torch.no_grad():
            losses = forward(model, rows.tokens, rows.labels)
            sums, exact = (losses * rows.answer_mask).sum(1).tolist(), []
            for prompt, answer in zip(PROMPTS, together, strict=True):
                logits = forward(model, torch.tensor([[*prompt, *answer]]))[0].double().log_softmax(-1)
                exact.append(-sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)))
        return {"together": together, "alone": alone, "sums": sums, "exact": exact}


def test_a_batch_of_prompts_is_answered_as_each_alone_and_its_losses_are_those_of_its_tokens(ranks, prefix, tmp_path):
    found = ranks.run(1, sampled, settings(prefix, tmp_path))[0]
    assert found["together"] == found["alone"]
    assert len({token for answer in found["together"] for token in answer}) > 5
    assert found["sums"] == pytest.approx(found["exact"], rel=1e-5)


def reinforced(rank: int, world_size: int, wanted: Settings) -> list[tuple[float, float]]:
    """Log-probability of a rewarded and of an unrewarded answer to one prompt, before and after a step."""
    sys.path.insert(0, str(FOLDER))
    with pretraining(wanted, world_size) as run:
        from policy import forward, make_rows
        from rl_tune import advantages, learn

        for group in run.optimizer.param_groups:
            group["lr"] = 1e-4
        rows = make_rows([PROMPTS[0]] * 4, [[7, 8], [7, 8], [9, 10, 11], [9, 10, 11]])

        def logprobs() -> tuple[float, float]:
            with torch.no_grad():
                sums = -(forward(run.chunks[0], rows.tokens, rows.labels) * rows.answer_mask).sum(1)
            return float(sums[0]), float(sums[2])

        before = logprobs()
        advantage = advantages(torch.tensor([[1.0, 1.0, 0.0, 0.0]])).flatten()
        learn(run.config, run.chunks, run.optimizer, rows, advantage)
        return [before, logprobs()]


def test_a_step_of_reinforcement_raises_what_was_rewarded_and_lowers_what_was_not(ranks, prefix, tmp_path):
    before, after = ranks.run(1, reinforced, settings(prefix, tmp_path))[0]
    assert after[0] > before[0] and after[1] < before[1]


def alike(rank: int, world_size: int) -> list[list[float]]:
    sys.path.insert(0, str(FOLDER))
    from rl_tune import advantages

    rewards = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    return advantages(rewards).tolist()


def test_advantages_are_normal_within_a_group_and_zero_where_all_are_alike(ranks):
    right, wrong, mixed = ranks.run(1, alike)[0]
    assert right == wrong == [0.0] * 4
    assert mixed == pytest.approx([3**0.5, *[-(3**-0.5)] * 3], rel=1e-4)
