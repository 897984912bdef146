"""`ptrl evaluate`: a checkpoint -> perplexity and entropy of text, pass@k of problems, accuracy of next segments.

    .bin/.idx  --measure_text-->  text.jsonl     --text_figures-->    results.json, results.md
    prompts    --answer_prompts-> samples.jsonl  --sample_figures-->
    tasks      --lm_eval------->  harness.json   ------------------>

Text is measured by the checkpoint's weights on these ranks, whatever draws the responses: they themselves, or servers
that are given them as `ptrl rl` gives them.

Run it alone or under torchrun, in any layout of tensor, pipeline and data parallelism; the same command goes on where
one was killed. A response follows from the seed, its prompt's line and its own number, whatever the layout.
"""

import dataclasses
import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ptrl.config import DataConfig, EvaluateConfig, ScoreConfig
from megatron_ptrl.data.chat import ChatTemplate, PlainTemplate, make_template
from megatron_ptrl.data.indexed import open_indexed, resolve_tokenizer
from megatron_ptrl.data.sidecar import Durably, hash_file
from megatron_ptrl.data.tokenizer import Tokenizer
from megatron_ptrl.errors import InputError
from megatron_ptrl.evaluation import results
from megatron_ptrl.evaluation.lines import Lines, read_lines
from megatron_ptrl.evaluation.pass_at_k import Figure
from megatron_ptrl.rollout.engine import RolloutEngine
from megatron_ptrl.rollout.rewards import check_judge, make_rewarder
from megatron_ptrl.training import answer_prompts, checkpoint, layers, mcore, measure_text
from megatron_ptrl.training.answer_prompts import REJECTS, SAMPLES
from megatron_ptrl.training.engines import check_engine, make_engine
from megatron_ptrl.training.frozen import check_padding, check_vocabulary, load_frozen_model, tokenizer_of
from megatron_ptrl.training.hf_export import export_hf
from megatron_ptrl.training.layout import check_launched, check_layout
from megatron_ptrl.training.rank_zero import from_rank_0
from megatron_ptrl.training.resume import find_source
from megatron_ptrl.training.rollouts import Judging, Responder, judges
from megatron_ptrl.training.run import plain_settings
from megatron_ptrl.training.score import WAIT_MINUTES, digest_of, model_settings

PLAN, TEXT, HARNESS = "plan.json", "text.jsonl", "harness.json"
# What a figure does not follow from.
_FREE = ("output", "micro_batch", "parallel", "bootstrap", "k", "chunk", "checkpoint", "harness")
SECONDS_BETWEEN_LINES = 10.0


def run(config: EvaluateConfig) -> None:
    """Measure `config.checkpoint`; prints progress and the table.

    Raises InputError for a checkpoint of another tokenizer, an output that is of another evaluation, a layout that
    cannot work, prompts of which none can be used, judges that do not answer.
    """
    if not config.checkpoint:
        raise InputError("checkpoint is empty; expected a run directory or one of its checkpoints")
    if not (config.data or config.prompts or config.harness.tasks):
        raise InputError("there is nothing to measure; set data, prompts or harness.tasks")
    if config.prompts:
        check_judge(config.judge)
    check_launched(int(os.environ.get("WORLD_SIZE", 1)))
    mcore.join_ranks(timeout_minutes=WAIT_MINUTES)
    try:
        Evaluation(config).run()
    except InputError as error:
        error.rank = dist.get_rank()
        raise
    finally:
        mcore.shutdown()


class Evaluation:
    """One evaluation on this rank. Making it starts Megatron's process groups and refuses what cannot work."""

    def __init__(self, config: EvaluateConfig) -> None:
        self.config = config
        self.checkpoint, notes = find_source(config.checkpoint, "checkpoint")
        self.manifest = checkpoint.read_manifest(self.checkpoint)
        self.tokenizer = _tokenizer(config, self.manifest)
        check_vocabulary(self.checkpoint, self.manifest, self.tokenizer, "checkpoint")
        names = ("checkpoint", "window", "overlap", "micro_batch", "precision", "parallel")
        score = ScoreConfig(**{name: getattr(config, name) for name in names})
        self.settings = model_settings(score, self.manifest, dist.get_world_size())
        check_layout(self.settings, dist.get_world_size())
        check_padding(self.checkpoint, self.manifest, self.settings, "checkpoint")
        layers.check_supported(self.settings)
        if config.prompts or config.harness.tasks:
            check_engine(self.settings, config.rollout)
        mcore.initialize(self.settings, timeout_minutes=WAIT_MINUTES)
        self.window = self.settings.data.seq_length
        self.overlap = self.window // 2 if config.overlap is None else config.overlap
        if self.overlap >= self.window:
            raise InputError(f"overlap is {self.overlap}; expected less than the window, {self.window}")
        self.answers = _resolved(config, self.window)
        self.output = Path(config.output) if config.output else _beside(self.checkpoint)
        digest = digest_of(self.checkpoint, self.manifest)
        # Before the output is made: it would belong to an evaluation of files that are not there.
        for path in config.prompts:
            if not Path(path).is_file():
                raise InputError(f"prompts: {path}: no such file; expected a JSONL file")
        for prefix in config.data:
            open_indexed(prefix)
        from_rank_0(lambda: self._begin(digest))
        self._model: list[torch.nn.Module] | None = None
        self._engine: RolloutEngine | None = None
        for note in notes:
            self.say(note)

    def run(self) -> None:
        """Measure what is missing, write the results, print them."""
        try:
            self._measure_text()
            self._answer()
            self._run_harness()
        finally:
            if self._engine is not None:
                self._engine.close()
        if dist.get_rank() == 0:
            self._finish()
        dist.barrier()

    def say(self, text: str) -> None:
        """A line on the terminal, from rank 0."""
        if dist.get_rank() == 0:
            print(text, flush=True)

    @property
    def model(self) -> list[torch.nn.Module]:
        """This rank's chunks, loaded when they are first wanted. Collective."""
        if self._model is None:
            self._model = load_frozen_model(self.settings, self.checkpoint, self.tokenizer.vocab_size)
        return self._model

    @property
    def engine(self) -> RolloutEngine:
        """What draws the responses, with the checkpoint's weights; made when it is first wanted. Collective."""
        if self._engine is None:
            self._engine = make_engine(
                self.settings,
                self.answers,
                self.model,
                self.tokenizer,
                probe_ids=self.tokenizer.encode(self.config.problem_template),
                folder=self.output,
                trains=False,
            )
            self._engine.sync(self.manifest["step"], partial(export_hf, self.settings, self.model, self.tokenizer))
        return self._engine

    def _begin(self, digest: str) -> None:
        """Make the folder, or see that it is this evaluation's."""
        plan = _plan(self.config, digest, self.window, self.overlap)
        path = self.output / PLAN
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            if not path.is_file():
                with Durably(str(path)) as stream:
                    stream.write(json.dumps(plan, indent=1).encode())
        except OSError as error:
            raise InputError(f"output {self.output}: {error.strerror}; name a folder that can be written") from error
        try:
            found = dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error}); remove the folder to start over") from error
        different = [name for name in plan if found.get(name) != plan[name]]
        if different:
            raise InputError(
                f"{self.output} is of an evaluation with another {', '.join(different)}; remove it, or use another "
                "output"
            )

    def _measure_text(self) -> None:
        names = [Path(prefix).name for prefix in self.config.data]
        for name, prefix in zip(names, self.config.data, strict=True):
            if names.count(name) > 1:
                raise InputError(f"data: two prefixes end in {name}, by which the figures are named; rename one")
            windows = measure_text.chunks_of(prefix, window=self.window, overlap=self.overlap, chunk=self.config.chunk)
            missing = from_rank_0(partial(self._missing_chunks, name, windows))
            if missing:
                self._measure_one(name, prefix, windows, missing)

    def _missing_chunks(self, name: str, windows: Any) -> list[int]:
        done = {}
        for line in read_lines(self.output / TEXT):
            if line["name"] == name:
                done[line["chunk"]] = line["tokens"]
        sizes = [windows.chunk(n).end_token - windows.chunk(n).first_token for n in range(len(windows))]
        if any(n >= len(sizes) or sizes[n] != tokens for n, tokens in done.items()):
            raise InputError(f"{self.output / TEXT} was measured in other chunks; remove it, or set chunk as it was")
        return [n for n in range(len(sizes)) if n not in done]

    def _measure_one(self, name: str, prefix: str, windows: Any, missing: list[int]) -> None:
        lines = Lines(self.output / TEXT) if dist.get_rank() == 0 else None
        clock = _Clock(self, f"{name}: tokens")
        total = sum(windows.chunk(n).end_token - windows.chunk(n).first_token for n in missing)
        done = 0
        for found in measure_text.measure(self.settings, self.model, self.tokenizer, prefix, windows, missing):
            if lines:
                lines.add({"name": name, **line} for line in found)
            done += sum(line["tokens"] for line in found)
            clock.tell(done, total)
        if lines:
            lines.close()

    def _answer(self) -> None:
        if not self.config.prompts:
            return
        prompts, rejects = answer_prompts.read(self.config, self.tokenizer, self._template(), self.window)
        done = set(from_rank_0(lambda: answer_prompts.keep_whole(self.output, self.answers.samples, rejects)))
        missing = [asked for asked in prompts if asked.placed.place not in done]
        if not missing:
            return
        if self.config.judge.kind == "lexical" and any(asked.placed.prompt.task != "rlvr" for asked in missing):
            self.say("judge.kind is lexical: it compares characters and understands nothing; for smoke runs")
        engine, rewarder = self.engine, self._make_rewarder() if judges() else None
        lines = Lines(self.output / SAMPLES) if dist.get_rank() == 0 else None
        responder = Responder(self.answers, self.config.seed, self.tokenizer, engine, rewarder)
        tell = _Clock(self, "prompts").tell
        try:
            answer_prompts.answer(missing, self.answers, responder, lines, tell)
        finally:
            if rewarder is not None:
                rewarder.close()
            if lines:
                lines.close()

    def _template(self) -> ChatTemplate:
        """That of the checkpoint's run, unless another is named."""
        of_its_run = self.manifest["settings"].get("data.template", PlainTemplate.name)
        return make_template(self.config.template or of_its_run, self.tokenizer)

    def _run_harness(self) -> None:
        harness = self.config.harness
        if not harness.tasks or from_rank_0(lambda: self._harness_done()):
            return
        from megatron_ptrl.evaluation.lm_eval import HarnessModel, evaluate

        batch = self.answers.batch
        model = HarnessModel(self.settings, self.model, self.engine, self.tokenizer, harness, chunk=batch)
        found = evaluate(model, harness, bootstrap=self.config.bootstrap)
        if dist.get_rank() == 0:
            whole = {"harness": dataclasses.asdict(harness), "figures": results.as_json(found)}
            with Durably(str(self.output / HARNESS)) as stream:
                stream.write(json.dumps(whole, indent=1).encode())

    def _harness_done(self) -> bool:
        path = self.output / HARNESS
        return path.is_file() and json.loads(path.read_text())["harness"] == dataclasses.asdict(self.config.harness)

    def _make_rewarder(self) -> Judging:
        return make_rewarder(self.config.judge)

    def _finish(self) -> None:
        config = self.config
        text, texts = results.text_figures(read_lines(self.output / TEXT))
        answered, prompts = results.sample_figures(
            read_lines(self.output / SAMPLES),
            config.k,
            wanted=self.answers.samples,
            resamples=config.bootstrap,
            seed=config.seed,
        )
        rejects = list(read_lines(self.output / REJECTS))
        named = text | answered | self._harness_figures()
        whole = {
            "checkpoint": str(self.checkpoint),
            "step": self.manifest["step"],
            "consumed_tokens": _consumed_tokens(self.manifest),
            "engine": config.rollout.engine,
            "judge": config.judge.kind,
            "rejected": len(rejects),
            "data": texts,
            "prompts": prompts,
            "figures": results.as_json(named),
        }
        shown = results.table(named)
        for name, content in (("results.json", json.dumps(whole, indent=1)), ("results.md", shown)):
            with Durably(str(self.output / name)) as stream:
                stream.write((content + "\n").encode())
        self.say(shown)
        if rejects:
            self.say(f"{len(rejects)} prompts were put aside, the first for: {rejects[0]['detail']} ({REJECTS})")
        needed = [k for k in config.k if k > self.answers.samples]
        if prompts and needed:
            names = ", ".join(f"pass@{k}" for k in needed)
            self.say(f"no {names}: it needs as many samples of a prompt, and rollout.samples is {self.answers.samples}")
        self.say(
            f"{self.output}: step {self.manifest['step']}, results.json, results.md"
            + (f", {SAMPLES}" if prompts else "")
        )

    def _harness_figures(self) -> results.Named:
        if not self.config.harness.tasks:
            return {}
        found = json.loads((self.output / HARNESS).read_text(encoding="utf-8"))["figures"]
        return {name: Figure(**figure) for name, figure in found.items()}


class _Clock:
    """Tells every ten seconds how far something is, and at its end."""

    def __init__(self, evaluation: Evaluation, what: str) -> None:
        self._say, self._what, self._start, self._said = evaluation.say, what, time.perf_counter(), 0.0

    def tell(self, done: int, total: int) -> None:
        seconds = time.perf_counter() - self._start
        if seconds - self._said > SECONDS_BETWEEN_LINES or done == total:
            self._said = seconds
            left = f"{(total - done) * seconds / max(done, 1):.0f} s to go"
            self._say(f"{self._what} {done:,} of {total:,}  {done / seconds:,.1f} a second  {left}")


def _plan(config: EvaluateConfig, digest: str, window: int, overlap: int) -> dict[str, Any]:
    """What two evaluations with the same figures have in common, as JSON holds it."""
    settings = {name: value for name, value in plain_settings(config).items() if name not in _FREE}
    for name in ("batch", "servers", "server", "judge_patience", "max_unjudged"):
        del settings["rollout"][name]
    for name in ("servers", "server", "cache", "deadline"):
        del settings["judge"][name]
    files = {path: hash_file(path) for path in config.prompts if Path(path).is_file()}
    files |= {prefix: hash_file(prefix + ".bin") for prefix in config.data if Path(prefix + ".bin").is_file()}
    whole = {**settings, "checkpoint": digest, "window": window, "overlap": overlap, "files": files}
    return json.loads(json.dumps(whole))


def _resolved(config: EvaluateConfig, window: int) -> Any:
    """The settings of the answers, max_tokens a number."""
    most = config.rollout.max_tokens
    if most is not None and most >= window:
        raise InputError(
            f"rollout.max_tokens is {most}; expected less than the window {window}, which a prompt shares with its "
            "response"
        )
    return dataclasses.replace(config.rollout, max_tokens=window if most is None else most)


def _beside(path: Path) -> Path:
    """evaluations/step_N in the run directory of the checkpoint `path`."""
    return path.parent.parent / "evaluations" / path.name


def _tokenizer(config: EvaluateConfig, manifest: dict[str, Any]) -> Tokenizer:
    """The one that is named, that beside the data, or that of the checkpoint's run."""
    if config.data:
        return resolve_tokenizer(DataConfig(train=list(config.data), tokenizer=config.tokenizer))
    return tokenizer_of(manifest, config.tokenizer)


def _consumed_tokens(manifest: dict[str, Any]) -> int:
    """Training tokens behind a checkpoint, in its own run."""
    return manifest.get("consumed_tokens") or manifest["consumed_samples"] * manifest["settings"]["data.seq_length"]
