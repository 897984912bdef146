"""The embedded generator: what full forward passes say, whatever batch a request is in."""

import asyncio
import json
import random
import subprocess
import sys
from typing import Any

import pytest
from ranks import Ranks
from tiny import Settings, pretraining, run_tiny, tiny_config

from megatron_ptrl.thinking.generators import GenerationError, Reply, Request

WINDOW = 64
TEXTS = ["def parse(", "import os\nimport sys\n\nclass Reader:\n    pass", "#", "return self.value", "for line in"]


def request(text: str, **changes: Any) -> Request:
    settings = {"max_tokens": 12, "temperature": 0.0, "top_p": 1.0, "stop": [], "seed": 1} | changes
    return Request(id=text, messages=[{"role": "user", "content": text}], **settings)


@pytest.fixture(scope="module")
def trained(ranks: Ranks, prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    # Large, untied weights: a young model with small ones says one token for ever. 512 tokens padded to 1024.
    model = {"model__share_embeddings_and_output_weights": False, "model__init_method_std": 0.3}
    model["model__make_vocab_size_divisible_by"] = 1024
    folder = tmp_path_factory.mktemp("embedded") / "run"
    settings = tiny_config(prefix, folder, train__steps=3, data__seq_length=WINDOW, **model)
    run_tiny(ranks, 1, settings)
    return settings


def embedded(run_dir: str, groups: list[list[Request]], closing: str = "</think>", **options: Any) -> list[list[Any]]:
    """Each group asked at once, the groups one after the other; what an error says in place of a reply."""
    from megatron_ptrl.thinking import embedded as module

    # No model this young writes the real tag.
    module.CLOSE = closing

    async def ask() -> list[list[Any]]:
        generator = module.open_embedded(run_dir, **options)

        async def answer(wanted: Request) -> Reply | dict[str, Any]:
            try:
                return await generator.generate(wanted)
            except GenerationError as error:
                return vars(error)

        try:
            return [await asyncio.gather(*map(answer, group)) for group in groups]
        finally:
            await generator.close()

    return asyncio.run(ask())


def ask(ranks: Ranks, settings: Settings, *groups: list[Request], **options: Any) -> list[list[Reply]]:
    return ranks.run(1, _ask, settings["run_dir"], list(groups), options)[0]


def _ask(rank: int, world_size: int, run_dir: str, groups: list[list[Request]], options: Any) -> list[list[Any]]:
    return embedded(run_dir, groups, **options)


def by_full_passes(rank: int, world_size: int, settings: Settings) -> list[str]:
    """Greedy texts by generate.py."""
    with pretraining({**settings, "sample.tokens": 12, "sample.temperature": 0}, world_size) as run:
        from megatron_ptrl.training.generate import generate

        texts = []
        for text in TEXTS:
            prompt = [run.tokenizer.eod, *run.tokenizer.encode(text)]
            new = generate(run.config, run.chunks, prompt, vocab_size=run.tokenizer.vocab_size, eod=run.tokenizer.eod)
            texts.append(run.tokenizer.decode(new))
        return texts


def test_greedy_text_is_that_of_full_forward_passes_in_any_batch(ranks, trained):
    texts = ranks.run(1, by_full_passes, trained)[0]
    together, alone, *rest = ask(ranks, trained, list(map(request, TEXTS)), *([request(text)] for text in TEXTS))
    assert [reply.text for reply in together] == texts
    assert [group[0] for group in (alone, *rest)] == together
    assert len({tuple(text) for text in texts}) == len(texts) and all(map(str.strip, texts))


def test_a_drawn_text_hangs_on_its_seed_and_not_on_its_batch(ranks, trained):
    warm = {"temperature": 1.0, "top_p": 0.95, "max_tokens": 16}
    mixed = [request(text, seed=seed, **warm) for seed in (1, 2) for text in TEXTS]
    shuffled = random.Random(0).sample(mixed, len(mixed))
    together, apart, *_ = ask(ranks, trained, mixed, shuffled, batch=3)
    texts = {(reply_to.id, reply_to.seed): reply.text for reply_to, reply in zip(mixed, together, strict=True)}
    assert texts == {(reply_to.id, reply_to.seed): reply.text for reply_to, reply in zip(shuffled, apart, strict=True)}
    assert all(texts[text, 1] != texts[text, 2] for text in TEXTS)


def test_text_ends_before_the_first_stop_string_the_limit_or_the_window(ranks, trained):
    whole = ask(ranks, trained, [request(TEXTS[0], max_tokens=30)])[0][0]
    assert (whole.finish_reason, whole.completion_tokens) == ("length", 30)
    # Many tokens long, and not to be seen in the last few of them.
    stop, later = whole.text[6:36], whole.text[40:44]
    assert len(stop) == 30 and later
    stops = [request(TEXTS[0], max_tokens=30, stop=these) for these in ([stop], [later, stop])]
    stopped, first, full = ask(ranks, trained, [*stops, request("x " * 29, max_tokens=40)])[0]
    assert stopped.text == whole.text[: whole.text.index(stop)] and stopped.finish_reason == "stop"
    assert stopped.completion_tokens < 30 and first == stopped
    # The prompt leaves fewer tokens of the window than were asked for.
    assert full.finish_reason == "length" and full.prompt_tokens + full.completion_tokens == WINDOW


def test_thinking_is_told_apart_where_the_prompt_opens_it_and_its_end_is_told(ranks, trained):
    plain = ask(ranks, trained, [request(TEXTS[0])])[0][0]
    assert plain.thinking is None
    (opened,) = ask(ranks, trained, [request(f"{TEXTS[0]}\n\n<think>")])[0]
    assert opened.thinking == opened.text and len(opened.text) > 3
    tag = plain.text[3:8]
    stops = [[tag, plain.text[1:6]], [tag]]
    before, at = ask(ranks, trained, [request(TEXTS[0], stop=stop) for stop in stops], closing=tag)[0]
    assert [before.text, at.text] == [plain.text[:1], plain.text[:8]]


def test_a_prompt_that_fills_the_window_is_refused_and_the_others_are_answered(ranks, trained):
    long, other = ask(ranks, trained, [request("x y z " * 40), request("def")])[0]
    assert long["reason"] == "bad_request" and not long["retryable"] and str(WINDOW) in long["detail"]
    assert other.completion_tokens == 12


def test_ptrl_think_writes_what_the_embedded_generator_says(ranks, trained, tmp_path):
    documents, template = tmp_path / "documents.jsonl", tmp_path / "open.txt"
    documents.write_text("".join(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    template.write_text("{{CONTEXT}}\n\n<think>")
    words = ["--input", documents, "--output", tmp_path / "thought", "--prompt", template, "--generator", "embedded"]
    words += [
        "--checkpoint",
        trained["run_dir"],
        "--sampling.max_tokens",
        9,
        "--sampling.temperature",
        0,
        "--then_assemble=false",
    ]
    command = [sys.executable, "-m", "megatron_ptrl", "think", "--then_assemble=false", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "thought" / "thoughts").glob("*.jsonl")
    found = {line["text"]: line for line in map(json.loads, file.open())}
    expected = ask(ranks, trained, [request(f"{text}\n\n<think>", max_tokens=9) for text in TEXTS])[0]
    assert {text: line["thinking"] for text, line in found.items()} == {
        text: reply.text.strip() for text, reply in zip(TEXTS, expected, strict=True)
    }
    assert {line["thinking_tokens"] for line in found.values()} == {9}
