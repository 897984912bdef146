"""What a run has whose data are numbered rows, `global_batch` of them a step: pre-training, fine-tuning.

train_data --microbatches--> train_step --every so often--> the held-out rows of valid_data
"""

import math
import time

import torch
from megatron.core import parallel_state

from megatron_ptrl.data.batches import Rows, microbatches
from megatron_ptrl.training import loop
from megatron_ptrl.training.checkpoint import Progress
from megatron_ptrl.training.run import Figures, TrainingRun


class SampledRun(TrainingRun):
    """One run on this rank. `_prepare` sets the data."""

    train_data: Rows
    """Those that are missing in the last step are empty."""
    valid_data: Rows | None
    held_out: Figures

    def _begin(self) -> None:
        self.batches = self._batches()

    def _evaluates_at(self, step: int) -> bool:
        every = self.config.train.eval_every
        return every > 0 and step % every == 0

    def _already_complete(self) -> None:
        self.say(f"the run in {self.run_dir} is complete; evaluating it again")
        self._evaluate(record=False)

    def _batches(self) -> loop.Batches:
        train = self.config.train
        return microbatches(
            self.train_data,
            first_sample=self.progress.consumed_samples,
            end_sample=min(train.steps * train.global_batch, len(self.train_data)),
            global_batch=train.global_batch,
            micro_batch=train.micro_batch,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=self.layout.dp,
            pin_memory=torch.cuda.is_available(),
        )

    def _learn(self) -> Figures:
        """One optimizer step on the next global batch."""
        return loop.train_step(self.config, self.chunks, self.optimizer, self.batches, self.layout.num_microbatches)

    def _step(self) -> Figures:
        config, start = self.config, time.perf_counter()
        # The rate that this step uses; the scheduler then moves on to the next step's.
        learning_rate = self._learning_rate()
        means = self._learn()
        self.scheduler.step(increment=config.train.global_batch)
        consumed = self.progress.consumed_samples + config.train.global_batch
        self.progress = Progress(self.progress.step + 1, consumed)
        seconds = time.perf_counter() - start
        tokens = config.train.global_batch * config.data.seq_length
        return self._record(
            {
                "step": self.progress.step,
                "consumed_samples": consumed,
                "consumed_tokens": consumed * config.data.seq_length,
                **means,
                "learning_rate": learning_rate,
                "step_seconds": seconds,
                "tokens_per_second": tokens / seconds,
            }
        )

    def _evaluate(self, *, record: bool = True) -> None:
        if self.valid_data is None:
            return
        means = self._held_out_means(self.valid_data)
        figures = {f"valid_{name}": value for name, value in means.items()}
        figures["valid_perplexity"] = math.exp(min(means["ce"], 700.0))
        self.held_out = {"step": self.progress.step, **figures}
        if self.log:
            if record:
                self.log.record(self.held_out)
            self.say(
                f"step {self.progress.step}: held-out ce {means['ce']:.4f}, "
                f"perplexity {figures['valid_perplexity']:.2f}"
            )

    def _held_out_means(self, rows: Rows) -> Figures:
        train, dp = self.config.train, self.layout.dp
        # The interleaved schedule takes microbatches in groups of pp; the loss mask of the surplus is zero.
        group = self.config.parallel.pp if self.config.parallel.vpp else 1
        rounds = -(-len(rows) // (train.micro_batch * dp * group)) * group
        batches = microbatches(
            rows,
            first_sample=0,
            end_sample=len(rows),
            global_batch=rounds * train.micro_batch * dp,
            micro_batch=train.micro_batch,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=dp,
            pin_memory=torch.cuda.is_available(),
        )
        return loop.evaluate(self.config, self.chunks, batches, rounds)
