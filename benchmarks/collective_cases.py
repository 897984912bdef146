"""The stages, layouts and losses whose collective calls are counted."""

from dataclasses import dataclass, field
from typing import Any

from megatron_ptrl.config import LossConfig, RemitConfig

SHAPED = LossConfig(beta=-0.25, lambda_head=0.1, lambda_tail=-0.1, top_k=5)


@dataclass(frozen=True)
class Case:
    """A stage in a layout."""

    ranks: int
    stage: str = "pretrain"
    parallel: dict[str, Any] = field(default_factory=dict)
    loss: LossConfig = SHAPED
    remit: RemitConfig = RemitConfig()
    tied: bool = False
    precision: str = "fp32"
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of Megatron-Core's own."""


TP, SP = {"tp": 2}, {"tp": 2, "sequence_parallel": True}
LINEAR = LossConfig(impl="linear", top_k=5, chunk_tokens=16)
SUM = LossConfig(impl="linear", top_k=5, chunk_tokens=16, recompute_logits=False)
REMIT = {"weighting": "remit", "sidecar": ["random"]}
RHO1 = {"weighting": "rho1", "sidecar": ["random"]}
ONLINE = {"weighting": "remit", "reference": "random"}
RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
CASES = {
    "tp": Case(2, parallel=TP),
    "tp, sequence parallel": Case(2, parallel=SP),
    "tp, bf16": Case(2, parallel=SP, precision="bf16"),
    "tp, Megatron-Core's loss": Case(2, parallel=SP, loss=LossConfig(impl="megatron")),
    "tp, linear": Case(2, parallel=TP, loss=LINEAR),
    "tp, linear, sequence parallel": Case(2, parallel=SP, loss=LINEAR),
    "tp, linear sum": Case(2, parallel=TP, loss=SUM),
    "tp, linear sum, sequence parallel": Case(2, parallel=SP, loss=SUM),
    "tp, ReMiT online": Case(2, parallel=SP, remit=RemitConfig(**ONLINE)),
    "tp, recomputed": Case(2, parallel=SP, model=RECOMPUTED),
    "pp": Case(2, parallel={"pp": 2}),
    "pp, tied": Case(2, parallel={"pp": 2}, tied=True),
    "pp, interleaved": Case(2, parallel={"pp": 2, "vpp": 2}),
    "pp, ReMiT online": Case(2, parallel={"pp": 2}, remit=RemitConfig(**ONLINE)),
    "cp": Case(2, parallel={"cp": 2}),
    "cp, attention recomputed": Case(2, parallel={"cp": 2}, model={"recompute_granularity": "selective"}),
    "cp, recomputed": Case(2, parallel={"cp": 2}, model=RECOMPUTED),
    "cp, ReMiT": Case(2, parallel={"cp": 2}, remit=RemitConfig(**REMIT)),
    "cp, ReMiT by document": Case(2, parallel={"cp": 2}, remit=RemitConfig(**REMIT, center="document")),
    "cp, RHO-1": Case(2, parallel={"cp": 2}, remit=RemitConfig(**RHO1)),
    "cp, RHO-1 by document": Case(2, parallel={"cp": 2}, remit=RemitConfig(**RHO1, center="document")),
    "dp": Case(2),
    "dp, bf16": Case(2, precision="bf16"),
    "dp, whole optimizers": Case(2, parallel={"distributed_optimizer": False}),
    "score, tp": Case(2, "score", SP),
    "score, pp": Case(2, "score", {"pp": 2}),
    "rl, tp": Case(2, "rl", SP),
    "rl, pp": Case(2, "rl", {"pp": 2}),
    "rl, dp": Case(2, "rl"),
    "generate, tp": Case(2, "generate", SP),
    "generate, pp": Case(2, "generate", {"pp": 2}),
    "tp, dp": Case(4, parallel=SP),
    "tp, pp, ReMiT": Case(4, parallel={**SP, "pp": 2}, remit=RemitConfig(**REMIT)),
    "tp, cp, ReMiT, linear": Case(4, parallel={**SP, "cp": 2}, loss=LINEAR, remit=RemitConfig(**REMIT)),
    "cp, dp": Case(4, parallel={"cp": 2}),
    "pp, dp": Case(4, parallel={"pp": 2}),
    "rl, tp, dp": Case(4, "rl", SP),
}
