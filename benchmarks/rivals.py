"""Losses to compare with: Megatron-Core's own, and on a GPU the fused ones of other libraries that are installed."""

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
Provider = Callable[[Tensor, Tensor, Tensor], object]


def backward_through(loss: Loss) -> Provider:
    def run(z: Tensor, y: Tensor, upstream: Tensor) -> Tensor:
        leaf = z.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf, y), leaf, upstream)[0]

    return run


def one_rank(device: str) -> None:
    from megatron.core import parallel_state

    if not dist.is_initialized():
        store = Path(tempfile.mkdtemp()) / "store"
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()


def megatron(device: str) -> Provider:
    """Megatron-Core's plain cross entropy, in a group of one rank."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    one_rank(device)
    return backward_through(vocab_parallel_cross_entropy)


def megatron_fused() -> Loss:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.parallel_state import get_tensor_model_parallel_group

    one_rank("cuda")
    group = get_tensor_model_parallel_group()
    return lambda z, y: fused_vocab_parallel_cross_entropy(z, y, group)


def transformer_engine() -> Loss:
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    return lambda z, y: parallel_cross_entropy(z[:, None], y[:, None]).view(-1)


def liger() -> Loss:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda z, y: liger_cross_entropy(z, y, reduction="none")


def quack() -> Loss:
    from quack.cross_entropy import cross_entropy

    return lambda z, y: cross_entropy(z, y, reduction="none")


@cache
def gpu_rivals() -> dict[str, Provider]:
    """Each has computed a gradient once; those that cannot are named with the reason."""
    z = torch.randn(8, 256, device="cuda", dtype=torch.bfloat16)
    y, upstream = torch.randint(256, (8,), device="cuda"), torch.rand(8, device="cuda")
    found = {}
    for name, factory in (
        ("plain, Megatron-Core fused", megatron_fused),
        ("plain, Transformer Engine", transformer_engine),
        ("plain, Liger", liger),
        ("plain, quack", quack),
    ):
        try:
            run = backward_through(factory())
            run(z.clone(), y, upstream)
        except Exception as error:  # whatever another library raises, the others are still measured
            print(f"# skipped: {name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        else:
            found[name] = run
    return found
