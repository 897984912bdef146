"""Backward functions that have no derivative of their own."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError("the loss has no second derivative; expected its gradient not to be differentiated")


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Gradients]:
    """Of an autograd function: a derivative of its gradients raises RuntimeError, with `create_graph` or without.

    torch's decorator of this name refuses only where the upstream gradient is differentiable, which that of a plain
    `loss.sum()` is not: the gradient in a penalty then counts as a constant, and nobody is told.
    """

    @wraps(backward)
    def once(ctx: Any, *upstream: Tensor | None) -> Gradients:
        with torch.no_grad():
            gradients: Gradients = backward(ctx, *upstream)
        if not torch.is_grad_enabled():  # autograd keeps no graph of this backward
            return gradients
        return tuple(None if each is None else _Refusal.apply(each.detach().requires_grad_()) for each in gradients)

    return once
