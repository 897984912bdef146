r"""Answers that can be checked: RLVR's reward.

    response  ->  find_answer (\boxed{}, the prediction tags, the last number)  ->  Verifier.score(answer, target)

The rules, the first that settles it: both plain numbers, equal or not; the same text; math-verify, which knows that
\frac{1}{2} is 0.5 and (x+1)^2 is x^2+2x+1. The last runs in processes of its own: an answer such as 9^9^9^9 never ends,
and neither a thread nor a signal can stop it there. What does not end in time has no reward.
"""

import asyncio
import importlib.util
import json
import re
import sys
import unicodedata
from collections import Counter
from fractions import Fraction
from pathlib import Path

from megatron_ptrl.config import VerifyConfig
from megatron_ptrl.errors import InputError
from megatron_ptrl.rollout.gate import CLOSE_TAG, OPEN_TAG
from megatron_ptrl.rollout.judge import JudgeFailed

WORKER = Path(__file__).with_name("math_worker.py")
SECONDS_TO_START = 60.0

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")


def find_answer(response: str, config: VerifyConfig) -> str | None:
    """The answer that a response gives, by the first of `config.answer` that finds one; None for none."""
    finders = {"boxed": _boxed, "tags": _tagged, "last_number": _last_number}
    return next((answer for name in config.answer if (answer := finders[name](response))), None)


def same_number(answer: str, target: str) -> bool | None:
    """Rule 1: whether two plain numbers are equal, exactly; None where one is none."""
    values = [_NUMBER.fullmatch(_plain(text)) for text in (answer, target)]
    if not (values[0] and values[1]):
        return None
    return len({Fraction(value[0].replace(",", "")) for value in values if value}) == 1


def same_text(answer: str, target: str) -> bool:
    """Rule 2: equal but for spaces, dollar signs, the final full stop, and the case of whole words."""
    return _plain(answer) == _plain(target)


class Verifier:
    """Compares answers with targets. It is used on one event loop."""

    name = "verify"

    def __init__(self, config: VerifyConfig) -> None:
        self._config = config
        self._running: set[asyncio.subprocess.Process] = set()
        self._idle: list[asyncio.subprocess.Process] = []
        self._free = asyncio.Semaphore(config.workers)
        self.counts: Counter[str] = Counter()
        """Comparisons by the rule that settled them: same_number, same_text, math."""

    async def score(self, prediction: str, reference: str) -> float:
        """1.0 for the answer `prediction` that equals `reference`, else 0.0.

        Raises JudgeFailed("verify_timeout") for a comparison that does not end.
        """
        equal = same_number(prediction, reference)
        if equal is not None:
            settled = "same_number"
        elif (equal := same_text(prediction, reference)) or not self._config.math:
            settled = "same_text"
        else:
            async with self._free:
                equal = await self._ask(prediction, reference)
            settled = "math"
        self.counts[settled] += 1
        return float(equal)

    async def close(self) -> None:
        """End the processes."""
        for worker in self._running:
            worker.kill()
        for worker in self._running:
            await worker.wait()
        self._running.clear()

    async def _ask(self, answer: str, target: str) -> bool:
        worker = self._idle.pop() if self._idle else await self._start()
        assert worker.stdin and worker.stdout
        reply = b""
        try:
            worker.stdin.write(json.dumps([answer, target]).encode() + b"\n")
            reply = await worker.stdout.readline()  # nothing where its timer has ended it
        except ConnectionError:
            pass
        finally:
            if reply:
                self._idle.append(worker)
            else:
                await self._drop(worker)
        if not reply:
            raise JudgeFailed(
                "verify_timeout", f"{answer[:80]!r} against {target[:80]!r}: {self._config.timeout:g} s of CPU time"
            )
        return bool(json.loads(reply))

    async def _start(self) -> asyncio.subprocess.Process:
        if importlib.util.find_spec("math_verify") is None:
            raise InputError("judge.verify.math needs math-verify; pip install megatron-ptrl[rl], or set it to false")
        command = [sys.executable, str(WORKER), str(self._config.timeout), str(self._config.memory_gb)]
        pipe, null = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
        worker = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=null)
        self._running.add(worker)
        assert worker.stdout
        try:
            ready = await asyncio.wait_for(worker.stdout.readline(), SECONDS_TO_START)
        except (TimeoutError, asyncio.TimeoutError):
            ready = b""
        if ready != b"ready\n":
            await self._drop(worker)
            raise InputError(
                f"judge.verify: a process of {WORKER.name} did not start; run {' '.join(command)} to see why"
            )
        return worker

    async def _drop(self, worker: asyncio.subprocess.Process) -> None:
        self._running.discard(worker)
        try:
            await asyncio.wait_for(worker.wait(), 0.5)  # its timer has ended it
        except (TimeoutError, asyncio.TimeoutError):
            worker.kill()
            await worker.wait()


def _boxed(response: str) -> str | None:
    r"""What is in the last \boxed{}, braces matched."""
    start = response.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for end in range(start, len(response)):
        depth += {"{": 1, "}": -1}.get(response[end], 0)
        if not depth:
            return response[start:end].strip() or None
    return None


def _tagged(response: str) -> str | None:
    if response.count(OPEN_TAG) != 1 or response.count(CLOSE_TAG) != 1:
        return None
    return response.partition(OPEN_TAG)[2].partition(CLOSE_TAG)[0].strip() or None


def _last_number(response: str) -> str | None:
    found = _NUMBER.findall(response)
    return found[-1] if found else None


def _plain(text: str) -> str:
    text = "".join(unicodedata.normalize("NFKC", text).replace("$", "").split()).rstrip(".")
    # One letter may be a variable, and case tells two of them apart.
    return text.casefold() if len(text) > 1 and text.isalpha() else text
