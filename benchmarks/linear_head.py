"""Forward + backward of a language-model head with and without its logits: time and peak memory; one run, one table.

    python benchmarks/linear_head.py [--tokens 2048] [--vocab 32768] [--hidden 256] [--chunk_tokens 256] [--rounds 3]
                                     [--output benchmarks/results/NAME.json]

Three products of the head's size are what any exact gradient takes: logits, gradient of the hidden states, gradient of
the weight. The linear head computes the logits twice, so its floor is four; with its gradients in the forward, of a sum
over the tokens, it is three. Providers take turns within a round, so that a busy machine slows all of them alike; peaks
come from a process each, beyond the inputs and their gradients.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from loss import SHAPED, environment, peak_bytes
from torch import Tensor

from megatron_ptrl import (
    linear_reward_shaped_cross_entropy,
    linear_reward_shaped_cross_entropy_sum,
    reward_shaped_cross_entropy,
)

Provider = Callable[[Tensor, Tensor, Tensor, Tensor], object]


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


def providers(chunk_tokens: int) -> dict[str, Provider]:
    return {
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


def inputs(tokens: int, vocab: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    # No copy on the way, which would raise the peak that memory is measured from.
    x, weight = torch.randn(tokens, hidden, dtype=dtype), torch.randn(vocab, hidden, dtype=dtype).mul_(0.1)
    return x, weight, torch.randint(vocab, (tokens,)), torch.rand(tokens)


def milliseconds(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Median and best of the rounds."""
    tensors, candidates = inputs(args.tokens, args.vocab, args.hidden, dtype), providers(args.chunk_tokens)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(args.rounds + 1):  # the first one warms up
        for name, run in candidates.items():
            start = time.perf_counter()
            run(*tensors)
            if round_ > 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: {"median": statistics.median(each), "best": min(each)} for name, each in times.items()}


def extra_bytes(name: str, args: argparse.Namespace, dtype: torch.dtype) -> int:
    """Growth of the process's peak resident memory beyond the inputs and their gradients."""
    run = providers(args.chunk_tokens)[name]
    run(*inputs(8, 256, args.hidden, dtype))  # threads, libraries
    tensors = inputs(args.tokens, args.vocab, args.hidden, dtype)
    gradients = [torch.ones_like(x) for x in tensors[:2]]
    before = peak_bytes()
    del gradients
    run(*tensors)
    return peak_bytes() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--chunk_tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    args = parser.parse_args()

    result: dict[str, object] = environment("cpu")
    print("# " + ", ".join(f"{key} {value}" for key, value in result.items()))
    for dtype in (torch.bfloat16, torch.float32):
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
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
