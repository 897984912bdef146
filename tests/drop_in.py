"""A job as Megatron-LM's pretrain_gpt.py makes it, on Megatron-Core's own model, schedule and data: one step of it."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy
import torch
import torch.distributed as dist
from tiny import Settings, pretraining
from torch.utils.data import default_collate

KEYS = ("tokens", "labels", "loss_mask", "position_ids")
MICROBATCHES = 2


def loss_func(loss_mask: torch.Tensor, output_tensor: torch.Tensor, model: Any = None) -> Any:
    losses, loss_mask = output_tensor.view(-1).float(), loss_mask.view(-1).float()
    loss = torch.sum(losses * loss_mask)
    num_tokens = loss_mask.sum().clone().detach().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.cat([loss.clone().detach().view(1), num_tokens.view(1)])}


def forward_step(data_iterator: Any, model: Any) -> Any:
    """The first tensor-parallel rank draws; what the model knows by name travels, and nothing else."""
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    shape = (2, 64)
    batch = {key: torch.empty(shape, dtype=torch.float32 if key == "loss_mask" else torch.int64) for key in KEYS}
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        drawn = next(data_iterator)
        assert set(drawn) <= {*KEYS, "dataset_id"}, set(drawn)
        batch = {key: drawn[key] for key in KEYS}
    for key in KEYS:
        source = parallel_state.get_tensor_model_parallel_src_rank()
        dist.broadcast(batch[key], source, group=parallel_state.get_tensor_model_parallel_group())
    batch = get_batch_on_this_cp_rank(batch)
    arguments = (batch["tokens"], batch["position_ids"], None)
    output = model(*arguments, labels=batch["labels"], loss_mask=batch["loss_mask"])
    return output, partial(loss_func, batch["loss_mask"], model=model)


def microbatches(rows: Any, first: int) -> Iterator[dict[str, torch.Tensor]]:
    """Collated as Megatron's loader does; a few masked tokens in each."""
    for i in range(MICROBATCHES):
        batch = default_collate([rows[first + 2 * i], rows[first + 2 * i + 1]])
        batch["loss_mask"][:, 5 + i : 9] = 0
        yield batch


@contextlib.contextmanager
def job(settings: Settings, world_size: int, shaped: Any) -> Iterator[Any]:
    """A `Pretraining` whose models have Megatron-Core's own loss, or `shaped()` in its place."""
    from megatron_ptrl.training import host

    host.install_if_no_cuda()
    from megatron_ptrl.integrations import core_loss

    try:
        if shaped is not None:
            core_loss.use(shaped())
        with pretraining({**settings, "loss.impl": "megatron"}, world_size) as run:
            yield run
    finally:
        core_loss.stop()


def step(run: Any, rows: Any, *, forward_only: bool = False) -> tuple[dict[str, float], numpy.ndarray]:
    """The averages that Megatron-LM logs for a step, and the norm of each parameter's gradient, on the last stage."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    on_first = parallel_state.get_tensor_model_parallel_rank() == 0
    first = 2 * MICROBATCHES * parallel_state.get_data_parallel_rank()
    for chunk in run.chunks:
        chunk.zero_grad_buffer()
    with torch.set_grad_enabled(not forward_only):
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=microbatches(rows, first) if on_first else None,
            model=run.chunks,
            num_microbatches=MICROBATCHES,
            seq_length=64,
            micro_batch_size=2,
            forward_only=forward_only,
        )
    if not parallel_state.is_pipeline_last_stage():
        return {}, numpy.empty(0)
    totals = {key: torch.vstack([report[key].view(-1) for report in reports]).sum(0) for key in reports[0]}
    for total in totals.values():
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    norms = [float(p.main_grad.norm()) for chunk in run.chunks for p in chunk.parameters()]
    return {key: float(total[0] / total[1]) for key, total in totals.items()}, numpy.array(norms)
