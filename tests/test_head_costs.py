"""What the heads read, write and keep, counted on tensors, against the formulas that docs/scaling.md shows."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ptrl.config import RewardShaping
from megatron_ptrl.losses.linear_head import linear_reward_shaped_cross_entropy_with_stats
from megatron_ptrl.losses.linear_head_sum import linear_reward_shaped_cross_entropy_sum_with_stats
from megatron_ptrl.losses.reward_shaped_ce import reward_shaped_cross_entropy_with_stats
from megatron_ptrl.training.collectives import Sizes
from megatron_ptrl.training.head_costs import HEADS

N, V, H, CHUNK, K = 48, 4096, 32, 16, 5
SHAPED = RewardShaping(-0.25, 0.1, -0.1, K)


class Traffic(TorchDispatchMode):
    """Bytes that operators of this library read and write of what is as large as the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "megatron_ptrl":
            written = [a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments]
            for tensor, twice in zip(args, written, strict=False):
                if isinstance(tensor, Tensor) and tensor.shape[-1:] == (V,):
                    self.bytes += tensor.nbytes * (2 if twice else 1)
        return func(*args, **(kwargs or {}))


def value(formula: str) -> float:
    sizes = SimpleNamespace(s=N, b=1, h=H, v=V, L=1, tp=1, pp=1, cp=1, dp=1, z=2, c=CHUNK, sp=False)
    sizes.__dataclass_fields__ = vars(sizes).copy()
    return Sizes.value(sizes, formula)  # type: ignore[arg-type]


def run(name: str) -> dict[str, int]:
    """Bytes of one forward and backward, and those kept in between."""
    torch.manual_seed(1)
    target = torch.randint(V, (N, 1))
    hidden = torch.randn(N, 1, H, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, H, dtype=torch.bfloat16, requires_grad=True)
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() != weight.data_ptr():
            saved[tensor.data_ptr()] = tensor
        return tensor

    traffic = Traffic()
    with traffic:
        if name == "reward_shaped":
            logits = hidden @ weight.t()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                loss, _ = reward_shaped_cross_entropy_with_stats(logits, target, SHAPED, inplace_backward=True)
        else:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                if name == "linear":
                    loss, _ = linear_reward_shaped_cross_entropy_with_stats(
                        hidden, weight, target, SHAPED, chunk_tokens=CHUNK
                    )
                else:
                    loss, _, _ = linear_reward_shaped_cross_entropy_sum_with_stats(
                        hidden, weight, target, torch.ones(N, 1), SHAPED, chunk_tokens=CHUNK
                    )
        forward = traffic.bytes
        kept = sum(x.nbytes for x in saved.values())
        loss.sum().backward()
    return {"forward": forward, "backward": traffic.bytes - forward, "kept": kept}


@pytest.mark.parametrize("name", ["reward_shaped", "linear", "linear, gradients in the forward"])
def test_a_head_reads_writes_and_keeps_what_its_formulas_say(name):
    head = HEADS[name]
    found = run(name)
    assert found["forward"] == value(head.loss_forward)
    assert found["backward"] == value(head.loss_backward)
    assert found["kept"] == value(head.kept)
