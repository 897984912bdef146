"""Prompts -> responses with their rewards, from all data-parallel ranks, alike on every rank.

    PromptSource.take --each rank its own prompts--> engine.generate --as they end--> Rewarder --> gathered Groups

Judging goes on while the engine generates. A response follows from the run's seed, its prompt's place and its own
number, so that neither the ranks nor a resumed run change it.
"""

import concurrent.futures
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ptrl.config import RLConfig
from megatron_ptrl.data.prompts import PlacedPrompt, PromptSource
from megatron_ptrl.data.tokenizer import Tokenizer
from megatron_ptrl.errors import InputError
from megatron_ptrl.losses.policy import group_advantages
from megatron_ptrl.records import Judgement, Prompt
from megatron_ptrl.rollout.engine import Generation, Request, RolloutEngine, rollout_seed

LATE = "late"
"""Reason of a response whose judgement did not come within rollout.judge_patience."""


class Judging(Protocol):
    """What is asked of a `rollout.rewards.Rewarder`."""

    def submit(self, prompt: Prompt, response: str, *, truncated: bool) -> concurrent.futures.Future[Judgement]: ...

    def close(self) -> None: ...


class Sampling(Protocol):
    """How prompts are answered, as `RolloutConfig` says it."""

    @property
    def samples(self) -> int: ...

    @property
    def max_tokens(self) -> int: ...

    @property
    def temperature(self) -> float: ...

    @property
    def top_p(self) -> float: ...

    @property
    def judge_patience(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Response:
    """A response with its reward. Arrays, because all ranks exchange them."""

    token_ids: numpy.ndarray
    """int32"""
    logprobs: numpy.ndarray
    """fp32, by the engine"""
    finish_reason: str
    judgement: Judgement

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt with all its responses."""

    placed: PlacedPrompt
    responses: list[Response]
    weight_version: int

    @property
    def valid(self) -> list[bool]:
        """Which ones were judged."""
        return [response.judgement.reward is not None for response in self.responses]

    @property
    def equal(self) -> bool:
        """Whether the judged rewards are all the same, so that there is nothing to learn."""
        return len({response.judgement.reward for response in self.responses} - {None}) < 2

    def advantages(self, *, normalize_std: bool) -> Tensor:
        """(samples,) fp32"""
        rewards = [response.judgement.reward or 0.0 for response in self.responses]
        valid = torch.tensor([self.valid])
        return group_advantages(torch.tensor([rewards]), valid=valid, normalize_std=normalize_std)[0]


@dataclass(slots=True)
class Round:
    """The responses of a step."""

    groups: list[Group] = field(default_factory=list)
    """In the order of their places."""
    next_place: int = 0
    rejects: list[dict[str, Any]] = field(default_factory=list)
    passes: int = 0
    """1, and one more for each time that prompts took the place of groups that were left out."""
    generate_seconds: float = 0.0
    judge_seconds: float = 0.0
    """Of waiting for judgements after the last response."""

    def trained(self, *, drop_equal: bool) -> list[Group]:
        """The groups that the loss is computed on."""
        return [group for group in self.groups if not (drop_equal and group.equal)]


class Responder:
    """Answers prompts, and has the answers judged. Every method is to be called by all ranks.

    rewarder: on the ranks that judge, see `judges`; None elsewhere
    """

    def __init__(
        self, settings: Sampling, seed: int, tokenizer: Tokenizer, engine: RolloutEngine, rewarder: Judging | None
    ) -> None:
        self._settings, self._seed, self._tokenizer = settings, seed, tokenizer
        self._engine, self._rewarder = engine, rewarder

    def answer(self, prompts: list[PlacedPrompt], times: Round) -> list[Group]:
        """A group for each prompt: this rank's own ones are answered here, the others by their ranks."""
        rank = parallel_state.get_data_parallel_rank()
        mine = prompts[rank :: parallel_state.get_data_parallel_world_size()]
        responses = self._respond(mine, times)
        samples = self._settings.samples
        by_place = {p.place: responses[i * samples : (i + 1) * samples] for i, p in enumerate(mine)}
        everywhere: list[Any] = [None] * parallel_state.get_data_parallel_world_size()
        dist.all_gather_object(everywhere, by_place, group=parallel_state.get_data_parallel_group())
        together = {place: answers for part in everywhere for place, answers in part.items()}
        return [Group(placed, together[placed.place], self._engine.weight_version) for placed in prompts]

    def _respond(self, prompts: list[PlacedPrompt], times: Round) -> list[Response]:
        """The responses to this rank's prompts with their judgements, group after group."""
        settings, seed = self._settings, self._seed
        requests = [
            Request(placed.ids, settings.max_tokens, rollout_seed(seed, placed.place, index))
            for placed in prompts
            for index in range(settings.samples)
        ]
        futures: dict[int, concurrent.futures.Future[Judgement]] = {}
        rewarder = self._rewarder
        refused: list[concurrent.futures.Future[Judgement]] = []

        def notice(future: concurrent.futures.Future[Judgement]) -> None:
            if not future.cancelled() and future.exception() is not None:
                refused.append(future)

        def judge(number: int, generation: Generation) -> None:
            assert rewarder is not None
            for future in refused[:1]:  # nothing will be judged any more: no more has to be written
                future.result()
            prompt = prompts[number // settings.samples].prompt
            text = self.text(generation.token_ids)
            futures[number] = rewarder.submit(prompt, text, truncated=generation.finish_reason == "length")
            futures[number].add_done_callback(notice)

        start = time.perf_counter()
        generations: list[Generation] = []
        if requests:  # there may be fewer prompts than ranks
            generations = self._engine.generate(
                requests,
                temperature=settings.temperature,
                top_p=settings.top_p,
                on_done=judge if rewarder is not None else None,
            )
        generated = time.perf_counter()
        for number, generation in enumerate(generations):
            _check_generation(generation, self._engine.name, prompts[number // settings.samples], number)
        judgements = self._judgements(futures, len(requests))
        times.generate_seconds += generated - start
        times.judge_seconds += time.perf_counter() - generated
        return [
            Response(
                numpy.array(generation.token_ids, numpy.int32),
                numpy.array(generation.logprobs, numpy.float32),
                generation.finish_reason,
                judgement,
            )
            for generation, judgement in zip(generations, judgements, strict=True)
        ]

    def text(self, token_ids: Sequence[int] | numpy.ndarray) -> str:
        """A response decoded, without the end-of-document token that ends it."""
        ids = [int(token) for token in token_ids]
        return self._tokenizer.decode(ids[:-1] if ids and ids[-1] == self._tokenizer.eod else ids)

    def _judgements(self, futures: dict[int, concurrent.futures.Future[Judgement]], count: int) -> list[Judgement]:
        """By number; from the rank that judges to the others of its model-parallel group, with its error if any."""
        answer: list[Any] = [None]
        if self._rewarder is not None:
            try:
                answer = [self._wait([futures[number] for number in range(count)])]
            except InputError as error:
                answer = [str(error)]
        if dist.get_world_size(parallel_state.get_model_parallel_group()) > 1:
            source = parallel_state.get_model_parallel_src_rank()
            dist.broadcast_object_list(answer, src=source, group=parallel_state.get_model_parallel_group())
        if isinstance(answer[0], str):
            raise InputError(answer[0])
        return answer[0]

    def _wait(self, futures: list[concurrent.futures.Future[Judgement]]) -> list[Judgement]:
        patience = self._settings.judge_patience
        concurrent.futures.wait(futures, timeout=patience)
        late = Judgement(reward=None, reason=LATE, prediction="", seconds=patience)
        found = [future.result() if future.done() else late for future in futures]
        for future in futures:
            future.cancel()
        for judgement in found:
            if judgement.reward is not None and not math.isfinite(judgement.reward):
                raise InputError(f"a judgement ({judgement.reason}) has reward {judgement.reward}; expected a number")
        return found


class Collector(Responder):
    """Gathers the responses of a step. Every method is to be called by all ranks."""

    def __init__(
        self,
        config: RLConfig,
        tokenizer: Tokenizer,
        prompts: PromptSource,
        engine: RolloutEngine,
        rewarder: Judging | None,
    ) -> None:
        super().__init__(config.rollout, config.train.seed, tokenizer, engine, rewarder)
        self._rollout, self._prompts = config.rollout, prompts

    def collect(self, place: int) -> Round:
        """The responses to the prompts from `place` on, with resampling.

        Raises InputError when too many could not be judged, or a response is none.
        """
        settings, found = self._rollout, Round(next_place=place)
        while found.passes <= settings.resample:
            wanted = settings.prompts - len(found.trained(drop_equal=settings.drop_equal_groups))
            if found.passes and wanted <= 0:
                break
            prompts, found.next_place, rejects = self._prompts.take(found.next_place, wanted)
            found.groups += self.answer(prompts, found)
            found.rejects += rejects
            found.passes += 1
            if not settings.drop_equal_groups:
                break
        check_judged(found.groups, settings.max_unjudged)
        return found


def judges() -> bool:
    """Whether this rank judges for its model-parallel group."""
    return dist.get_rank() == parallel_state.get_model_parallel_src_rank()


def _check_generation(generation: Generation, engine: str, placed: PlacedPrompt, number: int) -> None:
    where = f"prompt {placed.prompt.id}, response {number} of this rank, by the {engine} engine"
    if not generation.token_ids or len(generation.token_ids) != len(generation.logprobs):
        raise InputError(
            f"{where}: {len(generation.token_ids)} tokens and {len(generation.logprobs)} log-probabilities; expected "
            "at least one token, and as many log-probabilities"
        )
    for place, logprob in enumerate(generation.logprobs):
        if not math.isfinite(logprob):
            raise InputError(
                f"{where}: the log-probability of token {place} is {logprob}; expected a finite number. "
                "Have the weights diverged?"
            )


def check_judged(groups: list[Group], most: float) -> None:
    """InputError where a larger share than `most` could not be judged."""
    reasons = [r.judgement.reason for group in groups for r in group.responses if r.judgement.reward is None]
    count = sum(len(group.responses) for group in groups)
    if len(reasons) > most * count:
        told = ", ".join(f"{reason} {reasons.count(reason)}" for reason in sorted(set(reasons)))
        raise InputError(
            f"{len(reasons)} of {count} responses could not be judged ({told}), more than rollout.max_unjudged "
            f"{most:g}; see to the judge and start the same command again"
        )
