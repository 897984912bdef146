"""A reference's log-probabilities beside the batches of Megatron-Core's own datasets, and the ReMiT weights from them.

    GPTDataset.__getitem__  -> a sample of the training split also has the log-probabilities of its labels
    schedules.forward_step  -> a tap takes them out of the batch that the forward step draws, so that Megatron's
                               functions for tensor and context parallelism see the keys that they know
    SideCarWeighting        -> after the forward, the first tensor-parallel rank hands them to the others; each
                               context-parallel rank takes its part of the rows

The loss mask stays as it is, and with it every denominator of Megatron's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ptrl.errors import InputError
from megatron_ptrl.losses.remit import remit_weights

KEY = "ptrl_reference_logprob"

_sidecars: dict[str, Any] = {}
_identities: dict[str, Any] = {}
_tap: "_Tap | None" = None
_installed = False


class SideCarWeighting:
    """ReMiT's weights (arXiv:2602.03075) of the microbatch that is in its forward step."""

    def __init__(self, prefixes: list[str], epsilon: float) -> None:
        """prefixes: what `ptrl score` wrote, in any order: each says itself to which data it belongs.

        Raises InputError for a side-car that is missing, unfinished or broken.
        """
        from megatron_ptrl.data.sidecar import SideCar

        _install()
        self._epsilon = epsilon
        _sidecars.clear()
        _sidecars.update({prefix: SideCar.open(prefix) for prefix in prefixes})

    def __call__(self, logprob: Tensor, loss_mask: Tensor) -> Tensor:
        """logprob, loss_mask: (b, s/cp) -> weights (b, s/cp) fp32, centred over whole rows.

        Cost: a broadcast of 4 bytes a token of the whole rows over the tensor-parallel group, and the collective of
        `remit_weights` over the context-parallel one. Raises InputError for a batch without log-probabilities.
        """
        from megatron.core import parallel_state

        cp = parallel_state.get_context_parallel_world_size()
        cp_group = parallel_state.get_context_parallel_group() if cp > 1 else None
        reference = _shared(logprob, cp)
        if cp_group is not None:
            reference = context_parallel_part(reference, cp_group.rank(), cp)
        return remit_weights(logprob, reference, loss_mask, epsilon=self._epsilon, cp_group=cp_group)

    def close(self) -> None:
        """Data sets that are built from now on carry nothing more, and batches are left alone."""
        _sidecars.clear()


def _shared(logprob: Tensor, cp: int) -> Tensor:
    """The reference's log-probabilities (b, s) of the whole rows, on every tensor-parallel rank."""
    from megatron.core import parallel_state

    shape = (logprob.shape[0], logprob.shape[1] * cp)
    reference = logprob.new_empty(shape)
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        drawn = None if _tap is None else _tap.drawn
        if drawn is None:
            raise InputError(
                "--ptrl-remit-sidecar: a training batch came without the reference's log-probabilities; expected it "
                "from Megatron-Core's GPTDataset, in this process or in workers forked from it"
            )
        if drawn.shape != shape:
            raise InputError(
                f"--ptrl-remit-sidecar: a batch of {list(drawn.shape)} tokens has losses for {list(shape)}; expected "
                "rows that are neither packed nor cut in another way than over the context-parallel ranks"
            )
        reference.copy_(drawn)
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        dist.broadcast(
            reference,
            parallel_state.get_tensor_model_parallel_src_rank(),
            group=parallel_state.get_tensor_model_parallel_group(),
        )
    return reference


def context_parallel_part(rows: Tensor, rank: int, size: int) -> Tensor:
    """(b, s) -> (b, s/cp): of 2 cp chunks the two that Megatron gives to this rank, `rank` and its mirror image."""
    chunks = rows.chunk(2 * size, dim=1)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim=1)


class _Tap:
    """An iterator of batches whose log-probabilities stay here."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches
        self.drawn: Tensor | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = next(self._batches)
        if not isinstance(batch, dict) or KEY not in batch:
            return batch
        self.drawn = batch[KEY]
        # A copy: Megatron keeps the batch to repeat a step that it does not trust.
        return {key: value for key, value in batch.items() if key != KEY}


@contextmanager
def _tapped(batches: Any) -> Iterator[Any]:
    global _tap
    _tap = None if batches is None else _Tap(batches)
    try:
        yield _tap
    finally:
        _tap = None


def _install() -> None:
    global _installed
    if _installed:
        return
    dataset = import_module("megatron.core.datasets.gpt_dataset").GPTDataset
    schedules = import_module("megatron.core.pipeline_parallel.schedules")
    init, get, step = dataset.__init__, dataset.__getitem__, schedules.forward_step

    @wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self._ptrl_sidecar = _sidecar_of(self) if _sidecars else None

    @wraps(get)
    def __getitem__(self: Any, idx: int | None) -> dict[str, Any]:
        row = get(self, idx)
        if self._ptrl_sidecar is not None:
            from megatron_ptrl.data.aligned import label_logprobs

            # Megatron fills up a batch with sample None, whose tokens are those of sample 0, all masked.
            row[KEY] = label_logprobs(self, [self._ptrl_sidecar], 0 if idx is None else int(idx))
        return row

    @wraps(step)
    def forward_step(forward_step_func: Any, data_iterator: Any, *args: Any, **kwargs: Any) -> Any:
        if not _sidecars:
            return step(forward_step_func, data_iterator, *args, **kwargs)
        with _tapped(data_iterator) as tap:
            return step(forward_step_func, tap, *args, **kwargs)

    dataset.__init__, dataset.__getitem__ = __init__, __getitem__
    schedules.forward_step = forward_step  # type: ignore[attr-defined]
    _installed = True


def _sidecar_of(dataset: Any) -> Any:
    """The side-car of a dataset of the training split; None for another split. InputError where there is none."""
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.utils import Split

    from megatron_ptrl.data.sidecar import identify

    if dataset.index_split is not Split.train:
        return None
    if type(dataset) is not GPTDataset or not dataset.config.add_extra_token_to_sequence:
        raise InputError(
            f"--ptrl-remit-sidecar: the training data are a {type(dataset).__name__} with tokens of its own; expected "
            "a GPTDataset of a .bin/.idx pair, whose tokens the side-car knows"
        )
    path = str(dataset.dataset_path)
    if path not in _identities:
        _identities[path] = identify(path)
    for sidecar in _sidecars.values():
        if sidecar.meta.data == _identities[path]:
            return sidecar
    raise InputError(
        f"--ptrl-remit-sidecar: none of {', '.join(_sidecars)} belongs to {path} as it is now; expected one made by "
        f"`ptrl score --data {path}`"
    )
