"""Apex's FusedAdam by its name, as far as Megatron and its checkpoints see it, on a machine without a GPU.

What matters is that the step is counted once per group and is a whole number, which the real kernel insists on. With
torch's Adam, which Megatron-LM takes where neither Apex nor Transformer Engine is there, it can load no checkpoint of a
distributed optimizer, its own ones neither.
"""

import sys
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):
    """Adam with decoupled weight decay (arXiv:1711.05101)."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        adam_w_mode: bool,
        capturable: bool = False,
    ) -> None:
        assert adam_w_mode and not capturable
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            assert isinstance(group["step"], int), f"step is {group['step']!r}"
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state |= {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        # Rounded as by torch's Adam on a CPU, or weights between two numbers of bf16 would fall to either of them.
        first = state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
        second = state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        unbiased = second.sqrt().div_((1 - beta2 ** group["step"]) ** 0.5).add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(first, unbiased, value=-group["lr"] / (1 - beta1 ** group["step"]))


def install() -> None:
    """Before Megatron-Core is imported. `import apex` alone still fails, so that its norms are not taken for there."""
    module: Any = types.ModuleType("apex.optimizers")
    module.FusedAdam, module.FusedSGD = FusedAdam, torch.optim.SGD
    sys.modules["apex.optimizers"] = module
