"""Documents of a part -> what a language model thinks of each, from 0 to 5.

    document  ->  Servers.generate (temperature 0)  ->  the last "Score: N"  ->  OUTPUT/clean/scores/00000.jsonl

A score is written as it comes, so a run that was killed asks again only about what was in flight.
"""

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_ptrl.config import QualityConfig
from megatron_ptrl.data.input_parts import Position
from megatron_ptrl.segmenting.prompts import fill, load_template
from megatron_ptrl.thinking.generators import GenerationError, Generator, Request
from megatron_ptrl.thinking.prompts import make_cut
from megatron_ptrl.thinking.servers import Servers

_SCORE = re.compile(r"Score:\s*\**\s*([0-5](?:\.\d+)?)(?![\d.]*\d)")


@dataclass(frozen=True)
class Score:
    """What became of one document."""

    score: float | None
    """None where there is none."""
    detail: str = ""
    """Why."""


def score_of(reply: str) -> float | None:
    """The last "Score: N" with N from 0 to 5."""
    found = _SCORE.findall(reply)
    return float(found[-1]) if found and float(found[-1]) <= 5 else None


def score_part(
    documents: Iterator[tuple[Position, str]], config: QualityConfig, tokenizer: str | None, log: Path
) -> dict[Position, Score]:
    """The score of each of `documents`, (position, text), those in `log` unasked.

    Raises GeneratorUnusable when no server can be had; the log keeps what was done until then.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    known = _read(log)
    asyncio.run(_ask(documents, config, tokenizer, log, known))
    return known


async def _ask(
    documents: Iterator[tuple[Position, str]],
    config: QualityConfig,
    tokenizer: str | None,
    log: Path,
    known: dict[Position, Score],
) -> None:
    template, cut = load_template("quality", config.prompt), make_cut(config.document_tokens, tokenizer)
    servers = Servers(config.servers, config.server)
    with log.open("ab") as stream:
        if stream.tell():
            stream.write(b"\n")  # a kill may have torn the last line

        async def work() -> None:
            for position, text in documents:
                if position not in known:
                    known[position] = score = await _score(servers, config, fill(template, context=cut(text)))
                    line = {"at": position, "score": score.score, "detail": score.detail}
                    stream.write(json.dumps(line).encode() + b"\n")
                    stream.flush()

        workers = [asyncio.create_task(work()) for _ in range(config.server.in_flight * len(config.servers))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            await servers.close()


async def _score(servers: Generator, config: QualityConfig, prompt: str) -> Score:
    messages = [{"role": "user", "content": prompt}]
    request = Request(
        id="", messages=messages, max_tokens=config.max_tokens, temperature=0.0, top_p=1.0, stop=[], seed=0
    )
    try:
        reply = await servers.generate(request)
    except GenerationError as error:
        return Score(None, f"{error.reason}: {error.detail}")
    score = score_of(reply.text)
    return Score(score, "" if score is not None else f"no score from 0 to 5 in {reply.text[-100:]!r}")


def _read(log: Path) -> dict[Position, Score]:
    known: dict[Position, Score] = {}
    for line in log.read_bytes().splitlines() if log.exists() else ():
        try:
            found = json.loads(line)
            known[found["at"][0], found["at"][1]] = Score(found["score"], found["detail"])
        except (ValueError, LookupError, TypeError):
            continue  # torn by a kill: asked again
    return known
