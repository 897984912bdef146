"""Columns that pad a vocabulary, left out of the softmax."""

import torch
from torch import Tensor

PADDING_LOGIT = -1e4
"""Of probability 0 beside any real logit, so without a gradient; sums over thousands stay far from infinity."""


@torch.no_grad()
def bar_padding_(logits: Tensor, real: int) -> Tensor:
    """`logits` (..., v) with the columns from `real` on overwritten.

    Autograd need not know: a loss gives these columns the gradient 0, which is what the logits before would get.
    """
    logits[..., real:] = PADDING_LOGIT
    return logits
