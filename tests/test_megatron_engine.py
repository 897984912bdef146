"""The training model as the rollout engine: what full forward passes say, whatever batch, order and layout."""

import math
import random
from typing import Any

import pytest
import torch
from ranks import Ranks
from test_layouts import TP_PP_SP
from tiny import Settings, parsed, pretraining, tiny_config

from megatron_ptrl.errors import InputError
from megatron_ptrl.rollout.engine import Generation, Request

WINDOW = 64
VOCAB = 512
WARM = {"temperature": 0.9, "top_p": 0.95}
PLAIN = {"temperature": 1.0, "top_p": 1.0}
# Large, untied weights: a young model with small ones is about as likely to say one token as another.
MODEL = {"model__share_embeddings_and_output_weights": False, "model__init_method_std": 0.3}


def requests() -> list[Request]:
    """Prompts of very different lengths, one of a single token, one asked five times, two that reach the window."""
    draw = random.Random(3)
    lengths = [1, 2, 7, 8, 19, 50, 57]
    prompts = [[draw.randrange(VOCAB) for _ in range(length)] for length in lengths]
    prompts += [prompts[4]] * 4
    return [Request(prompt, 3 + 5 * (i % 4), 100 + i) for i, prompt in enumerate(prompts)]


def settings_of(prefix: str, folder: Any, **changes: Any) -> Settings:
    return tiny_config(prefix, folder, data__seq_length=WINDOW, **MODEL | changes)


def engine_of(run: Any, batch: int, **changes: Any) -> Any:
    from megatron_ptrl.rollout.megatron_engine import MegatronEngine

    known = {"eod": run.tokenizer.eod, "vocab_size": run.tokenizer.vocab_size} | changes
    return MegatronEngine(run.config, run.chunks, batch=batch, **known)


def generate(
    rank: int, world_size: int, settings: Settings, wanted: list[Request], batch: int, sampling: dict[str, float]
) -> list[Generation]:
    with pretraining(settings, world_size) as run:
        return engine_of(run, batch).generate(wanted, **sampling)


def farthest(run: Any, wanted: list[Request], found: list[Generation]) -> float:
    """Largest distance of a log-probability from the trainer's, which one forward pass with labels gives."""
    far = 0.0
    for request, generation in zip(wanted, found, strict=True):
        tokens = torch.tensor([request.prompt_ids + generation.token_ids])
        positions = torch.arange(tokens.shape[1] - 1)[None]
        with torch.no_grad():
            loss = run.chunks[0](tokens[:, :-1], positions, None, labels=tokens[:, 1:])
        trainers = -loss[0, len(request.prompt_ids) - 1 :]
        far = max(far, float((trainers - torch.tensor(generation.logprobs)).abs().max()))
    return far


def by_one_rank(rank: int, world_size: int, settings: Settings) -> dict[str, Any]:
    """What one rank draws, by batch and order, and how far its log-probabilities are from the trainer's."""
    with pretraining(settings, world_size) as run:
        wanted, done = requests(), []
        engine = engine_of(run, 8)
        plain = engine.generate(wanted, **PLAIN, on_done=lambda i, generation: done.append((i, generation)))
        assert run.chunks[0].training and all(p.requires_grad for p in run.chunks[0].parameters())
        warm = {batch: engine_of(run, batch).generate(wanted, **WARM) for batch in (1, 3, 8)}
        order = random.Random(1).sample(range(len(wanted)), len(wanted))
        shuffled = engine_of(run, 3).generate([wanted[i] for i in order], **WARM)
        others = engine.generate([Request(r.prompt_ids, r.max_tokens, r.seed + 1) for r in wanted], **WARM)
        return {
            "plain": plain,
            "done": done,
            "far": farthest(run, wanted, plain),
            "warm": warm,
            "shuffled": [shuffled[order.index(i)] for i in range(len(wanted))],
            "others": others,
        }


@pytest.fixture(scope="module")
def alone(ranks: Ranks, prefix: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ranks.run(1, by_one_rank, settings_of(prefix, tmp_path_factory.mktemp("alone")))[0]


def assert_alike(found: list[Generation], expected: list[Generation]) -> None:
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason), number
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=1e-5)


def test_logprobs_are_those_of_the_trainers_forward_pass(alone):
    assert alone["far"] < 1e-5
    spread = [value for generation in alone["plain"] for value in generation.logprobs]
    assert min(spread) < -4 and len(set(spread)) > 50


def test_batch_and_order_change_nothing_and_seeds_do(alone):
    for batch in (1, 3):
        assert_alike(alone["warm"][batch], alone["warm"][8])
    assert_alike(alone["shuffled"], alone["warm"][8])
    long = [i for i, generation in enumerate(alone["others"]) if len(generation.token_ids) > 5]
    assert len(long) > 4 and all(alone["others"][i].token_ids != alone["warm"][8][i].token_ids for i in long)
    shared = [tuple(alone["plain"][i].token_ids[:3]) for i in (4, 7, 8, 9, 10)]
    assert len(set(shared)) == len(shared)


def test_responses_end_at_max_tokens_or_the_window_and_are_told_at_once(alone):
    for request, generation in zip(requests(), alone["plain"], strict=True):
        room = min(request.max_tokens, WINDOW - len(request.prompt_ids))
        assert len(generation.logprobs) == len(generation.token_ids) <= room
        assert (generation.finish_reason == "length") <= (len(generation.token_ids) == room)
    assert {len(request.prompt_ids) + request.max_tokens > WINDOW for request in requests()} == {True, False}
    numbers = [number for number, _ in alone["done"]]
    assert sorted(numbers) == list(range(len(requests()))) and numbers != sorted(numbers)
    assert all(generation == alone["plain"][number] for number, generation in alone["done"])


LAYOUTS = {
    "tp 2, sequence parallel": (2, {"parallel__tp": 2, "parallel__sequence_parallel": True}),
    "pp 2": (2, {"parallel__pp": 2}),
    "dp 2": (2, {}),
    "tp 2, pp 2, sequence parallel": (4, TP_PP_SP),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_of_any_layout_says_the_same(ranks, prefix, tmp_path, alone, name):
    world_size, layout = LAYOUTS[name]
    settings = settings_of(prefix, tmp_path, **layout, data__isolate_documents=True)
    for found in ranks.run(world_size, generate_warm, settings):
        assert_alike(found, alone["warm"][8])


def generate_warm(rank: int, world_size: int, settings: Settings) -> list[Generation]:
    return generate(rank, world_size, settings, requests(), 4, WARM)


def after_a_step(rank: int, world_size: int, settings: Settings, eod: int) -> dict[str, Any]:
    """Greedy responses before and after the weights changed, how far their trainer's are, and what an EOD ends."""
    with pretraining(settings, world_size) as run:
        greedy = {"temperature": 0.0, "top_p": 1.0}
        wanted = [Request(request.prompt_ids, 8, 0) for request in requests()[:5]]
        engine = engine_of(run, 4, eod=eod)
        before = engine.generate(wanted, **greedy)
        run.run()
        engine.sync(run.config.train.steps, lambda folder: None)
        after = engine.generate(wanted, **greedy)
        plain = engine.generate(wanted, **PLAIN)
        refused = []
        for changes, sampling in (
            ({"prompt_ids": []}, {}),
            ({"prompt_ids": [1] * WINDOW}, {}),
            ({"prompt_ids": [1, VOCAB]}, {}),
            ({"max_tokens": 0}, {}),
            ({}, {"top_p": 0.0}),
        ):
            settings = {"prompt_ids": [1], "max_tokens": 1, "seed": 0} | changes
            with pytest.raises(InputError) as caught:
                engine.generate([Request(**settings)], **PLAIN | sampling)
            refused.append(str(caught.value))
        far = farthest(run, wanted, plain)
        with torch.no_grad():
            run.chunks[0].module.decoder.final_layernorm.weight.fill_(float("nan"))
        with pytest.raises(InputError, match="finite"):
            engine.generate(wanted, **PLAIN)
        assert run.chunks[0].training
        return {
            "before": before,
            "after": after,
            "far": far,
            "version": engine.weight_version,
            "refused": refused,
        }


def test_the_weights_after_a_step_are_those_that_generate(ranks, prefix, tmp_path):
    changed = {
        "train__steps": 2,
        "optimizer__warmup_steps": 0,
        "optimizer__lr": 0.1,
        "model__make_vocab_size_divisible_by": VOCAB,
    }
    eod = -1
    found = ranks.run(1, after_a_step, settings_of(prefix, tmp_path, **changed), eod)[0]
    assert all(generation.finish_reason == "length" for generation in found["before"])
    assert found["far"] < 1e-5 and found["version"] == 2
    assert [g.token_ids for g in found["before"]] != [g.token_ids for g in found["after"]]
    for message, named in zip(
        found["refused"], (" 0 tokens", f" {WINDOW} tokens", f" {VOCAB};", "max_tokens is 0", "top_p 0.0"), strict=True
    ):
        assert named in message


def with_experts(rank: int, world_size: int, settings: Settings) -> tuple[list[Generation], float]:
    with pretraining(settings, world_size) as run:
        found = engine_of(run, 4).generate(requests(), **PLAIN)
        return found, farthest(run, requests(), found) if world_size == 1 else 0.0


def test_a_mixture_of_experts_generates_what_it_is_trained_as(ranks, prefix, tmp_path):
    # Smaller weights: with large ones the router passes on more rounding than the other models.
    experts = {"model__num_moe_experts": 4, "model__init_method_std": 0.1}
    (alone, far), *_ = ranks.run(1, with_experts, settings_of(prefix, tmp_path / "1", **experts))
    assert far < 1e-5
    split = {"parallel__tp": 2, "parallel__sequence_parallel": True}
    for found, _ in ranks.run(2, with_experts, settings_of(prefix, tmp_path / "2", **experts, **split)):
        assert_alike(found, alone)


def ended(rank: int, world_size: int, settings: Settings) -> tuple[list[Generation], int, list[Generation]]:
    """Responses that nothing ends, a token from the middle of the longest, and the responses that it ends."""
    with pretraining(settings, world_size) as run:
        whole = engine_of(run, 4, eod=-1).generate(requests(), **PLAIN)
        eod = max((generation.token_ids for generation in whole), key=len)[4]
        return whole, eod, engine_of(run, 4, eod=eod).generate(requests(), **PLAIN)


def test_an_end_of_document_token_ends_a_response_and_is_its_last(ranks, prefix, tmp_path):
    whole, eod, found = ranks.run(1, ended, settings_of(prefix, tmp_path))[0]
    for generation, before in zip(found, whole, strict=True):
        stops = eod in before.token_ids
        kept = before.token_ids[: before.token_ids.index(eod) + 1] if stops else before.token_ids
        assert (generation.token_ids, generation.finish_reason) == (kept, "stop" if stops else "length")
    assert {generation.finish_reason for generation in found} == {"stop", "length"}


def test_padding_of_the_vocabulary_is_never_drawn(ranks, prefix, tmp_path):
    # Half of the columns are padding, and all are about as probable in a model whose weights are next to nothing.
    small = {"model__make_vocab_size_divisible_by": 2 * VOCAB, "model__init_method_std": 1e-4}
    wanted = [Request([5], 20, seed) for seed in range(4)]
    found = ranks.run(1, generate, settings_of(prefix, tmp_path, **small), wanted, 4, PLAIN)[0]
    assert all(token < VOCAB for generation in found for token in generation.token_ids)
    drawn = torch.tensor([value for generation in found for value in generation.logprobs])
    torch.testing.assert_close(drawn, torch.full_like(drawn, -math.log(VOCAB)), rtol=0, atol=0.02)


@pytest.mark.parametrize("tp", [1, 2])
def test_padding_does_not_count_in_logprobs(ranks, prefix, tmp_path, tp):
    # 640 columns; under TP 2 all of the padding is the second rank's.
    padded = {"model__make_vocab_size_divisible_by": 640, "parallel__tp": tp, "loss__mask_padding": True}
    for far in ranks.run(tp, distance, settings_of(prefix, tmp_path, **padded)):
        assert far < 1e-5


def distance(rank: int, world_size: int, settings: Settings) -> float:
    with pretraining(settings, world_size) as run:
        return farthest(run, requests(), engine_of(run, 4).generate(requests(), **PLAIN))


REFUSED = {
    "parallel.vpp": {"parallel__pp": 2, "parallel__vpp": 2},
    "parallel.cp": {"parallel__cp": 2},
    "parallel.ep": {"parallel__ep": 2, "model__num_moe_experts": 2},
    "model.mtp_num_layers": {"model__mtp_num_layers": 1},
}


def refused(rank: int, world_size: int, settings: Settings) -> str:
    config = parsed(settings)
    from megatron_ptrl.rollout.megatron_engine import check_can_generate

    with pytest.raises(InputError) as caught:
        check_can_generate(config)
    return str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_generate_with_is_refused_by_name(ranks, prefix, tmp_path, name):
    assert name in ranks.run(1, refused, settings_of(prefix, tmp_path, **REFUSED[name]))[0]
