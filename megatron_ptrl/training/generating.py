"""A model that is trained, for a while as one that generates: what its training needs is switched off, and on again."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_ptrl import decode_ops
from megatron_ptrl.training.mcore import unwrap

_SEQUENCE_PARALLEL = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@contextlib.contextmanager
def generating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without sequence parallelism, which could not split a single token; all as before afterwards.

    Megatron-Core's own linear layers go without the autograd functions that they wrap each product in, which take as
    long as the product of a small batch, and on CPUs with the kernel for few rows. Transformer Engine's stay as they
    are.

    Where the optimizer leaves weights to be gathered by the next forward pass, gathers them now: then collective over
    the data-parallel ranks.
    """
    gpt, training = unwrap(model), model.training
    before: list[tuple[Any, str, bool]] = []
    for module in gpt.modules():
        for holder in (module, getattr(module, "config", None)):
            names = [name for name in _SEQUENCE_PARALLEL if isinstance(getattr(holder, name, None), bool)]
            before += [(holder, name, getattr(holder, name)) for name in names]
    plain = {module: forward for module in gpt.modules() if (forward := _plain_forward(module)) is not None}
    if gpt.post_process and type(gpt.output_layer) is ColumnParallelLinear:
        plain[gpt.output_layer] = _gathering_forward(gpt.output_layer)
    # The head of `loss.impl` linear has a forward of its own, and comes back to it.
    own = {module: vars(module)["forward"] for module in plain if "forward" in vars(module)}
    settings = getattr(model, "ddp_config", None)
    hooked = settings is not None and settings.overlap_param_gather
    if hooked:
        model.disable_forward_pre_hook()  # type: ignore[operator]
    try:
        model.eval()
        for holder, name, _ in before:
            setattr(holder, name, False)
        for module, forward in plain.items():
            module.forward = forward
        yield
    finally:
        for module in plain:
            del module.forward
        for module, forward in own.items():
            module.forward = forward
        for holder, name, value in before:
            setattr(holder, name, value)
        if hooked:
            model.enable_forward_pre_hook()  # type: ignore[operator]
        model.train(training)


def _plain_forward(module: Any) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
    """The forward of a linear layer without autograd; None for a module that must keep its own."""
    if type(module) not in (ColumnParallelLinear, RowParallelLinear) or module.is_expert or "forward" in vars(module):
        return None
    reduces = type(module) is RowParallelLinear and module.tp_group.size() > 1
    if module.gather_output if type(module) is ColumnParallelLinear else not module.input_is_parallel:
        return None

    def forward(x: Tensor) -> tuple[Tensor, Tensor | None]:
        added = None if module.skip_bias_add or reduces else module.bias
        out = _linear(x, module.weight, added)
        if reduces:
            dist.all_reduce(out, group=module.tp_group)
            if module.bias is not None and not module.skip_bias_add:
                out = out + module.bias
        return out, module.bias if module.skip_bias_add else None

    return forward


def _gathering_forward(module: ColumnParallelLinear) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The forward of the head without autograd: the logits of the whole vocabulary."""

    def forward(x: Tensor, weight: Tensor | None = None, **unused: Any) -> tuple[Tensor, Tensor | None]:
        out = _linear(x, module.weight if weight is None else weight, module.bias)
        return gather_from_tensor_model_parallel_region(out, group=module.tp_group), None

    return forward


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not decode_ops.multiplies_few_rows(x, weight):
        return F.linear(x, weight, bias)
    out = decode_ops.few_rows_linear(x, weight)
    return out if bias is None else out.add_(bias)
