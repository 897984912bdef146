"""The losses in somebody else's job: Megatron-Core's own model, schedule and data, and a miniature of its script."""

import re
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from drop_in import job, microbatches, step
from sidecars import write_by_token
from tiny import Settings, tiny_config

from megatron_ptrl import RewardShaping
from megatron_ptrl.config import DataConfig
from megatron_ptrl.integrations.core_remit import KEY, context_parallel_part
from megatron_ptrl.reference import reward_shaped_cross_entropy

SHAPING = RewardShaping(beta=-0.25, lambda_head=0.3, lambda_tail=-0.5, top_k=20)
MTP = {"model__mtp_num_layers": 1}
LAYOUTS = {"tp": {"parallel__tp": 2}, "pp": {"parallel__pp": 2}, "cp": {"parallel__cp": 2}}


def shaped(shaping: RewardShaping, sidecars: list[str] | None = None, vocab_size: int | None = None) -> Any:
    from megatron_ptrl.integrations.core_loss import Shaped
    from megatron_ptrl.integrations.core_remit import SideCarWeighting

    return Shaped(shaping, lambda: vocab_size, SideCarWeighting(sidecars, 0.2) if sidecars else None)


def rows_of(run: Any, settings: Settings, split: str = "train", **data: Any) -> Any:
    """Samples of Megatron-Core's data set, made while the drop-in is in place."""
    from megatron_ptrl.data.batches import build_datasets

    config = DataConfig(train=settings["data.train"], seq_length=64, split="90,10", **data)
    options = {"seed": 3, "train_samples": 40, "valid_samples": 8, "cache": settings["data.cache"]}
    train, valid = build_datasets(config, tokenizer=run.tokenizer, **options)
    return (train if split == "train" else valid).dataset


def run_step(rank: int, world_size: int, settings: Settings, make: Any, split: str = "train") -> Any:
    with job(settings, world_size, make) as run:
        return step(run, rows_of(run, settings, split), forward_only=split == "valid")


def both(rank: int, world_size: int, settings: Settings) -> Any:
    return [run_step(rank, world_size, settings, make) for make in (None, partial(shaped, RewardShaping()))]


@pytest.mark.parametrize(("layout", "world_size"), [({}, 1), (MTP, 1), (LAYOUTS["tp"], 2)], ids=["", "mtp", "tp"])
def test_defaults_change_nothing(ranks, prefix, tmp_path, layout, world_size):
    settings = tiny_config(prefix, tmp_path, **layout)
    (theirs, their_norms), (ours, our_norms) = ranks.run(world_size, both, settings)[-1]
    assert set(theirs) == {"lm loss"}
    assert ours["lm loss"] == pytest.approx(theirs["lm loss"], rel=1e-6)
    assert ours["ptrl ce"] == pytest.approx(theirs["lm loss"], rel=1e-6) and ours["ptrl reward weight"] == 1
    numpy.testing.assert_allclose(our_norms, their_norms, rtol=1e-4, atol=1e-7)


def logits_of(chunk: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """fp64 [b, s, v] of the next token. Prediction heads need labels, and their loss comes before the main one."""
    from megatron_ptrl.training import mcore

    model, seen = mcore.unwrap(chunk), []
    model.compute_language_model_loss = lambda labels, logits: seen.append(logits.double()) or labels.float()
    with torch.no_grad():
        chunk(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    del model.compute_language_model_loss
    return seen[-1].transpose(0, 1)


def by_hand(rank: int, world_size: int, settings: Settings, make: Any) -> Any:
    """What the step logs, and the same in fp64 from the model's logits, with the weights of `remit_weights` where the
    rows carry a reference's log-probabilities."""
    from megatron_ptrl.losses.remit import remit_weights

    with job(settings, world_size, make) as run:
        rows, sums, count = rows_of(run, settings), torch.zeros(5, dtype=torch.float64), 0
        for batch in microbatches(rows, 0):
            logits = logits_of(run.chunks[0], batch)
            loss = reward_shaped_cross_entropy(logits, batch["labels"], SHAPING, run.tokenizer.vocab_size)
            logp = logits.log_softmax(-1)
            entropy = -(logp.exp() * logp).sum(-1)
            logp = logp.gather(-1, batch["labels"][..., None])[..., 0]
            w = logp.exp() ** (1 - (1 - logp.exp()) ** SHAPING.beta)
            weights = torch.ones_like(logp)
            if KEY in batch:
                assert torch.equal(batch[KEY], -(batch["labels"] + 1) / 1024)
                weights = remit_weights(logp, batch[KEY].double(), batch["loss_mask"]).double()
            columns = torch.stack([weights * loss, -logp, entropy, w, weights])
            sums += (columns * batch["loss_mask"]).sum((1, 2))
            count += int(batch["loss_mask"].sum())
        assert count == 4 * 64 - 2 * (4 + 3)
        return step(run, rows)[0], (sums / count).tolist()


NAMES = ("lm loss", "ptrl ce", "ptrl entropy", "ptrl reward weight", "ptrl token weight")


@pytest.mark.parametrize("options", [{}, MTP], ids=["", "mtp"])
def test_log_is_that_of_the_logits(ranks, prefix, tmp_path, options):
    # 512 tokens padded to 1024: the padding is neither ranked nor rewarded.
    settings = tiny_config(prefix, tmp_path, model__make_vocab_size_divisible_by=1024, **options)
    logged, expected = ranks.run(1, by_hand, settings, partial(shaped, SHAPING, None, 512))[0]
    assert [logged[name] for name in NAMES[:-1]] == pytest.approx(expected[:-1], rel=1e-5)
    assert abs(logged["lm loss"] - logged["ptrl ce"]) > 0.1 and NAMES[-1] not in logged


@pytest.fixture(scope="module")
def sidecars(prefix, unscored, tmp_path_factory) -> list[str]:
    """Of two data sets, the value -(token + 1) / 1024 for each token."""
    folder = tmp_path_factory.mktemp("drop_in")
    return [write_by_token(data, str(folder / name)) for name, data in (("first", prefix), ("second", unscored))]


def test_weights_meet_their_tokens_in_every_layout(ranks, prefix, unscored, sidecars, tmp_path):
    blend = {"data__train": ["0.6", prefix, "0.4", unscored]}
    make = partial(shaped, SHAPING, sidecars[::-1], 512)
    logged, expected = ranks.run(1, by_hand, tiny_config(prefix, tmp_path, **blend), make)[0]
    assert [logged[name] for name in NAMES] == pytest.approx(expected, rel=1e-5)
    assert abs(logged["ptrl token weight"] - 1) > 1e-5
    for name, layout in LAYOUTS.items():
        spread = ranks.run(2, run_step, tiny_config(prefix, tmp_path / name, **blend, **layout), make)[-1][0]
        assert spread == pytest.approx(logged, rel=1e-5), name


def test_held_out_data_carry_no_weights(ranks, prefix, sidecars, tmp_path):
    make = partial(shaped, SHAPING, sidecars, 512)
    logged = ranks.run(1, run_step, tiny_config(prefix, tmp_path), make, "valid")[0][0]
    assert set(logged) == set(NAMES[:-1])


def refused(rank: int, world_size: int, settings: Settings, make: Any, change: Any) -> str:
    from megatron_ptrl.errors import InputError

    try:
        with job(settings, world_size, make) as run:
            change(run, settings)
    except InputError as error:
        return str(error)
    return "nothing was refused"


def without_values(run: Any, settings: Settings) -> None:
    step(run, rows_of(run, settings, "valid"))


def with_data_of_no_sidecar(run: Any, settings: Settings) -> None:
    rows_of(run, settings)


def without_mask(run: Any, settings: Settings) -> None:
    from megatron_ptrl.integrations import core_loss

    model, batch = run.chunks[0], next(microbatches(rows_of(run, settings), 0))
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    core_loss._report(core_loss._active, model, lambda output: None, output)


def without_labels(run: Any, settings: Settings) -> None:
    from megatron_ptrl.integrations import core_loss

    core_loss._report(core_loss._active, run.chunks[0], lambda output: None, torch.ones(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_values, "a training batch came without the reference's log-probabilities"),
        (with_data_of_no_sidecar, "belongs to .* as it is now; expected one made by `ptrl score"),
        (without_mask, "loss function without its loss mask"),
        (without_labels, "did not come from its compute_language_model_loss"),
    ],
)
def test_refusals(ranks, prefix, unscored, sidecars, tmp_path, change, message):
    data = unscored if change is with_data_of_no_sidecar else prefix
    settings = tiny_config(prefix, tmp_path, data__train=[data])
    answer = ranks.run(1, refused, settings, partial(shaped, SHAPING, sidecars[:1], 512), change)[0]
    assert re.search(message, answer), answer


class Group:
    """Of three ranks, as far as the cutting of rows asks."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return 3


def cut(rank: int, world_size: int, rows: torch.Tensor) -> list[torch.Tensor]:
    from megatron.core.utils import get_batch_on_this_cp_rank

    return [get_batch_on_this_cp_rank({"loss_mask": rows}, cp_group=Group(part))["loss_mask"] for part in range(3)]


def test_rows_are_cut_as_megatron_does(ranks):
    rows = torch.randn(2, 24)
    for part, theirs in enumerate(ranks.run(1, cut, rows)[0]):
        assert torch.equal(context_parallel_part(rows, part, 3), theirs)
