"""Losses to compare with: Megatron-Core's own, and on a GPU the fused ones of other libraries that are installed."""

import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

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


def transformer_engine(**options: bool) -> Loss:
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    return lambda z, y: parallel_cross_entropy(z[:, None], y[:, None], **options).view(-1)


def liger() -> Loss:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda z, y: liger_cross_entropy(z, y, reduction="none")


def liger_vocab_parallel() -> Loss:
    from liger_kernel.transformers import LigerVocabParallelCrossEntropy

    return LigerVocabParallelCrossEntropy(reduction="none")


def quack() -> Loss:
    from quack.cross_entropy import cross_entropy

    return lambda z, y: cross_entropy(z, y, reduction="none")


@cache
def gpu_rivals() -> dict[str, Provider]:
    """Losses of logits: (logits, target, upstream gradient per token) -> gradient."""
    z = torch.randn(8, 256, device="cuda", dtype=torch.bfloat16)
    y, upstream = torch.randint(256, (8,), device="cuda"), torch.rand(8, device="cuda")
    factories: dict[str, Callable[[], Loss]] = {
        "plain, Megatron-Core fused": megatron_fused,
        "plain, Transformer Engine": transformer_engine,
        "plain, Transformer Engine, overwriting": partial(transformer_engine, overwrite_input=True),
        "plain, Liger": liger,
        "plain, Liger, vocabulary-parallel": liger_vocab_parallel,
        "plain, quack": quack,
    }
    providers = {name: lambda factory=factory: backward_through(factory()) for name, factory in factories.items()}
    return working(providers, lambda: (z.clone(), y, upstream))


def working(factories: dict[str, Callable[[], Any]], inputs: Callable[[], tuple[Tensor, ...]]) -> dict[str, Any]:
    """Those providers that have computed a gradient of `inputs` once; the others are named with the reason."""
    found = {}
    for name, factory in factories.items():
        try:
            run = factory()
            run(*inputs())
        except Exception as error:  # whatever another library raises, the others are still measured
            print(f"# skipped: {name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        else:
            found[name] = run
    return found


Head = Callable[[Tensor, Tensor, Tensor], Tensor]


def head_through(loss: Head) -> Callable[[Tensor, Tensor, Tensor, Tensor], object]:
    """A mean or sum over tokens is all that these give: they leave the gradient per token out."""

    def run(hidden: Tensor, weight: Tensor, target: Tensor, upstream: Tensor) -> object:
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        return torch.autograd.grad(loss(*leaves, target), leaves)

    return run


def liger_linear() -> Head:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda x, w, y: liger_fused_linear_cross_entropy(x, w, y, reduction="sum")


def cut_cross_entropy() -> Head:
    from cut_cross_entropy import linear_cross_entropy

    return lambda x, w, y: linear_cross_entropy(x, w, y, reduction="sum")


def quack_linear() -> Head:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda x, w, y: chunked_linear_cross_entropy(x, w, y, reduction="sum")


@cache
def gpu_head_rivals() -> dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], object]]:
    """Losses of a head: (hidden, weight, target, upstream, of which nothing is read) -> gradients."""
    x, w = (torch.randn(n, 256, device="cuda", dtype=torch.bfloat16) for n in (64, 512))
    y, upstream = torch.randint(512, (64,), device="cuda"), torch.rand(64, device="cuda")
    factories = {
        "plain sum, Liger": liger_linear,
        "plain sum, cut-cross-entropy": cut_cross_entropy,
        "plain sum, quack": quack_linear,
    }
    providers = {name: lambda factory=factory: head_through(factory()) for name, factory in factories.items()}
    return working(providers, lambda: (x, w, y, upstream))
