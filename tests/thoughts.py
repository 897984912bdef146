"""Thinking as `ptrl think` writes it, without a generator."""

import json
import random
from pathlib import Path
from typing import Any

from megatron_ptrl.records import Thought

WORDS = (
    "the of and to is that in it for this with on as are by we can so if or not but then number value sum result list "
    "function argument case step first next because consider means follows shows compare small large even odd"
).split()


def prose(seed: int, words: int) -> str:
    """English-like sentences that repeat no more than English does."""
    chosen = random.Random(seed)
    sentence = [chosen.choice(WORDS) + (f" {chosen.randrange(10**6)}" if i % 7 == 6 else "") for i in range(words)]
    return " ".join(sentence).capitalize() + "."


def thought(seed: int, **changed: Any) -> Thought:
    """A document of 20 to 99 words with thinking of 60 to 179."""
    values: dict[str, Any] = {
        "id": f"part-0/{seed}",
        "text": prose(seed, 20 + seed % 80),
        "metadata": {"domain": ("mathematics", "law", "biology")[seed % 3]},
        "thinking": prose(10_000 + seed, 60 + 7 * seed % 120),
        "model": "a-model",
        "prompt": "default",
        "finish_reason": "stop",
        "prompt_tokens": 100,
        "thinking_tokens": 150,
        "seed": seed,
    }
    return Thought(**(values | changed))


def write_thoughts(path: Path, thoughts: list[Thought | str]) -> Path:
    """A line each; a string is written as it is."""
    lines = [item if isinstance(item, str) else item.to_line().decode() for item in thoughts]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def rejected(path: str) -> list[tuple[str | None, str]]:
    """(id, reason) of every line of a rejects file."""
    records = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [(record["id"], record["reason"]) for record in records]
