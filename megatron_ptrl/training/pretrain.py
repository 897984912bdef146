"""`ptrl pretrain`: `.bin/.idx` -> a GPT trained with the reward-shaped cross entropy -> checkpoints, metrics, plots.

    tokens --microbatches--> train_step --every so often--> evaluate, save --at the end--> summary, plots, a sample

Run it alone or under torchrun; the same command continues a run that was stopped or killed.
"""

import os
from importlib.util import find_spec

from megatron_ptrl.config import PretrainConfig
from megatron_ptrl.data.batches import Samples, build_datasets, unigram_cross_entropy
from megatron_ptrl.data.indexed import count_tokens, load_blend, resolve_tokenizer
from megatron_ptrl.data.tokenizer import Tokenizer
from megatron_ptrl.errors import InputError
from megatron_ptrl.training import checkpoint, layers, loop, mcore, plan
from megatron_ptrl.training.generate import generate
from megatron_ptrl.training.layout import Layout, check_launched, check_layout
from megatron_ptrl.training.online_reference import MANIFEST_KEY, OnlineReference, find_reference
from megatron_ptrl.training.optimizer import check_schedule
from megatron_ptrl.training.run import Figures, on_all_ranks
from megatron_ptrl.training.sampled import SampledRun
from megatron_ptrl.training.summary import summary
from megatron_ptrl.training.token_log import TokenLog
from megatron_ptrl.training.token_log import lines as token_lines
from megatron_ptrl.training.weighting import TokenWeighting

SIDECARS_KEY = "sidecars"
"""Of a checkpoint's manifest: the digests of the side-cars, in the order of the training data."""


def run(config: PretrainConfig) -> None:
    """Train as `config` says, from the newest whole checkpoint of `run_dir` where there is one."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if config.dry_run:
        print(_dry_run(config, world_size))
        return
    layout, tokenizer = _check(config, world_size)
    on_all_ranks(config, lambda: Pretraining(config, layout, tokenizer).run())


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


class Pretraining(SampledRun):
    """One run on this rank: what it is made of, and the loop over its steps."""

    config: PretrainConfig
    train_data: Samples
    valid_data: Samples | None

    def _prepare(self) -> list[str]:
        config, train = self.config, self.config.train
        self.held_out = {}
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
        notes: list[str] = []
        if config.remit.online:
            self.reference, path, notes = OnlineReference.load(config, self.tokenizer, self.layout.world_size)
            self.about[MANIFEST_KEY] = str(path.resolve())
        if self.train_data.sidecars:
            notes += self._compare_sidecars([sidecar.digest for sidecar in self.train_data.sidecars])
        if config.remit.unused:
            unused = f"{config.remit.unused} is not used: remit.weighting is none, every token has the same weight"
            notes = [unused, *notes]
        return notes

    def _compare_sidecars(self, digests: list[str]) -> list[str]:
        """A note where the run had others when it was saved."""
        self.about[SIDECARS_KEY] = digests
        begun = checkpoint.find_on_rank_0(self.checkpoints).path
        before = checkpoint.read_manifest(begun).get(SIDECARS_KEY, digests) if begun else digests
        return [] if before == digests else ["remit.sidecar has other values than when the checkpoint was saved"]

    def _step(self) -> Figures:
        step = self.progress.step + 1
        logs_tokens = step % self.config.log.every == 0 or step == self.config.train.steps
        if self.weighting and logs_tokens:
            self.weighting.log.arm()
        figures = super()._step()
        if self.weighting and logs_tokens:
            self._record_tokens(self.weighting.log, step)
        return figures

    def _learn(self) -> Figures:
        batches, num_microbatches = self.batches, self.layout.num_microbatches
        if self.reference:
            batches = self.reference.score(batches, num_microbatches)
        return loop.train_step(self.config, self.chunks, self.optimizer, batches, num_microbatches, self.weighting)

    def _record_tokens(self, log: TokenLog, step: int) -> None:
        rows = log.collect(self.config.train.micro_batch, self.config.data.seq_length)
        if self.log and rows is not None:
            self.log.record_tokens(token_lines(rows, self.tokenizer, step, self.config.remit.top_tokens))

    def _finish(self, figures: dict[str, float], rates: list[float], seconds: float) -> None:
        text = self._sample()
        if not self.log:
            return
        unigram = unigram_cross_entropy(self.train_data, self.valid_data) if self.valid_data else None
        tokens = self.progress.consumed_samples * self.config.data.seq_length
        self.say(
            summary(figures, self.held_out, unigram, rates, steps=self.progress.step, tokens=tokens, seconds=seconds)
        )
        self._draw_plots()
        if text is not None:
            self.say(f"sample, temperature {self.config.sample.temperature:g}:\n{text}")

    def _sample(self) -> str | None:
        sample = self.config.sample
        if not sample.tokens:
            return None
        prompt = [self.tokenizer.eod, *self.tokenizer.encode(sample.prompt)]
        new = generate(self.config, self.chunks, prompt, vocab_size=self.tokenizer.vocab_size, eod=self.tokenizer.eod)
        return sample.prompt + self.tokenizer.decode(new)
