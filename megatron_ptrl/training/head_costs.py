"""What each implementation of the head and its loss computes, moves through memory and keeps, by formula.

As in `collectives`, whose symbols these are, the formulas are text: of one microbatch on a rank of the last stage.
"""

from dataclasses import dataclass

from megatron_ptrl.config import LossConfig


@dataclass(frozen=True)
class Head:
    """Costs of one microbatch."""

    products: int
    """Matrix products of n h v/tp multiply-adds."""
    loss_forward: str
    """Bytes read and written between the products, by what is as large as the logits or the weight."""
    loss_backward: str
    sums: str
    """Bytes read and written to add up the gradient of the weight in fp32, a chunk at a time."""
    kept: str
    """Bytes kept from the forward to the backward, but for the weight."""
    peak: str
    """Bytes beside that at the highest point."""


_EVERY_CHUNK = "8*h*v/tp*ceil(n/c)"
_OF_ROWS = "4*n*h if tp > 1 else n*h*z"

HEADS = {
    # In place: the gradient is written over the logits.
    "reward_shaped": Head(
        products=3,
        loss_forward="n*v/tp*z",
        loss_backward="2*n*v/tp*z",
        sums="8*h*v/tp",
        kept="n*v/tp*z + 32*n",
        peak="0",
    ),
    "linear": Head(
        products=4,
        loss_forward="n*v/tp*z",
        loss_backward="2*n*v/tp*z",
        sums=_EVERY_CHUNK,
        kept="n/t*h*z + 32*n",
        peak=f"c*v/tp*z + ({_OF_ROWS})",
    ),
    # On one rank a single kernel reads and writes; with several the exchange stands between two that read.
    "linear, gradients in the forward": Head(
        products=3,
        loss_forward="(3 if tp > 1 else 2)*n*v/tp*z",
        loss_backward="0",
        sums=f"{_EVERY_CHUNK} + 12*h*v/tp",
        kept="n/t*h*z + 4*h*v/tp",
        peak=f"c*v/tp*z + ({_OF_ROWS})",
    ),
    # To fp32, maximum, less that, exp, sum, over that; times the upstream gradient, and back to z bytes.
    "megatron": Head(
        products=3,
        loss_forward="n*v/tp*(z + 36)",
        loss_backward="n*v/tp*(z + 12)",
        sums="8*h*v/tp",
        kept="4*n*v/tp + 9*n",
        peak="n*v/tp*z",
    ),
}


def implementation(loss: LossConfig) -> str:
    """The name in HEADS, and in `collectives`, of what `loss` asks for."""
    return loss.impl if loss.recompute_logits else "linear, gradients in the forward"
