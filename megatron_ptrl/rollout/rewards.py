"""Responses -> rewards, on a thread of its own, so that judging goes on while the policy generates.

    submit(prompt, response)  --asr, msr-->  gate         ->  judge     ->  Future[Judgement]
                              --rlvr------>  find_answer  ->  verifier  ->

What cannot be judged has the reward None, not 0: an outage must not teach the policy anything.
"""

import asyncio
import importlib.util
import logging
import threading
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

from megatron_ptrl.config import JudgeConfig
from megatron_ptrl.errors import InputError
from megatron_ptrl.records import Judgement, Prompt
from megatron_ptrl.rollout.gate import Gated, gate
from megatron_ptrl.rollout.judge import Judge, JudgeFailed
from megatron_ptrl.rollout.verify import Verifier, find_answer

logger = logging.getLogger(__name__)


class Rewarder:
    """Judges responses in the background. Methods may be called from any thread."""

    def __init__(self, judge: Judge, config: JudgeConfig, *, at_once: int) -> None:
        """at_once: judgements that are under way together; the others wait, without their deadline running"""
        self.judge = judge
        self.verifier = Verifier(config.verify)
        self._config = config
        self._unusable: InputError | None = None
        self._counts: Counter[str] = Counter()
        self._seconds = 0.0
        self._slowest = 0.0
        self._lock = threading.Lock()
        self._turn = asyncio.Semaphore(at_once)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rewarder", daemon=True)
        self._thread.start()

    def submit(self, prompt: Prompt, response: str, *, truncated: bool) -> Future[Judgement]:
        """The judgement of `response`, later.

        truncated: the response was cut off, rather than ended by the policy
        The future raises InputError when nothing can be judged any more, as when no server has answered for long.
        """
        return asyncio.run_coroutine_threadsafe(self._reward(prompt, response, truncated), self._loop)

    def counts(self) -> dict[str, float]:
        """Sums since the start: judgements by reason, seconds and slowest of those that the judge gave.

        "judged", "gate/RULE", "failed/REASON", "judge_seconds", "judge_slowest", and what the judge itself counts, as
        "judge/cached" or "verify/math"
        """
        with self._lock:
            own: dict[str, float] = {**self._counts, "judge_seconds": self._seconds, "judge_slowest": self._slowest}
        for judge, name in ((self.judge, "judge"), (self.verifier, "verify")):
            own |= {f"{name}/{reason}": count for reason, count in getattr(judge, "counts", {}).items()}
        return own

    def failed_share(self) -> float:
        """Judgements that have no reward, of those that passed the gate; 0 before the first."""
        with self._lock:
            failed = sum(value for name, value in self._counts.items() if name.startswith("failed/"))
            return failed / max(1, failed + self._counts["judged"])

    def close(self) -> None:
        """Give up what is under way, and end the thread."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(timeout=30)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.judge.close()
        await self.verifier.close()

    async def _reward(self, prompt: Prompt, response: str, truncated: bool) -> Judgement:
        judge, reference, gated = self._gate(prompt, response, truncated)
        if gated.failed:
            wrong = Judgement(reward=0.0, reason=gated.failed, prediction=gated.prediction, seconds=0.0)
            return self._count("gate/" + gated.failed, wrong)
        async with self._turn:
            started = time.perf_counter()
            reward, reason = await self._judge(judge, gated.prediction, reference)
            seconds = time.perf_counter() - started
        judgement = Judgement(reward=reward, reason=reason, prediction=gated.prediction, seconds=seconds)
        return self._count("judged" if reward is not None else "failed/" + reason, judgement)

    def _gate(self, prompt: Prompt, response: str, truncated: bool) -> tuple[Judge, str, Gated]:
        """Who judges the response, by what, and whether it comes to that."""
        config = self._config
        if prompt.task != "rlvr":
            reference = prompt.reference if config.reward == "prefix" else prompt.target
            gated = gate(prompt, response, truncated=truncated, reference=reference, config=config.gate)
            return self.judge, reference, gated
        answer = find_answer(response, config.verify)
        if answer is None:
            return self.verifier, prompt.target, Gated("", "truncated" if truncated else "no_answer")
        failed = "answer_too_long" if len(answer) > config.verify.max_characters else None
        return self.verifier, prompt.target, Gated(answer, failed)

    async def _judge(self, judge: Judge, prediction: str, reference: str) -> tuple[float | None, str]:
        if self._unusable:
            raise InputError(str(self._unusable))
        try:
            return await asyncio.wait_for(judge.score(prediction, reference), self._config.deadline), "judged"
        except JudgeFailed as failed:
            self._say_once(failed.reason, str(failed))
            return None, failed.reason
        except (asyncio.TimeoutError, TimeoutError):
            self._say_once("deadline", f"none within judge.deadline {self._config.deadline:g} s")
            return None, "deadline"
        except InputError as error:
            self._unusable = error
            raise

    def _say_once(self, reason: str, detail: str) -> None:
        if not self._counts["failed/" + reason]:
            logger.warning("no judgement (%s; further ones are only counted): %s", reason, detail)

    def _count(self, name: str, judgement: Judgement) -> Judgement:
        with self._lock:
            self._counts[name] += 1
            self._seconds += judgement.seconds
            self._slowest = max(self._slowest, judgement.seconds)
        return judgement


def check_judge(config: JudgeConfig) -> None:
    """InputError where the package that `judge.kind` needs is missing."""
    package = {"lexical": "rapidfuzz", "openai": "aiohttp"}[config.kind]
    if importlib.util.find_spec(package) is None:
        raise InputError(f"judge.kind {config.kind} needs {package}; pip install megatron-ptrl[rl]")


def make_rewarder(config: JudgeConfig) -> Rewarder:
    """The rewarder that the settings name, its thread running. Raises InputError for what cannot work."""
    check_judge(config)
    if config.kind == "openai":
        from megatron_ptrl.rollout.judge_server import ServerJudge

        server_judge = ServerJudge(config)
        judge: Judge = server_judge
        if config.cache is not None:
            from megatron_ptrl.rollout.judge_cache import CachedJudge

            judge = CachedJudge(server_judge, Path(config.cache))
        return Rewarder(judge, config, at_once=config.server.in_flight * len(config.servers))
    from megatron_ptrl.rollout.lexical import LexicalJudge

    return Rewarder(LexicalJudge(config), config, at_once=64)
