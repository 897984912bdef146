"""The bar of the numerical tests: fp32 eager on the same bits, measured from fp64."""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_ptrl import RewardShaping
from megatron_ptrl.reference import reward_shaped_cross_entropy

PLAIN = RewardShaping()
SHAPINGS = [
    PLAIN,
    RewardShaping(beta=-0.25),
    RewardShaping(beta=0.5),
    RewardShaping(beta=-0.9),
    RewardShaping(lambda_head=0.3),
    RewardShaping(lambda_tail=-0.2),
    RewardShaping(beta=-0.25, lambda_head=0.1, lambda_tail=-0.05),
    RewardShaping(beta=0.5, lambda_head=0.2, lambda_tail=0.2),
]

Loss = Callable[[Tensor], Tensor]


def assert_as_accurate(out: Tensor, eager: Tensor, exact: Tensor, slack: float = 2.0) -> None:
    """`out` is at most `slack` times as far from fp64 as fp32 eager is, at its worst entry and overall."""
    for order in (torch.inf, 2):
        norm = torch.linalg.vector_norm(exact, order)
        floor = 4 * torch.finfo(torch.float32).eps * norm  # eager can be exactly right by luck
        error = torch.linalg.vector_norm(out.double() - exact, order)
        bar = slack * torch.linalg.vector_norm(eager.double() - exact, order) + floor
        assert error <= bar, f"L{order} error {error:.1e} exceeds {bar:.1e}, {slack} x eager's"


def value_and_gradient(loss: Loss, z: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Per-token loss and the gradient of its sum weighted by `upstream`."""
    leaf = z.detach().clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf, upstream.to(value.dtype))
    return value.detach(), gradient


def eager_and_exact(
    z: Tensor, target: Tensor, upstream: Tensor, shaping: RewardShaping, vocab_size: int | None = None
) -> list[tuple[Tensor, Tensor]]:
    """(loss, gradient) of the reference in fp32, the gradient in the dtype of the logits, and in fp64."""

    def reference(leaf: Tensor) -> Tensor:
        return reward_shaped_cross_entropy(leaf, target, shaping, vocab_size)

    loss, gradient = value_and_gradient(reference, z.float(), upstream)
    return [(loss, gradient.to(z.dtype)), value_and_gradient(reference, z.double(), upstream)]
