"""`ptrl rl`: prompts + a checkpoint -> a policy that answers them better -> checkpoints, metrics, rollouts.

    PromptSource --Collector--> Round of groups --group_advantages--> TrainedResponse --pack--> rows
        --train_step--> the same weights answer the next prompts

Synchronous and, with one update a step, strictly on-policy: the ratio is 1, the loss is near 0 and its gradient is that
of REINFORCE; what to look at is the reward. Run it alone or under torchrun; the same command continues a run that was
stopped or killed.
"""

import os
import time
from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from megatron_ptrl.config import RLConfig
from megatron_ptrl.data.chat import make_template
from megatron_ptrl.data.prompts import PromptSource
from megatron_ptrl.data.rollouts import TrainedResponse, microbatches
from megatron_ptrl.data.tokenizer import DEFAULT_EOD, Tokenizer
from megatron_ptrl.errors import InputError
from megatron_ptrl.rollout.engine import RolloutEngine
from megatron_ptrl.rollout.rewards import check_judge, make_rewarder
from megatron_ptrl.training import checkpoint, layers, mcore, policy_step, rl_plan, rollout_figures, rollout_files
from megatron_ptrl.training.checkpoint import Progress
from megatron_ptrl.training.engines import check_engine, make_engine
from megatron_ptrl.training.frozen import load_frozen_model
from megatron_ptrl.training.hf_export import export_hf
from megatron_ptrl.training.idle_steps import IdleSteps
from megatron_ptrl.training.layout import Layout, check_launched, check_layout
from megatron_ptrl.training.optimizer import check_schedule
from megatron_ptrl.training.resume import check_same_model, find_source
from megatron_ptrl.training.rollouts import Collector, Group, Judging, Round, judges
from megatron_ptrl.training.run import Figures, TrainingRun, on_all_ranks

REFERENCE_KEY = "policy_reference"
"""Under which a checkpoint of the run says which checkpoint the reference is."""
MISMATCH_ALARM = 1.05
"""token_mult_prob_error above which engine and trainer no longer compute the same model (NeMo-RL's line)."""


def run(config: RLConfig) -> None:
    """Train as `config` says, from the newest whole checkpoint of `run_dir` where there is one."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if config.dry_run:
        print(_dry_run(config, world_size))
        return
    layout, tokenizer = check(config, world_size)
    check_launched(world_size)
    on_all_ranks(config, lambda: Reinforcement(config, layout, tokenizer).run())


def check(config: RLConfig, world_size: int) -> tuple[Layout, Tokenizer]:
    """Everything that can be refused before a process group or a model is built."""
    layout = check_layout(config, world_size)
    layers.check_supported(config)
    mcore.transformer_config(config)
    check_schedule(config)
    check_engine(config, config.rollout)
    if config.rollout.replay is None:
        check_judge(config.judge)
    if not config.prompts.files:
        raise InputError("prompts.files is empty; expected prompt files, as `ptrl segment` writes them")
    if config.data.tokenizer is None:
        raise InputError("data.tokenizer is not set; expected the tokenizer.json that the checkpoint was trained with")
    if config.policy.kl_coef and not (config.reference or config.checkpoint.load):
        raise InputError(f"policy.kl_coef is {config.policy.kl_coef} and there is no reference; set reference")
    return layout, Tokenizer(config.data.tokenizer, config.data.eod_token or DEFAULT_EOD)


def _dry_run(config: RLConfig, launched: int) -> str:
    smallest = config.parallel.tp * config.parallel.pp
    world_size = max(launched, smallest) if config.dry_run_world_size is None else config.dry_run_world_size
    layout, tokenizer = check(config, world_size)
    padded = mcore.padded_vocab_size(tokenizer.vocab_size, config.model, config.parallel.tp)
    return rl_plan.describe(config, layout, padded, mcore.ffn_size(config.model), len(_prompts(config, tokenizer)))


def _prompts(config: RLConfig, tokenizer: Tokenizer) -> PromptSource:
    return PromptSource(
        config.prompts.files,
        seed=config.train.seed,
        tokenizer=tokenizer,
        template=make_template(config.data.template, tokenizer),
        max_tokens=config.data.seq_length - config.rollout.max_tokens,
    )


class Reinforcement(TrainingRun):
    """One run on this rank."""

    config: RLConfig
    engine: RolloutEngine
    rewarder: Judging | None = None
    save_seconds: float = 0.0

    def _prepare(self) -> list[str]:
        config = self.config
        self.prompts = _prompts(config, self.tokenizer)
        self.reference: list[Any] | None = None
        if not config.policy.kl_coef:
            return []
        path, notes = self._find_reference()
        check_same_model(path, config, self.tokenizer)
        self.reference = load_frozen_model(config, path, self.tokenizer.vocab_size)
        for chunk in self.reference:
            chunk.requires_grad_(False)
        self.about[REFERENCE_KEY] = str(path.resolve())
        return [*notes, f"the policy is held to {path}"]

    def _find_reference(self) -> tuple[Path, list[str]]:
        """A run that continues keeps to the checkpoint that it has had."""
        begun = checkpoint.find_on_rank_0(self.checkpoints).path
        had = checkpoint.read_manifest(begun).get(REFERENCE_KEY) if begun else None
        named = self.config.reference or self.config.checkpoint.load
        assert named is not None
        return find_source(had or named, "reference")

    def _begin(self) -> None:
        self.engine = self._make_engine()
        # A replay brings its rewards along.
        if judges() and self.config.rollout.replay is None:
            self.rewarder = self._make_rewarder()
        self.idle = IdleSteps()
        self.collector = Collector(self.config, self.tokenizer, self.prompts, self.engine, self.rewarder)
        if self.config.judge.kind == "lexical":
            self.say("judge.kind is lexical: it compares characters and understands nothing; for smoke runs")

    def _make_engine(self) -> RolloutEngine:
        (first,), _, _ = self.prompts.take(0, 1)
        return make_engine(
            self.config,
            self.config.rollout,
            self.chunks,
            self.tokenizer,
            probe_ids=first.ids,
            folder=self.run_dir,
            trains=True,
        )

    def _make_rewarder(self) -> Judging:
        return make_rewarder(self.config.judge)

    def _close(self) -> None:
        if self.rewarder is not None:
            self.rewarder.close()
        if hasattr(self, "engine"):
            self.engine.close()

    def _step(self) -> Figures:
        config, start = self.config, time.perf_counter()
        learning_rate, step = self._learning_rate(), self.progress.step + 1
        mcore.gather_weights(self.chunks)
        if config.rollout.replay is None:
            self.engine.sync(self.progress.step, self._export)
        found = self._collect(step)
        collected = time.perf_counter()
        advantages = [group.advantages(normalize_std=config.policy.normalize_std) for group in found.groups]
        self._write(step, found, [values.tolist() for values in advantages])
        parts = self._parts(found)
        packed = time.perf_counter()
        trained = self._update(found, parts)
        self.scheduler.step(increment=1)
        tokens = rollout_figures.tokens(found)
        self.progress = Progress(step, found.next_place, self.progress.consumed_tokens + tokens)
        seconds = time.perf_counter() - start
        return self._record(
            {
                "step": step,
                "consumed_samples": self.progress.consumed_samples,
                "consumed_tokens": self.progress.consumed_tokens,
                **rollout_figures.figures(found),
                **trained,
                "learning_rate": learning_rate,
                "generate_seconds": found.generate_seconds,
                "judge_wait_seconds": found.judge_seconds,
                "pack_seconds": packed - collected,
                "update_seconds": start + seconds - packed,
                "save_seconds": self.save_seconds,
                "step_seconds": seconds,
                "tokens_per_second": tokens / seconds,
            }
        )

    def _collect(self, step: int) -> Round:
        replay = self.config.rollout.replay
        if replay is not None:
            return rollout_files.read(Path(replay), step, self.prompts.at)
        return self.collector.collect(self.progress.consumed_samples)

    def _write(self, step: int, found: Round, advantages: list[list[float]]) -> None:
        if not self.log:
            return
        self.log.record_rejects([{"step": step, **line} for line in found.rejects])
        if len(found.rejects) > len(found.groups):
            self.say(
                f"step {step}: {len(found.rejects)} prompts were passed over for the {len(found.groups)} that were "
                f"taken; the last one: {found.rejects[-1]['detail']}; see {self.run_dir / 'rejects.jsonl'}"
            )
        if self.config.rollout.dump:
            problem = rollout_files.write(self.run_dir / "rollouts", step, found, advantages, self.collector.text)
            if problem is not None:
                self.say(problem)

    def _parts(self, found: Round) -> list[list[Any]]:
        """This rank's microbatches of each update."""
        config, updates = self.config, self.config.rollout.updates
        groups = found.trained(drop_equal=config.rollout.drop_equal_groups)
        size = -(-len(groups) // updates)
        return [
            self._microbatches(
                [response for group in groups[i * size : (i + 1) * size] for response in self._responses(group)]
            )
            for i in range(updates)
        ]

    def _microbatches(self, responses: list[TrainedResponse]) -> list[Any]:
        config = self.config
        return microbatches(
            responses,
            seq_length=config.data.seq_length,
            micro_batch=config.train.micro_batch,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=self.layout.dp,
            multiple=config.parallel.pp if config.parallel.vpp else 1,
        )

    def _responses(self, group: Group) -> list[TrainedResponse]:
        config = self.config
        weight = config.prompts.msr_weight if group.placed.prompt.task == "msr" else 1.0
        advantages = group.advantages(normalize_std=config.policy.normalize_std).tolist()
        return [
            TrainedResponse(group.placed.ids, response.token_ids, response.logprobs, weight * advantage)
            for response, advantage, valid in zip(group.responses, advantages, group.valid, strict=True)
            if valid and not (config.rollout.mask_truncated and response.truncated)
        ]

    def _update(self, found: Round, parts: list[list[Any]]) -> Figures:
        """The optimizer steps; the figures of the last one, or those of a step without anything to learn."""
        config = self.config
        parts = [batches for batches in parts if batches]
        if not parts:
            return self._measure(found)
        if len(parts) > 1:
            for batches in parts:
                policy_step.add_logprobs(config, self.chunks, batches, policy_step.OLD)
        figures: Figures = {}
        for batches in parts:
            if self.reference is not None:
                policy_step.add_logprobs(config, self.reference, batches, policy_step.REFERENCE)
            figures = policy_step.train_step(config, self.chunks, self.optimizer, batches)
        error = figures.get("token_mult_prob_error", 1.0)
        if error > MISMATCH_ALARM:
            self.say(
                f"step {self.progress.step + 1}: the engine's probabilities differ from the trainer's by a factor of "
                f"{error:.3f} on average (token_mult_prob_error, alarm above {MISMATCH_ALARM}); see to the engine"
            )
        return {**figures, "updates": float(len(parts))}

    def _measure(self, found: Round) -> Figures:
        """Of the policy on all responses, where none of them teaches anything: the same figures as at any step."""
        told = self.idle.add(found, drop_equal=self.config.rollout.drop_equal_groups)
        if told:
            self.say(f"step {self.progress.step + 1}: {told}")
        batches = self._microbatches(
            [
                TrainedResponse(group.placed.ids, response.token_ids, response.logprobs, 0.0)
                for group in found.groups
                for response in group.responses
            ]
        )
        if self.reference is not None:
            policy_step.add_logprobs(self.config, self.reference, batches, policy_step.REFERENCE)
        figures = policy_step.measure(self.config, self.chunks, batches)
        return {**figures, "num_tokens": 0.0, "loss": 0.0, "grad_norm": 0.0, "updates": 0.0}

    def _export(self, folder: Path) -> None:
        export_hf(self.config, self.chunks, self.tokenizer, folder)

    def _save(self) -> None:
        start = time.perf_counter()
        super()._save()
        self.save_seconds = time.perf_counter() - start

    def _already_complete(self) -> None:
        self.say(f"the run in {self.run_dir} is complete")

    def _finish(self, figures: Figures, rates: list[float], seconds: float) -> None:
        if figures:
            shown = ", ".join(f"{n} {figures[n]:.4f}" for n in ("reward", "entropy", "grad_norm") if n in figures)
            self.say(f"{self.progress.step} steps, {self.progress.consumed_tokens:,} tokens, {seconds:.0f} s: {shown}")
        if self.idle.steps:
            self.say(self.idle.told())
        self._draw_plots()
