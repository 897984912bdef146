"""A language model as the judge, behind any OpenAI-compatible servers.

    prediction, reference  ->  the template, one user message  ->  servers (temperature 0)  ->  "Score: 1"  ->  1.0

The templates are rollout/prompts/prefix.txt, which is the judge prompt of arXiv:2509.19249 verbatim, and strict.txt,
our counterpart for the reward that compares with one segment. A reply without a clear score is no judgement: it is
asked for again, and given up after that.
"""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

from megatron_ptrl.config import JudgeConfig
from megatron_ptrl.errors import InputError
from megatron_ptrl.rollout.judge import JudgeFailed
from megatron_ptrl.thinking.generators import GenerationError, GeneratorUnusable, Request
from megatron_ptrl.thinking.servers import Servers

FOLDER = Path(__file__).parent / "prompts"
HOLES = ("{reference}", "{predicted}")

_HOLE = re.compile("|".join(map(re.escape, HOLES)))
# All that follows on the line is the score, so that "0|1", "10" and "1 of 2" are none.
_SCORE = re.compile(r"(?im)\bscore\b[*_]*[ \t]*:[*_]*[ \t]*([^\n]*)")


class ServerJudge:
    """Asks a model whether the prediction means what the reference says."""

    name = "openai"

    def __init__(self, config: JudgeConfig) -> None:
        self._config = config
        self._template = load_template(config.template or str(FOLDER / f"{config.reward}.txt"))
        self._servers = Servers(config.servers, config.server)
        self._unparsed = 0

    @property
    def description(self) -> str:
        """For the log."""
        return f"judge at {len(self._config.servers)} server(s), model {self._config.server.model or 'as they say'}"

    @property
    def counts(self) -> Counter[str]:
        """Requests that brought no score, by reason."""
        return self._servers.counts + Counter(unparsed=self._unparsed)

    async def score(self, prediction: str, reference: str) -> float:
        """0.0 or 1.0.

        Raises JudgeFailed for a prediction that got no score, InputError when there is no judge at all.
        """
        texts = dict(zip(HOLES, (reference, prediction), strict=True))
        content = _HOLE.sub(lambda hole: texts[hole[0]], self._template)
        for seed in range(self._config.parse_attempts):
            request = Request(
                id="judge",
                messages=[{"role": "user", "content": content}],
                max_tokens=self._config.max_tokens,
                temperature=0.0,
                top_p=1.0,
                stop=[],
                seed=seed,
            )
            try:
                reply = await self._servers.generate(request)
            except GenerationError as error:
                raise JudgeFailed(error.reason, error.detail) from None
            except GeneratorUnusable as error:
                raise InputError(f"judge: {error}") from None
            score = parse_score(reply.text, thinking=self._config.thinking)
            if score is not None:
                return score
            self._unparsed += 1
        cut = f"; it was cut off at judge.max_tokens {request.max_tokens}" if reply.finish_reason == "length" else ""
        raise JudgeFailed("unparsed", f"expected Score: 0 or Score: 1, the judge said {reply.text[-200:]!r}{cut}")

    async def identity(self) -> str:
        """Digest of all that a score depends on beside its two texts."""
        try:
            model = await self._servers.model_name()
        except GeneratorUnusable as error:
            raise InputError(f"judge: {error}") from None
        config = self._config
        settings = [self._template, model, config.max_tokens, config.thinking, config.server.extra_body]
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()

    async def close(self) -> None:
        """Close the connections."""
        await self._servers.close()


def parse_score(reply: str, *, thinking: bool = False) -> float | None:
    """The one score of a reply, or with `thinking` the last one after the reasoning; None for no clear score."""
    if thinking:
        reply = reply.rpartition("</think>")[2]
    scores = [said.strip().strip("*_`.").strip() for said in _SCORE.findall(reply)]
    if not scores or (len(scores) > 1 and not thinking):
        return None
    return {"0": 0.0, "1": 1.0}.get(scores[-1])


def load_template(path: str) -> str:
    """The text of a judge's prompt. Raises InputError for one without both holes."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"judge.template {path}: {error}; expected a text file") from error
    for hole in HOLES:
        if hole not in text:
            raise InputError(f"judge.template {path} has no {hole}; expected {' and '.join(HOLES)}")
    return text
