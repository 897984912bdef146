"""A pre-trained run -> the same model after reinforcement with a verifiable reward, as a run directory of its own.

    prompts  --sample-->  `--group` answers each  --is_right-->  rewards  --centre, scale-->  advantages
             --policy gradient through Megatron's schedule-->  one step; the new weights answer the next prompts

    torchrun ... rl_tune.py --prompts prompts.jsonl --config rl.yaml --data.train PREFIX --run_dir OUT
        --checkpoint.load PRETRAINED

Every flag but `--prompts`, `--group` and `--new_tokens` is a setting of `ptrl pretrain`; `train.global_batch` counts
the answers of a step. Strictly on-policy, so the ratio is 1 and nothing is clipped; there is no KL penalty. The layers
are not split over ranks here: all ranks are data parallel.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from megatron_ptrl.training import host

host.install_if_no_cuda()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from policy import Rows, forward, make_rows, sample  # noqa: E402
from problems import is_right  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_ptrl.cli import parse  # noqa: E402
from megatron_ptrl.config import PretrainConfig  # noqa: E402
from megatron_ptrl.data.indexed import resolve_tokenizer  # noqa: E402
from megatron_ptrl.data.tokenizer import Tokenizer  # noqa: E402
from megatron_ptrl.errors import InputError  # noqa: E402
from megatron_ptrl.training import checkpoint, mcore, resume  # noqa: E402
from megatron_ptrl.training.checkpoint import Progress  # noqa: E402
from megatron_ptrl.training.optimizer import build_optimizer, build_scheduler  # noqa: E402
from megatron_ptrl.training.run import plain_settings  # noqa: E402
from megatron_ptrl.training.runlog import RunLog  # noqa: E402


def advantages(rewards: Tensor) -> Tensor:
    """(prompts, group) -> the same: reward less the group's mean, over its deviation; 0 where all rewards are alike."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True).sqrt() + 1e-6)


def forward_step(batches: Iterator[tuple[Rows, Tensor]], model: Any) -> tuple[Tensor, Any]:
    """Megatron's forward step: -log p of every token of the answers, and what makes the policy loss of it."""
    rows, advantage = next(batches)

    def policy_loss(loss: Tensor) -> tuple[Tensor, Tensor, dict]:
        mask = rows.answer_mask.to(loss.device)
        total = (loss * mask * advantage.to(loss.device)[:, None]).sum()
        # The schedule divides the total in place, so what is reported is a copy.
        return total, mask.sum().int(), {"total": total.detach().clone()}

    return forward(model, rows.tokens, rows.labels), policy_loss


def learn(config: Any, chunks: list[Any], optimizer: Any, rows: Rows, advantage: Tensor) -> tuple[float, float]:
    """One step on answers with their advantages (b,): this rank's sum of the policy loss, the norm of the gradient.

    The loss is sum over tokens of -log p * advantage, over the number of tokens that all ranks' answers have.
    """
    size = config.train.micro_batch
    chunks[0].zero_grad_buffer()
    optimizer.zero_grad()
    cuts = [slice(begin, begin + size) for begin in range(0, len(advantage), size)]
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter([(rows.part(cut), advantage[cut]) for cut in cuts]),
        model=chunks[0],
        num_microbatches=len(cuts),
        seq_length=config.data.seq_length,
        micro_batch_size=size,
        decoder_seq_length=config.data.seq_length,
        forward_only=False,
    )
    _, grad_norm, _ = optimizer.step()
    return float(sum(report["total"] for report in reports)), float(grad_norm)


class Reinforcement:
    """The run on this rank; `step` is one round of answers, rewards and learning."""

    def __init__(self, config: Any, tokenizer: Tokenizer, problems: list[dict[str, Any]], group: int, new_tokens: int):
        self.config, self.tokenizer, self.problems = config, tokenizer, problems
        self.group, self.new_tokens = group, new_tokens
        self.chunks = mcore.build_model(config, tokenizer.vocab_size)
        self.optimizer = build_optimizer(config, self.chunks)
        self.scheduler = build_scheduler(config, self.optimizer)
        self.progress, self.notes = resume.restore(config, tokenizer, self.chunks, self.optimizer, self.scheduler)

    def step(self) -> dict[str, float]:
        """One optimizer step; the figures are those of all ranks together."""
        train, start = self.config.train, time.perf_counter()
        rank, size = dist.get_rank(), dist.get_world_size()
        drawn = random.Random(f"{train.seed} {self.progress.step}")
        problems = drawn.sample(self.problems, train.global_batch // self.group)[rank::size]
        prompts = [self.tokenizer.encode(problem["prompt"]) for problem in problems for _ in range(self.group)]
        generator = torch.Generator().manual_seed(drawn.getrandbits(32) + rank)
        answers = sample(
            self.chunks[0],
            self.tokenizer,
            prompts,
            new_tokens=self.new_tokens,
            temperature=1.0,
            generator=generator,
        )
        right = [
            is_right(self.tokenizer.decode(answer[:-1]), problems[i // self.group]["answer"])
            for i, answer in enumerate(answers)
        ]
        rewards = torch.tensor(right, dtype=torch.float32).view(-1, self.group)
        policy_loss, grad_norm = learn(
            self.config, self.chunks, self.optimizer, make_rows(prompts, answers), advantages(rewards).flatten()
        )
        self.scheduler.step(increment=train.global_batch)
        self.progress = Progress(self.progress.step + 1, self.progress.consumed_samples + train.global_batch)
        sums = torch.tensor([rewards.sum(), float(rewards.numel()), float(sum(map(len, answers))), policy_loss])
        sums = sums.cuda() if torch.cuda.is_available() else sums
        dist.all_reduce(sums)
        reward, count, tokens, policy_loss = sums.tolist()
        return {
            "step": self.progress.step,
            "loss": policy_loss / tokens,
            "reward": reward / count,
            "answer_tokens": tokens / count,
            "grad_norm": grad_norm,
            "step_seconds": time.perf_counter() - start,
        }

    def save(self) -> Path:
        """A checkpoint like that of `ptrl pretrain`."""
        return checkpoint.save(
            Path(self.config.run_dir) / "checkpoints",
            self.progress,
            self.chunks,
            self.optimizer,
            self.scheduler,
            keep=self.config.checkpoint,
            about=resume.describe(self.config, self.tokenizer),
        )


def run(config: Any, problems: list[dict[str, Any]], group: int, new_tokens: int) -> None:
    """All steps from the pre-trained weights, then a checkpoint. A run that is complete is left as it is."""
    loop = Reinforcement(config, resolve_tokenizer(config.data), problems, group, new_tokens)
    last, first = config.train.steps, loop.progress.step
    log = None
    if dist.get_rank() == 0 and first < last:
        settings = yaml.safe_dump(plain_settings(config), sort_keys=False)
        log = RunLog(Path(config.run_dir), config.log, first_step=first, last_step=last, settings=settings)
        for note in loop.notes:
            log.say(note)
    while loop.progress.step < last:
        figures = loop.step()
        if log:
            log.record(figures)
            if figures["step"] % config.log.every == 0 or figures["step"] == last:
                shown = ", ".join(f"{name} {figures[name]:.3f}" for name in ("reward", "answer_tokens", "grad_norm"))
                log.say(f"step {figures['step']}/{last}  {shown}  {figures['step_seconds']:.1f} s a step")
    if first < last:
        path = loop.save()
        if log:
            log.say(f"saved {path}")
            log.close()


def main() -> None:
    """Parse the command line; bad input ends in one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help='JSONL with "prompt" and "answer"')
    parser.add_argument("--group", type=int, default=8, help="answers to a prompt (default 8)")
    parser.add_argument("--new_tokens", type=int, default=32, help="tokens of an answer at most (default 32)")
    arguments, rest = parser.parse_known_args()
    try:
        config = parse(PretrainConfig, rest, prog="rl_tune.py")
        problems = [json.loads(line) for line in arguments.prompts.read_text(encoding="utf-8").splitlines()]
        mcore.initialize(config)
        per_round = arguments.group * parallel_state.get_data_parallel_world_size()
        if config.train.global_batch % per_round:
            raise InputError(f"train.global_batch is {config.train.global_batch}; expected a multiple of {per_round}")
        run(config, problems, arguments.group, arguments.new_tokens)
        mcore.shutdown()
    except InputError as error:
        sys.exit(f"rl_tune.py: {error}")


if __name__ == "__main__":
    main()
