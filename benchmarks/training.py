"""A training step with the reward-shaped loss against the same step with Megatron-Core's own cross entropy, and ReMiT's
against the reward-shaped one: with the reference's log-probabilities in the batch, where a thread puts those of a
side-car, and with a reference of equal size that goes over the batch first. And what `ptrl rl` does once its responses
are judged, packing them and one step on them, against a step of pre-training on as many tokens.

    python benchmarks/training.py [--vocab 32768] [--steps 10] [--processor_time] [--output FILE.json]
    torchrun --nproc-per-node 2 benchmarks/training.py --tp 2

One model, the same batch, the losses in turn, medians; so the ratio is meant to be read, not the milliseconds.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megatron_ptrl.training import host

host.install_if_no_cuda()

import numpy  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megatron_ptrl.config import (  # noqa: E402
    DataConfig,
    LossConfig,
    ModelConfig,
    PaceConfig,
    ParallelConfig,
    PretrainConfig,
    RemitConfig,
    RLConfig,
    RolloutConfig,
    TrainConfig,
)
from megatron_ptrl.config.rl import PromptRowsConfig  # noqa: E402
from megatron_ptrl.data.rollouts import TrainedResponse, microbatches  # noqa: E402
from megatron_ptrl.training import loop, mcore, policy_step  # noqa: E402
from megatron_ptrl.training.online_reference import OnlineReference  # noqa: E402
from megatron_ptrl.training.optimizer import build_optimizer  # noqa: E402
from megatron_ptrl.training.runlog import environment  # noqa: E402
from megatron_ptrl.training.weighting import TokenWeighting  # noqa: E402

PLAIN, SIDECAR, ONLINE = "reward shaped, plain", "plain, ReMiT from a side-car", "plain, ReMiT online"
POLICY = "policy loss, responses packed"
LOSSES = {
    "megatron cross entropy": LossConfig(impl="megatron"),
    PLAIN: LossConfig(),
    POLICY: LossConfig(top_k=1),  # what `ptrl rl` has
    SIDECAR: LossConfig(),
    ONLINE: LossConfig(),
    "reward shaped, beta -0.25": LossConfig(beta=-0.25),
    "reward shaped, beta -0.25, head 0.1, tail -0.1, k 100": LossConfig(beta=-0.25, lambda_head=0.1, lambda_tail=-0.1),
}


def main() -> None:
    """Print a table and, when asked, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seq_length", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10, help="timed steps for each loss")
    parser.add_argument(
        "--processor_time", action="store_true", help="instead of the clock: other work on the machine does not count"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    config = PretrainConfig(
        model=ModelConfig(num_layers=arguments.layers, hidden_size=arguments.hidden),
        parallel=ParallelConfig(tp=arguments.tp, sequence_parallel=arguments.tp > 1),
        data=DataConfig(seq_length=arguments.seq_length),
        train=TrainConfig(
            global_batch=arguments.sequences, micro_batch=arguments.sequences, precision=arguments.precision
        ),
    )
    mcore.initialize(config)
    clock = time.process_time if arguments.processor_time else time.perf_counter
    seconds = measure(config, arguments.vocab, arguments.steps, clock)
    if dist.get_rank() == 0:
        report(arguments, seconds)
    mcore.shutdown()


def measure(config: PretrainConfig, vocab: int, steps: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each timed step, by loss; two steps of each warm up."""
    chunks = mcore.build_model(config, vocab)
    optimizer = build_optimizer(config, chunks)
    batch = random_batch(config, vocab)
    reference = OnlineReference(config, mcore.build_frozen_model(config, vocab))
    weighting = TokenWeighting(RemitConfig(weighting="remit", reference="of equal size"))
    policy, responses = policy_config(config), random_responses(config, vocab)

    def pretrain(name: str) -> None:
        # A reference writes into the batch it is given.
        batches = iter([dict(batch)])
        if name == ONLINE:
            batches = reference.score(batches, num_microbatches=1)
        weighs = weighting if name in (SIDECAR, ONLINE) else None
        loop.train_step(config, chunks, optimizer, batches, num_microbatches=1, weighting=weighs)

    def reinforce() -> None:
        rows, width = config.train.micro_batch, config.data.seq_length
        batches = microbatches(responses, seq_length=width, micro_batch=rows, dp_rank=0, dp_size=1)
        policy_step.train_step(policy, chunks, optimizer, batches)

    seconds: dict[str, list[float]] = {name: [] for name in LOSSES}
    for step in range(steps + 2):
        for name, loss in LOSSES.items():
            mcore.unwrap(chunks[0]).loss = loss
            dist.barrier()
            start = clock()
            if name == POLICY:
                reinforce()
            else:
                pretrain(name)
            if step >= 2:
                seconds[name].append(clock() - start)
    return seconds


def policy_config(config: PretrainConfig) -> RLConfig:
    """`ptrl rl` on the same model and rows."""
    width = config.data.seq_length
    return RLConfig(
        model=config.model,
        parallel=config.parallel,
        data=PromptRowsConfig(seq_length=width),
        train=PaceConfig(micro_batch=config.train.micro_batch, precision=config.train.precision),
        rollout=RolloutConfig(max_tokens=width // 2),
    )


def random_responses(config: PretrainConfig, vocab: int) -> list[TrainedResponse]:
    """What fills the rows: four responses in each, as long as their prompts."""
    draw, rows = numpy.random.default_rng(1), config.train.micro_batch
    half = config.data.seq_length // 8
    ids = draw.integers(vocab, size=(4 * rows, 2 * half + 1)).astype(numpy.int32)
    return [
        TrainedResponse(
            prompt_ids=row[: half + 1].tolist(),
            token_ids=row[half + 1 :],
            logprobs=numpy.full(half, -numpy.log(vocab), numpy.float32),
            advantage=float(number % 2) - 0.5,
        )
        for number, row in enumerate(ids)
    ]


def random_batch(config: PretrainConfig, vocab: int) -> dict[str, Any]:
    """Megatron's batch with random tokens, alike on all ranks."""
    shape = (config.train.micro_batch, config.data.seq_length)
    generator = torch.Generator().manual_seed(1)
    return {
        "tokens": torch.randint(vocab, shape, generator=generator),
        "labels": torch.randint(vocab, shape, generator=generator),
        "loss_mask": torch.ones(shape),
        "reference_logprob": -10 * torch.rand(shape, generator=generator),
        "position_ids": torch.arange(shape[1]).expand(shape),
        "attention_mask": None,
    }


def report(arguments: argparse.Namespace, seconds: dict[str, list[float]]) -> None:
    """The table: median milliseconds of a step, and how they compare."""
    about = environment()
    setting = {name: value for name, value in vars(arguments).items() if name != "output"}
    print(f"# {about['machine']}, {about['cores']} cores, GPUs {about['gpus'] or 'none'}, commit {about['commit']}")
    print("# " + ", ".join(f"{name} {value}" for name, value in setting.items()))
    medians = {name: statistics.median(values) * 1e3 for name, values in seconds.items()}
    first = next(iter(medians.values()))
    print(f"{'loss':<55}{'ms a step':>10}{'ratio':>8}")
    for name, milliseconds in medians.items():
        print(f"{name:<55}{milliseconds:>10.1f}{milliseconds / first:>8.3f}")
    print(f"# {POLICY}: {medians[POLICY] / medians[PLAIN]:.3f} times {PLAIN}, on as many tokens")
    if arguments.output:
        result = {"setting": setting, "environment": about, "milliseconds": medians}
        result["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + os.linesep)


if __name__ == "__main__":
    main()
