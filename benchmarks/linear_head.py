"""Forward + backward of a language-model head with and without its logits: time and peak memory; one run, one table.

    python benchmarks/linear_head.py [--device cpu] [--tokens 2048] [--vocab 32768] [--hidden 256] [--chunk_tokens 256]
                                     [--rounds 3] [--output benchmarks/results/NAME.json]

Three products of the head's size are what any exact gradient takes: logits, gradient of the hidden states, gradient of
the weight. The linear head computes the logits twice, so its floor is four; with its gradients in the forward, of a sum
over the tokens, it is three. Providers take turns within a round, so that a busy machine slows all of them alike; peaks
come from a process each, beyond the inputs and their gradients. On a GPU the rivals are those that are installed.
"""

import argparse
import json
import multiprocessing
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from loss import SHAPED, environment, milliseconds_of, named, peak_bytes
from rivals import gpu_head_rivals
from torch import Tensor

from megatron_ptrl import (
    linear_reward_shaped_cross_entropy,
    linear_reward_shaped_cross_entropy_sum,
    reward_shaped_cross_entropy,
)

Provider = Callable[[Tensor, Tensor, Tensor, Tensor], object]
# On a CPU and on a GPU.
DEFAULTS = {"tokens": (2048, 8192), "vocab": (32768, 131072), "hidden": (256, 4096), "chunk_tokens": (256, 1024)}


def backward_through(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Provider:
    def run(hidden: Tensor, weight: Tensor, target: Tensor, upstream: Tensor) -> object:
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        return torch.autograd.grad(loss(*leaves, target), leaves, upstream)

    return run


def weighted_sum(chunk_tokens: int) -> Provider:
    def run(hidden: Tensor, weight: Tensor, target: Tensor, upstream: Tensor) -> object:
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        total = linear_reward_shaped_cross_entropy_sum(*leaves, target, upstream, SHAPED, chunk_tokens=chunk_tokens)
        return torch.autograd.grad(total, leaves)

    return run


def three_products(hidden: Tensor, weight: Tensor, target: Tensor, upstream: Tensor) -> object:
    logits = hidden @ weight.t()
    return logits @ weight, logits.t() @ hidden


def providers(chunk_tokens: int, device: str) -> dict[str, Provider]:
    found = {
        "linear head": backward_through(
            lambda x, w, y: linear_reward_shaped_cross_entropy(x, w, y, SHAPED, chunk_tokens=chunk_tokens)
        ),
        "linear head, gradients in the forward": weighted_sum(chunk_tokens),
        "logits, ours in place": backward_through(
            lambda x, w, y: reward_shaped_cross_entropy(F.linear(x, w), y, SHAPED, inplace_backward=True)
        ),
        "logits, plain F.cross_entropy(z.float())": backward_through(
            lambda x, w, y: F.cross_entropy(F.linear(x, w).float(), y, reduction="none")
        ),
        "three products alone": three_products,
    }
    return found | gpu_head_rivals() if device == "cuda" else found


def inputs(args: argparse.Namespace, dtype: torch.dtype, tokens: int, vocab: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    with torch.device(args.device):
        # No copy on the way, which would raise the peak that memory is measured from.
        x, weight = torch.randn(tokens, args.hidden, dtype=dtype), torch.randn(vocab, args.hidden, dtype=dtype)
        return x, weight.mul_(args.hidden**-0.5), torch.randint(vocab, (tokens,)), torch.rand(tokens)


def milliseconds(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Median and best of the rounds."""
    tensors = inputs(args, dtype, args.tokens, args.vocab)
    candidates = providers(args.chunk_tokens, args.device)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(args.rounds + 1):  # the first one warms up
        for name, run in candidates.items():
            elapsed = milliseconds_of(run, *tensors)
            if round_ > 0:
                times[name].append(elapsed)
    return {name: {"median": statistics.median(each), "best": min(each)} for name, each in times.items()}


def extra_bytes(name: str, args: argparse.Namespace, dtype: torch.dtype) -> int:
    """Growth of the peak memory, the device's or the process's own, beyond the inputs and their gradients."""
    run = providers(args.chunk_tokens, args.device)[name]
    run(*inputs(args, dtype, 64, 256))  # threads, libraries
    tensors = inputs(args, dtype, args.tokens, args.vocab)
    gradients = [torch.ones_like(x) for x in tensors[:2]]
    peak = torch.cuda.max_memory_allocated if args.device == "cuda" else peak_bytes
    before = peak()
    del gradients
    run(*tensors)
    return peak() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tokens", type=int, help="default: 2048 on a CPU, 8192 on a GPU")
    parser.add_argument("--vocab", type=int, help="default: 32768 on a CPU, 131072 on a GPU")
    parser.add_argument("--hidden", type=int, help="default: 256 on a CPU, 4096 on a GPU")
    parser.add_argument("--chunk_tokens", type=int, help="default: 256 on a CPU, 1024 on a GPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file, or into this folder")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no CUDA device")
    for name, (on_cpu, on_gpu) in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, on_gpu if args.device == "cuda" else on_cpu)

    result: dict[str, object] = environment(args.device)
    print("# " + ", ".join(f"{key} {value}" for key, value in result.items()))
    for dtype in (torch.bfloat16,) if args.device == "cuda" else (torch.bfloat16, torch.float32):
        title = f"{dtype}".removeprefix("torch.") + f", {args.tokens} tokens x {args.vocab} x {args.hidden}"
        times = milliseconds(args, dtype)
        result[f"ms, {title}"] = times
        print(f"\n{title + ', forward + backward':62}median ms  / three   best ms  / three   extra MiB")
        extra: dict[str, int] = {}
        for name, ms in times.items():
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                extra[name] = pool.apply(extra_bytes, (name, args, dtype))
            ratios = {kind: ms[kind] / times["three products alone"][kind] for kind in ms}
            print(
                f"  {name:60}{ms['median']:9.1f}{ratios['median']:8.2f}x{ms['best']:10.1f}{ratios['best']:8.2f}x"
                f"{extra[name] / 2**20:12.1f}"
            )
        result[f"peak bytes beyond inputs and gradients, {title}"] = extra
    if args.output:
        output = args.output if args.output.suffix == ".json" else named(args.output, result, "linear-head-")
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
