"""`ptrl pretrain`: `.bin/.idx` -> a GPT trained with the reward-shaped cross entropy -> checkpoints, metrics, plots.

    tokens --microbatches--> train_step --every so often--> evaluate, save --at the end--> summary, plots, a sample

Run it alone or under torchrun; the same command continues a run that was stopped or killed.
"""

import dataclasses
import math
import os
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from megatron.core import parallel_state

from megatron_ptrl.config import PretrainConfig
from megatron_ptrl.data.batches import build_datasets, microbatches, unigram_cross_entropy
from megatron_ptrl.data.indexed import count_tokens, load_blend, resolve_tokenizer
from megatron_ptrl.data.tokenizer import Tokenizer
from megatron_ptrl.errors import InputError
from megatron_ptrl.training import checkpoint, layers, loop, mcore, plan
from megatron_ptrl.training.checkpoint import Progress
from megatron_ptrl.training.generate import generate
from megatron_ptrl.training.layout import Layout, check_launched, check_layout
from megatron_ptrl.training.online_reference import MANIFEST_KEY, OnlineReference, find_reference
from megatron_ptrl.training.optimizer import build_optimizer, build_scheduler, check_schedule
from megatron_ptrl.training.resume import describe, model_fields, restore
from megatron_ptrl.training.runlog import RunLog
from megatron_ptrl.training.signals import Signals
from megatron_ptrl.training.summary import summary
from megatron_ptrl.training.token_log import TokenLog
from megatron_ptrl.training.token_log import lines as token_lines
from megatron_ptrl.training.weighting import TokenWeighting


def run(config: PretrainConfig) -> None:
    """Train as `config` says, from the newest whole checkpoint of `run_dir` where there is one."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if config.dry_run:
        print(_dry_run(config, world_size))
        return
    layout, tokenizer = _check(config, world_size)
    mcore.initialize(config)
    try:
        Pretraining(config, layout, tokenizer).run()
    except InputError as error:
        # Each rank has its own part of the data, so this may be the only one that knows.
        error.rank = dist.get_rank()
        raise
    finally:
        mcore.shutdown()


def _check(config: PretrainConfig, world_size: int) -> tuple[Layout, Tokenizer]:
    """Everything that can be refused before a process group or a model is built."""
    layout = check_layout(config, world_size)
    layers.check_supported(config)
    mcore.transformer_config(config)
    check_schedule(config)
    if not config.data.train:
        raise InputError("data.train is empty; expected the prefix of a .bin/.idx pair, as `ptrl tokenize` writes it")
    if config.sample.tokens and getattr(config.model, "mtp_num_layers", None):
        raise InputError("sample.tokens with model.mtp_num_layers: Megatron-Core gives no logits there; set it to 0")
    if config.sample.tokens and config.parallel.cp > 1:
        raise InputError("sample.tokens with parallel.cp > 1: a sample is generated without it; set one of them back")
    if config.log.wandb_project and find_spec("wandb") is None:
        raise InputError(
            f"log.wandb_project is {config.log.wandb_project} and wandb is not installed; "
            "pip install megatron-ptrl[wandb]"
        )
    check_launched(world_size)
    tokenizer = resolve_tokenizer(config.data)
    config.loss.check_vocabulary(tokenizer.vocab_size)
    if config.remit.online:
        find_reference(config, tokenizer, world_size)
    return layout, tokenizer


def _dry_run(config: PretrainConfig, launched: int) -> str:
    parallel = config.parallel
    smallest = parallel.tp * parallel.pp * parallel.cp
    world_size = max(launched, smallest) if config.dry_run_world_size is None else config.dry_run_world_size
    layout = check_layout(config, world_size)
    check_schedule(config)
    if not config.data.train:
        raise InputError("data.train is empty; the dry run reads the vocabulary from its tokenizer")
    tokenizer = resolve_tokenizer(config.data)
    padded = mcore.padded_vocab_size(tokenizer.vocab_size, config.model, parallel.tp)
    tokens = sum(count_tokens(prefix) for _, prefix in load_blend(config.data.train))
    reference_bytes = None
    if config.remit.online:
        _, reference, _ = find_reference(config, tokenizer, world_size)
        its_padded = mcore.padded_vocab_size(tokenizer.vocab_size, reference.model, parallel.tp)
        reference_bytes = plan.reference_memory(reference, layout, its_padded, mcore.ffn_size(reference.model))
    return plan.describe(config, layout, padded, mcore.ffn_size(config.model), tokens, reference_bytes)


@dataclass
class Pretraining:
    """One run on this rank: what it is made of, and the loop over its steps."""

    config: PretrainConfig
    layout: Layout
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        config, train = self.config, self.config.train
        self.run_dir = Path(config.run_dir)
        self.checkpoints = self.run_dir / "checkpoints"
        self.train_data, self.valid_data = build_datasets(
            config.data,
            seed=train.seed,
            train_samples=train.steps * train.global_batch,
            valid_samples=train.eval_samples,
            tokenizer=self.tokenizer,
            cache=config.data.cache or str(self.run_dir / "data_cache"),
            remit=config.remit,
        )
        self.weighting = TokenWeighting(config.remit) if config.remit.weighting != "none" else None
        self.reference: OnlineReference | None = None
        found: list[str] = []
        self.about = describe(config, self.tokenizer)
        if config.remit.online:
            # Before the model, whose checkpoint brings a random state that this would undo.
            self.reference, path, found = OnlineReference.load(config, self.tokenizer, self.layout.world_size)
            self.about[MANIFEST_KEY] = str(path.resolve())
        self.chunks = mcore.build_model(config, self.tokenizer.vocab_size)
        self.optimizer = build_optimizer(config, self.chunks)
        self.scheduler = build_scheduler(config, self.optimizer)
        self.signals = Signals()
        self.held_out: dict[str, float] = {}
        self.progress, notes = restore(config, self.tokenizer, self.chunks, self.optimizer, self.scheduler)
        self.log = self._open_log()
        if config.remit.unused:
            notes.append(f"{config.remit.unused} is not used: remit.weighting is none, every token has the same weight")
        for note in [*notes, *found]:
            self.say(note)

    def run(self) -> None:
        """Train to the last step, or to a SIGTERM; then evaluate, save, summarise."""
        config, start = self.config, time.perf_counter()
        figures: dict[str, float] = {}
        rates: list[float] = []
        batches = self._batches()
        stopped = False
        while self.progress.step < config.train.steps and not stopped:
            figures = self._step(batches)
            rates.append(figures["tokens_per_second"])
            step = self.progress.step
            last = step == config.train.steps
            if last or (config.train.eval_every and step % config.train.eval_every == 0):
                self._evaluate()
            save_now, stopped = self.signals.agree()
            every = config.checkpoint.save_every
            if last or save_now or stopped or (every and step % every == 0):
                self._save()
        if not figures and not stopped:
            self.say(f"the run in {self.run_dir} is complete; evaluating it again")
            self._evaluate(record=False)
        if stopped:
            self.say(f"SIGTERM: saved at step {self.progress.step}; the same command continues")
        else:
            self._finish(figures, rates, time.perf_counter() - start)
        if self.log:
            self.log.close()

    def say(self, text: str) -> None:
        """A line in the log, from rank 0."""
        if self.log:
            self.log.say(text)

    def _open_log(self) -> RunLog | None:
        if dist.get_rank() != 0:
            return None
        complete = self.progress.step >= self.config.train.steps
        return RunLog(
            self.run_dir,
            self.config.log,
            first_step=self.progress.step,
            last_step=self.config.train.steps,
            settings=None if complete else yaml.safe_dump(plain_settings(self.config), sort_keys=False),
        )

    def _batches(self) -> loop.Batches:
        train = self.config.train
        return microbatches(
            self.train_data,
            first_sample=self.progress.consumed_samples,
            end_sample=train.steps * train.global_batch,
            global_batch=train.global_batch,
            micro_batch=train.micro_batch,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=self.layout.dp,
            pin_memory=torch.cuda.is_available(),
        )

    def _step(self, batches: loop.Batches) -> dict[str, float]:
        config, start = self.config, time.perf_counter()
        # The rate that this step uses; the scheduler then moves on to the next step's.
        learning_rate = max(group["lr"] for group in self.optimizer.param_groups)
        step = self.progress.step + 1
        logs_tokens = self.weighting and (step % config.log.every == 0 or step == config.train.steps)
        if self.weighting and logs_tokens:
            self.weighting.log.arm()
        num_microbatches = self.layout.num_microbatches
        if self.reference:
            batches = self.reference.score(batches, num_microbatches)
        means = loop.train_step(config, self.chunks, self.optimizer, batches, num_microbatches, self.weighting)
        self.scheduler.step(increment=config.train.global_batch)
        self.progress = Progress(step, self.progress.consumed_samples + config.train.global_batch)
        seconds = time.perf_counter() - start
        tokens = config.train.global_batch * config.data.seq_length
        figures = {
            "step": step,
            "consumed_samples": self.progress.consumed_samples,
            "consumed_tokens": self.progress.consumed_samples * config.data.seq_length,
            **means,
            "learning_rate": learning_rate,
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
        }
        if self.weighting and logs_tokens:
            self._record_tokens(self.weighting.log, step)
        if self.log:
            self.log.record(figures)
            self.log.progress(figures)
        if not all(math.isfinite(means[name]) for name in ("loss", "grad_norm")):
            message = (
                f"step {step}: loss {means['loss']}, gradient norm {means['grad_norm']}; nothing was saved after the "
                "last checkpoint. Lower optimizer.lr, lengthen warmup_steps or look at the data of this step"
            )
            self.say(message)
            raise InputError(message)
        return figures

    def _record_tokens(self, log: TokenLog, step: int) -> None:
        rows = log.collect(self.config.train.micro_batch, self.config.data.seq_length)
        if self.log and rows is not None:
            self.log.record_tokens(token_lines(rows, self.tokenizer, step, self.config.remit.top_tokens))

    def _evaluate(self, *, record: bool = True) -> None:
        if self.valid_data is None:
            return
        train, dp = self.config.train, self.layout.dp
        samples = len(self.valid_data)
        # The interleaved schedule takes microbatches in groups of pp; the loss mask of the surplus is zero.
        group = self.config.parallel.pp if self.config.parallel.vpp else 1
        rounds = -(-samples // (train.micro_batch * dp * group)) * group
        batches = microbatches(
            self.valid_data,
            first_sample=0,
            end_sample=samples,
            global_batch=rounds * train.micro_batch * dp,
            micro_batch=train.micro_batch,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=dp,
            pin_memory=torch.cuda.is_available(),
        )
        means = loop.evaluate(self.config, self.chunks, batches, rounds)
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

    def _save(self) -> None:
        path = checkpoint.save(
            self.checkpoints,
            self.progress,
            self.chunks,
            self.optimizer,
            self.scheduler,
            keep=self.config.checkpoint,
            about=self.about,
        )
        self.say(f"saved {path}")

    def _finish(self, figures: dict[str, float], rates: list[float], seconds: float) -> None:
        text = self._sample()
        if not self.log:
            return
        unigram = unigram_cross_entropy(self.train_data, self.valid_data) if self.valid_data else None
        tokens = self.progress.consumed_samples * self.config.data.seq_length
        self.say(
            summary(figures, self.held_out, unigram, rates, steps=self.progress.step, tokens=tokens, seconds=seconds)
        )
        if self.config.log.plots:
            from megatron_ptrl.evaluation.report import draw_plots

            paths = draw_plots([self.run_dir], self.run_dir / "plots")
            self.say(f"plots: {len(paths)} files in {self.run_dir / 'plots'}")
        if text is not None:
            self.say(f"sample, temperature {self.config.sample.temperature:g}:\n{text}")

    def _sample(self) -> str | None:
        sample = self.config.sample
        if not sample.tokens:
            return None
        prompt = [self.tokenizer.eod, *self.tokenizer.encode(sample.prompt)]
        new = generate(self.config, self.chunks, prompt, vocab_size=self.tokenizer.vocab_size, eod=self.tokenizer.eod)
        return sample.prompt + self.tokenizer.decode(new)


def plain_settings(config: Any) -> dict[str, Any]:
    """The config as YAML holds it, ready for --config: Megatron-Core's own fields only where they were set."""
    plain = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "model":
            value = model_fields(value)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        plain[field.name] = value
    return plain
