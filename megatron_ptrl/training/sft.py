"""`ptrl sft`: conversations + a checkpoint -> a model that answers -> checkpoints, metrics.

    files --build_conversations--> tokens on disk --ChatRows--> microbatches --> train_step, the loss on responses alone

Run it alone or under torchrun; the same command continues a run that was stopped or killed.
"""

import dataclasses
import os
import tempfile
from pathlib import Path

from megatron_ptrl.config import SFTConfig
from megatron_ptrl.data.chat import make_template
from megatron_ptrl.data.chat_rows import ChatRows
from megatron_ptrl.data.chat_store import Conversations, build_conversations
from megatron_ptrl.data.conversations import find_conversation_files
from megatron_ptrl.data.tokenizer import DEFAULT_EOD, Tokenizer
from megatron_ptrl.errors import InputError
from megatron_ptrl.training import checkpoint, layers, mcore, plan
from megatron_ptrl.training.layout import Layout, check_launched, check_layout
from megatron_ptrl.training.optimizer import check_schedule
from megatron_ptrl.training.rank_zero import from_rank_0
from megatron_ptrl.training.run import Figures, on_all_ranks
from megatron_ptrl.training.sampled import SampledRun
from megatron_ptrl.training.summary import summary

CONVERSATIONS_KEY = "conversations"
"""Under which a checkpoint of the run names the tokenized conversations it was trained on."""


def run(config: SFTConfig) -> None:
    """Train as `config` says, from the newest whole checkpoint of `run_dir` where there is one."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if config.dry_run:
        print(_dry_run(config, world_size))
        return
    layout, tokenizer = check(config, world_size)
    check_launched(world_size)
    on_all_ranks(config, lambda: tuning(config, layout, tokenizer).run())


def check(config: SFTConfig, world_size: int) -> tuple[Layout, Tokenizer]:
    """Everything that can be refused before a process group or a model is built."""
    layout = check_layout(config, world_size)
    layers.check_supported(config)
    mcore.transformer_config(config)
    if config.data.tokenizer is None:
        raise InputError("data.tokenizer is not set; expected the tokenizer.json that the checkpoint was trained with")
    tokenizer = Tokenizer(config.data.tokenizer, config.data.eod_token or DEFAULT_EOD)
    config.loss.check_vocabulary(tokenizer.vocab_size)
    make_template(config.data.template, tokenizer)
    return layout, tokenizer


def tuning(config: SFTConfig, layout: Layout, tokenizer: Tokenizer) -> "SupervisedTuning":
    """The run, once its conversations are tokenized and its steps are counted. Collective over all ranks."""
    cache = Path(config.data.cache or Path(config.run_dir) / "data_cache")
    train = Conversations(from_rank_0(lambda: _build(config, tokenizer, config.data.train, "data.train", cache)))
    valid = None
    if config.data.valid and config.train.eval_samples:
        files = config.data.valid
        valid = Conversations(from_rank_0(lambda: _build(config, tokenizer, files, "data.valid", cache)))
    counted, rows = _count_steps(config, tokenizer, train)
    check_schedule(counted)
    return SupervisedTuning(counted, layout, tokenizer, train, rows, valid)


def _build(config: SFTConfig, tokenizer: Tokenizer, files: list[str], field: str, cache: Path) -> Path:
    return build_conversations(
        find_conversation_files(files, field),
        cache,
        tokenizer=tokenizer,
        template=make_template(config.data.template, tokenizer),
        seq_length=config.data.seq_length,
        too_long=config.data.too_long,
        turns=config.data.turns,
    )


def _count_steps(config: SFTConfig, tokenizer: Tokenizer, train: Conversations) -> tuple[SFTConfig, ChatRows]:
    """The config with the steps that the epochs have rows for, and those rows."""
    settings = config.train
    rows = ChatRows(
        train,
        seq_length=config.data.seq_length,
        vocab_size=tokenizer.vocab_size,
        seed=settings.seed,
        epochs=None if settings.steps else settings.epochs,
        rows=settings.steps * settings.global_batch or None,
    )
    steps = settings.steps or -(-len(rows) // settings.global_batch)
    return dataclasses.replace(config, train=dataclasses.replace(settings, steps=steps)), rows


def _dry_run(config: SFTConfig, launched: int) -> str:
    parallel = config.parallel
    smallest = parallel.tp * parallel.pp * parallel.cp
    world_size = max(launched, smallest) if config.dry_run_world_size is None else config.dry_run_world_size
    layout, tokenizer = check(config, world_size)
    with tempfile.TemporaryDirectory() as cache:
        conversations = Conversations(_build(config, tokenizer, config.data.train, "data.train", Path(cache)))
        counted, rows = _count_steps(config, tokenizer, conversations)
        fill = rows.fill
    check_schedule(counted)
    padded = mcore.padded_vocab_size(tokenizer.vocab_size, config.model, parallel.tp)
    count = plan.count_parameters(config.model, padded, mcore.ffn_size(config.model))
    memory = plan.memory_per_rank(config, layout, count, padded)
    passes = f"{len(rows):,} rows, {fill:.1%} full"
    shown = plan.sampled_run(counted, layout, count, padded, memory, passes)
    return plan.table(shown | {"conversations": conversations.describe()})


class SupervisedTuning(SampledRun):
    """One run on this rank."""

    config: SFTConfig
    train_data: ChatRows

    def __init__(
        self,
        config: SFTConfig,
        layout: Layout,
        tokenizer: Tokenizer,
        conversations: Conversations,
        rows: ChatRows,
        valid: Conversations | None,
    ) -> None:
        self.conversations, self.valid_conversations, self.train_data = conversations, valid, rows
        super().__init__(config, layout, tokenizer)

    def _prepare(self) -> list[str]:
        config, rows = self.config, self.train_data
        self.held_out = {}
        self.valid_data = None
        notes = [
            f"data.train: {self.conversations.describe()}",
            f"{len(rows):,} rows of {config.data.seq_length}, {rows.fill:.1%} full, in {config.train.steps:,} steps",
        ]
        for conversations in filter(None, (self.conversations, self.valid_conversations)):
            if conversations.about["rejected"]:
                notes.append(f"what was put aside, with its reason: {conversations.folder / 'rejects.jsonl'}")
        if self.valid_conversations is not None:
            whole = ChatRows(
                self.valid_conversations,
                seq_length=config.data.seq_length,
                vocab_size=self.tokenizer.vocab_size,
                seed=config.train.seed,
                epochs=1,
                rows=config.train.eval_samples,
            )
            self.valid_data = whole
            notes.append(f"data.valid: {self.valid_conversations.describe()}; evaluated on {len(whole):,} rows")
        now = self.about[CONVERSATIONS_KEY] = self.conversations.folder.name
        begun = checkpoint.find_on_rank_0(self.checkpoints).path
        if begun and checkpoint.read_manifest(begun).get(CONVERSATIONS_KEY) != now:
            notes.append("data.train is not what it was at the checkpoint: some are seen twice or never")
        return notes

    def _finish(self, figures: Figures, rates: list[float], seconds: float) -> None:
        if not self.log:
            return
        steps, tokens = self.progress.step, self.progress.consumed_samples * self.config.data.seq_length
        self.say(summary(figures, self.held_out, None, rates, steps=steps, tokens=tokens, seconds=seconds))
        self._draw_plots()
