"""Greedy text is the argmax of full forward passes, under every layout."""

import pytest
import torch
from tiny import Settings, pretraining, tiny_config

NEW = 12
PROMPT = [5, 9, 77, 300]
LAYOUTS = {"tp 2": {"parallel__tp": 2}, "pp 2": {"parallel__pp": 2}, "vpp": {"parallel__pp": 2, "parallel__vpp": 2}}
LAYOUTS["sp"] = {"parallel__tp": 2, "parallel__sequence_parallel": True}


def settings(prefix: str, folder: object, **layout: object) -> Settings:
    # 512 tokens padded to 2048: most columns are untrained ones that must never be chosen.
    common = {"model__make_vocab_size_divisible_by": 2048, "train__steps": 4, "optimizer__warmup_steps": 0}
    # Large, untied weights: a young model with small ones repeats one token for ever.
    common |= {"model__share_embeddings_and_output_weights": False, "model__init_method_std": 0.3}
    return tiny_config(prefix, folder, sample__tokens=NEW, sample__temperature=0, **common, **layout)


def generated(rank: int, world_size: int, wanted: Settings, eod_at: int | None = None) -> list[list[int]]:
    """After four steps: the greedy continuation, one stopped at token number `eod_at`, one of a prompt too long."""
    with pretraining(wanted, world_size) as run:
        from megatron_ptrl.training.generate import generate

        run._begin()
        for _ in range(4):
            run._step()
        vocab = run.tokenizer.vocab_size
        whole = generate(run.config, run.chunks, PROMPT, vocab_size=vocab, eod=-1)
        stopped = generate(run.config, run.chunks, PROMPT, vocab_size=vocab, eod=whole[eod_at]) if eod_at else []
        long = generate(run.config, run.chunks, [3, 1] * 50 + PROMPT, vocab_size=vocab, eod=-1)
        assert all(chunk.training for chunk in run.chunks)
        return [whole, stopped, long]


def by_hand(rank: int, world_size: int, wanted: Settings) -> list[list[int]]:
    """The same by forward passes over exactly the tokens written so far."""
    with pretraining(wanted, world_size) as run:
        run._begin()
        for _ in range(4):
            run._step()
        model = run.chunks[0].eval()
        texts = []
        for prompt in (PROMPT, ([3, 1] * 50 + PROMPT)[-(64 - NEW) :]):
            tokens = list(prompt)
            for _ in range(NEW):
                positions = torch.arange(len(tokens))[None]
                with torch.no_grad():
                    logits = model(torch.tensor([tokens]), positions, None)
                assert logits.shape == (1, len(tokens), 2048)
                tokens.append(int(logits[0, -1, : run.tokenizer.vocab_size].argmax()))
            texts.append(tokens[len(prompt) :])
        return texts


@pytest.fixture(scope="module")
def expected(ranks, prefix, tmp_path_factory) -> list[list[int]]:
    return ranks.run(1, by_hand, settings(prefix, tmp_path_factory.mktemp("by_hand")))[0]


def test_greedy_text_is_the_argmax_of_full_forward_passes(ranks, prefix, tmp_path, expected):
    whole, _, long = ranks.run(1, generated, settings(prefix, tmp_path))[0]
    assert [whole, long] == expected
    assert len(whole) == NEW


@pytest.mark.parametrize("name", LAYOUTS)
def test_greedy_text_is_the_same_under_every_layout_on_every_rank(ranks, prefix, tmp_path, expected, name):
    for whole, _, long in ranks.run(2, generated, settings(prefix, tmp_path, **LAYOUTS[name])):
        assert [whole, long] == expected


def test_text_stops_before_the_end_of_document_token(ranks, prefix, tmp_path, expected):
    stop = next(i for i in range(1, NEW) if expected[0][i] not in expected[0][:i])
    _, stopped, _ = ranks.run(1, generated, settings(prefix, tmp_path), stop)[0]
    assert stopped == expected[0][:stop]
