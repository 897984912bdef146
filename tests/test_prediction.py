"""The arithmetic of predicted steps, against closed forms and against the products that a step really computes."""

import dataclasses
from typing import Any

import pytest
from tiny import Settings, parsed, pretraining, tiny_config

VOCAB, FFN = 512, 128
RECOMPUTED = {
    "model__recompute_granularity": "full",
    "model__recompute_method": "uniform",
    "model__recompute_num_layers": 1,
}


def predicted(rank: int, world_size: int, runs: list[tuple[Settings, int]], perfect: bool) -> list[Any]:
    """Predictions, and the bytes of activations; perfect: links and memory that take no time."""
    found = []
    for settings, gpus in runs:
        config = parsed(settings)
        from megatron_ptrl.training.layout import check_layout
        from megatron_ptrl.training.plan import count_parameters, memory_per_rank
        from megatron_ptrl.training.prediction import ASSUMED, H100, predict

        fast = {"memory_bandwidth": 1e40, "node_link": 1e40, "network": 1e40}
        machine = dataclasses.replace(H100, **fast) if perfect else H100
        assumed = dataclasses.replace(ASSUMED, latency=0.0) if perfect else ASSUMED
        layout = check_layout(config, gpus)
        memory = memory_per_rank(config, layout, count_parameters(config.model, VOCAB, FFN), VOCAB)
        one = predict(config, layout, VOCAB, FFN, machine=machine, assumed=assumed)
        found.append((one, memory["activations"]))
    return found


@pytest.fixture
def settings(prefix, tmp_path):
    def make(**changed: Any) -> Settings:
        return tiny_config(prefix, tmp_path, train__precision="bf16", train__micro_batch=1, **changed)

    return make


def test_without_communication_the_share_of_the_peak_is_the_assumed_one(ranks, settings):
    runs = [(settings(), 1), (settings(), 8), (settings(parallel__tp=2), 4), (settings(parallel__cp=2), 2)]
    runs += [(settings(**RECOMPUTED), 1), (settings(loss__impl="linear"), 1), (settings(parallel__pp=4), 4)]
    (one, _), (dp, _), (tp, _), (cp, _), (again, _), (linear, _), (pp, _) = ranks.run(1, predicted, runs, True)[0]
    assert [x.mfu for x in (one, dp, tp, cp)] == pytest.approx([0.55] * 4)
    assert again.step == pytest.approx(one.seconds["layers"] * 4 / 3 + one.seconds["head"])
    assert linear.step == pytest.approx(one.seconds["layers"] + one.seconds["head"] * 4 / 3)
    # A quarter of the layers, eight microbatches, three of which the last stage waits for or is waited for.
    assert pp.seconds["bubble"] == pytest.approx(one.seconds["layers"] / 4 * 3 / 8)
    assert pp.flops == one.flops


def test_calls_take_what_a_ring_over_the_slowest_link_takes(ranks, settings):
    runs = [(settings(), 8), (settings(train__global_batch=64), 64), (settings(parallel__tp=2), 2)]
    (node, _), (nodes, _), (tp, _) = ranks.run(1, predicted, runs, False)[0]
    parameters = 4 * (64 * (64 + 2 * 32 + 64 + 3 * 128) + 2 * 64 + 2 * 16) + 64 + VOCAB * 64
    padded = -(-parameters // 128) * 128
    # Gradients of four bytes go round, weights of two; a number of tokens. NVLink 450 GB/s, eight adapters of 50 GB/s.
    for found, n, link in ((node, 8, 0.8 * 450e9), (nodes, 64, 0.8 * 8 * 50e9)):
        small = 20e-6 + 2 * (n - 1) / n * 4 / link
        expected = 2 * 20e-6 + (n - 1) / n * 6 * padded / link + small
        assert found.seconds["dp"] == pytest.approx(expected)
    # Two regions a layer, the embedding, and backward the head's: 18 all-reduces of [64, 64] in bf16. The record.
    link = 0.8 * 450e9
    one = 18 * (20e-6 + 64 * 64 * 2 / link) + 20e-6 + 64 * (28 + 200) / link
    assert tp.seconds["tp"] == pytest.approx(8 * one)


def test_a_recomputed_layer_leaves_its_input_and_interleaved_stages_hold_more(ranks, settings):
    pipelined = settings(parallel__pp=2, train__global_batch=64)
    runs = [(settings(), 1), (settings(**RECOMPUTED), 1), (pipelined, 2), (pipelined | {"parallel.vpp": 2}, 2)]
    (_, whole), (_, again), (_, stages), (_, interleaved) = ranks.run(1, predicted, runs, True)[0]
    token_layer = 34 * 64 * 64  # 34 h bytes of 64 tokens
    assert whole == 4 * token_layer
    assert again == 4 * 2 * 64 * 64 + token_layer
    assert stages == 2 * 2 * token_layer, "two microbatches of two layers"
    assert interleaved == pytest.approx(stages * (1 + 1 / 4))


def products(rank: int, world_size: int, settings: Settings) -> tuple[int, float, float]:
    """FLOPs of the matrix products of a real step; the predicted ones, and those of attention among them."""
    from torch.utils.flop_counter import FlopCounterMode

    with pretraining(settings, world_size) as run:
        from megatron_ptrl.training.prediction import predict

        run._begin()
        with FlopCounterMode(display=False) as counter:
            run._learn()
        config = run.config
        counted = counter.get_flop_counts()["Global"]
        matrices = sum(count for name, count in counted.items() if str(name) in ("aten.mm", "aten.addmm"))
        found = predict(config, run.layout, VOCAB, config.model.ffn_hidden_size)
        tokens = config.train.global_batch * config.data.seq_length
        width = config.model.hidden_size  # of all queries
        return matrices, found.flops, 3 * 2 * config.data.seq_length * width * config.model.num_layers * tokens


def test_the_products_of_a_step_are_those_of_the_prediction(ranks, prefix, tmp_path):
    counted, flops, attention = ranks.run(1, products, tiny_config(prefix, tmp_path))[0]
    assert counted == flops - attention
