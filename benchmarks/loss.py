"""Forward + backward of the losses on this machine: time, share of the copy bandwidth, memory; one run, one table.

    python benchmarks/loss.py [--device cpu] [--tokens 256] [--vocab 32768 131072] [--rounds 9] [--output NAME.json]

The least bytes per bf16 logit: 2 read in the forward, 2 read and 2 written in the backward. The floor is 1.5 copies.
Providers take turns within a round, each with a call that is not timed before the one that is, so that a busy machine
slows all of them alike and none pays for the memory that another left. Each figure comes as the median and
as the best of the rounds, which other programs on the machine disturb least; the ratios are shown for both.

On a GPU the time is that between two events on the stream, and the rivals are those that are installed.
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rivals import Provider, backward_through, gpu_rivals, megatron
from torch import Tensor

from megatron_ptrl import RewardShaping, reward_shaped_cross_entropy, reward_shaped_cross_entropy_with_stats
from megatron_ptrl.ops import load_kernels

SHAPED = RewardShaping(beta=-0.25, lambda_head=0.1, lambda_tail=-0.05, top_k=100)


def torch_operators(z: Tensor, y: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """The same loss and its gradient by hand, which is faster than leaving the gradient to autograd."""
    shaping = SHAPED
    log_p = z.float().log_softmax(-1)
    p = log_p.exp()
    in_head = z >= z.topk(shaping.top_k, dim=-1).values[:, -1:]
    reward = torch.where(in_head, shaping.lambda_head, shaping.lambda_tail).scatter(1, y[:, None], 0.0)
    log_px = log_p.gather(1, y[:, None])
    w = ((1 - (-torch.expm1(log_px)) ** shaping.beta) * log_px).exp()
    mass = (p * reward).sum(-1, keepdim=True)
    grad = p * (w + mass - reward)
    grad.scatter_add_(1, y[:, None], -w)
    return (-w * log_px - mass).squeeze(1), (grad * upstream[:, None]).to(z.dtype)


# Whole, and the shard of one of eight tensor-parallel ranks.
GPU_VOCABULARIES = [vocab // ranks for ranks in (1, 8) for vocab in (32_768, 131_072, 151_936, 256_000)]


def providers(shape: tuple[int, int], device: str) -> dict[str, Provider]:
    def ours(shaping: RewardShaping, **options: bool) -> Provider:
        return backward_through(lambda z, y: reward_shaped_cross_entropy(z, y, shaping, **options))

    copy_target = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    found = {
        "copy of the logits": lambda z, y, upstream: copy_target.copy_(z),
        "ours, shaped, k=100": ours(SHAPED),
        "ours, shaped, in place": ours(SHAPED, inplace_backward=True),
        "ours, shaped, statistics": backward_through(
            lambda z, y: reward_shaped_cross_entropy_with_stats(z, y, SHAPED)[0]
        ),
        "ours, plain": ours(RewardShaping()),
        "ours, plain, in place": ours(RewardShaping(), inplace_backward=True),
        "shaped, torch operators": torch_operators,
        "shaped, torch.compile": torch.compile(torch_operators),
        "plain, F.cross_entropy(z.float())": backward_through(
            lambda z, y: F.cross_entropy(z.float(), y, reduction="none")
        ),
        "plain, Megatron-Core": megatron(device),
    }
    if device == "cuda":
        found |= gpu_rivals()
    return found


def milliseconds_of(run: Callable[..., object], *inputs: Tensor) -> float:
    if inputs[0].is_cuda:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(*inputs)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    start = time.perf_counter()
    run(*inputs)
    return (time.perf_counter() - start) * 1e3


def milliseconds(tokens: int, vocab: int, rounds: int, device: str) -> dict[str, dict[str, float]]:
    """Median and best of the rounds."""
    torch.manual_seed(0)
    z = torch.randn(tokens, vocab, device=device, dtype=torch.bfloat16) * 2
    y, upstream = torch.randint(vocab, (tokens,), device=device), torch.rand(tokens, device=device)
    candidates = providers((tokens, vocab), device)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    scratch = z.clone()
    for _ in range(rounds):
        for name, run in candidates.items():
            for timed in (False, True):  # the first call pays for what the provider before it left of the memory
                scratch.copy_(z)  # some providers overwrite their input
                elapsed = milliseconds_of(run, scratch, y, upstream)
                if timed:
                    times[name].append(elapsed)
    return {name: {"median": statistics.median(each), "best": min(each)} for name, each in times.items()}


def peak_bytes() -> int:
    """Of this program alone; getrusage's figure also covers what the process was before it became this program."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def extra_bytes_per_token(name: str, tokens: int, vocab: int, device: str) -> float:
    """Growth of the peak memory, the device's or the process's own, beyond the logits and one gradient."""
    tiny = torch.randn(8, 128, device=device, dtype=torch.bfloat16)
    z = torch.randn(tokens, vocab, device=device, dtype=torch.bfloat16)
    y, upstream = torch.randint(128, (tokens,), device=device), torch.rand(tokens, device=device)
    run = providers((1, 1), device)[name]
    run(tiny, y[:8], upstream[:8])  # threads, libraries
    if device == "cuda":
        before = torch.cuda.memory_allocated() + z.nbytes
        torch.cuda.reset_peak_memory_stats()
        run(z, y, upstream)
        return (torch.cuda.max_memory_allocated() - before) / tokens
    torch.ones_like(z)
    before = peak_bytes()
    run(z, y, upstream)
    return (peak_bytes() - before) / tokens


def memory(names: list[str], tokens: int, vocab: int, device: str) -> dict[str, float]:
    """Each in a process of its own, because a process's peak cannot be reset."""
    found = {}
    for name in names:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[name] = pool.apply(extra_bytes_per_token, (name, tokens, vocab, device))
    return found


def environment(device: str) -> dict[str, object]:
    model = next(s.split(":")[1].strip() for s in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in s)
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if device == "cuda" else {}
    return {
        **gpu,
        "cpu": f"{model}, {os.cpu_count()} cores, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "kernels": load_kernels(),
        "date": time.strftime("%Y-%m-%d"),
    }


def named(folder: Path, result: dict[str, object], prefix: str = "") -> Path:
    """`h200-2026-11-21.json`, after the device and the date."""
    device = str(result.get("gpu") or result["cpu"]).split(",")[0]
    words = [word for word in re.findall(r"[a-z0-9]+", device.lower()) if word != "nvidia"]
    return folder / f"{prefix}{'-'.join(words)}-{result['date']}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tokens", type=int, help="default: 256 on a CPU, 8192 on a GPU")
    parser.add_argument("--vocab", type=int, nargs="+", help="default: 32768 131072, on a GPU more and their eighths")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-memory", action="store_true", help="skip the memory figures")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file, or into this folder")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no CUDA device")
    tokens = args.tokens or (8192 if args.device == "cuda" else 256)
    vocabularies = args.vocab or (GPU_VOCABULARIES if args.device == "cuda" else [32768, 131072])

    result: dict[str, object] = environment(args.device)
    print("# " + ", ".join(f"{key} {value}" for key, value in result.items()))
    for vocab in vocabularies:
        times = milliseconds(tokens, vocab, args.rounds, args.device)
        result[f"ms, {tokens} x {vocab}"] = times
        ours, copy = times["ours, shaped, k=100"], times["copy of the logits"]
        title = f"bf16, {tokens} tokens x {vocab}, forward + backward"
        print(f"\n{title:52}median ms  / ours  best ms  / ours  floor")
        for name, ms in times.items():
            ratios = {kind: ms[kind] / ours[kind] for kind in ms}
            print(
                f"  {name:50}{ms['median']:9.2f}{ratios['median']:7.2f}x{ms['best']:9.2f}{ratios['best']:7.2f}x"
                f"{1.5 * copy['best'] / ms['best']:7.0%}"
            )
    if not args.no_memory:
        names = ["ours, shaped, k=100", "ours, shaped, statistics", "shaped, torch operators", "plain, Megatron-Core"]
        extra = memory(names, 1024, 32768, args.device)
        result["peak bytes a token beyond logits and gradient, 1024 x 32768"] = extra
        print("\npeak memory beyond the logits and their gradient, 1024 tokens x 32768")
        for name, size in extra.items():
            print(f"  {name:42}{size:12.0f} bytes a token")
    if args.output:
        output = args.output if args.output.suffix == ".json" else named(args.output, result)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\n{output}")


if __name__ == "__main__":
    main()
