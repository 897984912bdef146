"""Prompt files -> prompts in one endless order, each with its token ids.

    files --index of lines--> places 0, 1, 2, ... --read, render, tokenize--> PlacedPrompt, or a line of the rejects

A place decides which file and which line it is, so that a run continues where its checkpoint says, and every rank
finds the same prompts by itself.
"""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from megatron.core.datasets import helpers

from megatron_ptrl.data.chat import ChatTemplate, encode_prompt
from megatron_ptrl.data.tokenizer import Tokenizer
from megatron_ptrl.errors import InputError
from megatron_ptrl.records import Prompt

_FIRST_PLACES = 1 << 12


@dataclass(frozen=True, slots=True)
class PlacedPrompt:
    """A prompt with its place in the run."""

    place: int
    prompt: Prompt
    ids: list[int]
    """As the policy reads it."""


class PromptSource:
    """Prompts by their place in the whole run.

    files: paths, each optionally preceded by its share; without shares by their numbers of prompts
    max_tokens: a longer prompt is rejected

    The shares of the files are right at any moment. A file's prompts come in an order of their own in each pass over
    it, which follows from the seed. Cost: 8 bytes a prompt, and 10 a place.
    Raises InputError for a missing or empty file, or shares that are none.
    """

    def __init__(
        self, files: Sequence[str | float], *, seed: int, tokenizer: Tokenizer, template: ChatTemplate, max_tokens: int
    ) -> None:
        self._seed, self._tokenizer, self._template, self._max_tokens = seed, tokenizer, template, max_tokens
        self.paths, shares = _paths_and_shares(files)
        self._lines = [_line_offsets(path) for path in self.paths]
        weights = [float(len(lines)) for lines in self._lines] if shares is None else shares
        self._weights = [weight / sum(weights) for weight in weights]
        self._orders: dict[tuple[int, int], numpy.ndarray] = {}
        self._blend(_FIRST_PLACES)

    def __len__(self) -> int:
        """Prompts of all files."""
        return sum(map(len, self._lines))

    def take(self, place: int, count: int) -> tuple[list[PlacedPrompt], int, list[dict[str, Any]]]:
        """(`count` prompts from `place` on, the place behind them, what was passed over as rejects' lines).

        Raises InputError when as many prompts in a row are rejected as there are.
        """
        found: list[PlacedPrompt] = []
        rejects: list[dict[str, Any]] = []
        in_a_row = 0
        while len(found) < count:
            taken = self._read(place)
            if isinstance(taken, PlacedPrompt):
                found.append(taken)
                in_a_row = 0
            else:
                rejects.append(taken)
                in_a_row += 1
                if in_a_row >= len(self):
                    raise InputError(
                        f"{', '.join(map(str, self.paths))}: no usable prompt among {in_a_row} in a row; the last one, "
                        f"{taken['where']}: {taken['detail']}"
                    )
            place += 1
        return found, place, rejects

    def at(self, place: int) -> PlacedPrompt:
        """The prompt of a place that `take` gave before."""
        found = self._read(place)
        assert isinstance(found, PlacedPrompt)
        return found

    def _read(self, place: int) -> PlacedPrompt | dict[str, Any]:
        file, line = self._locate(place)
        path = self.paths[file]
        with path.open("rb") as stream:
            stream.seek(self._lines[file][line])
            content = stream.readline()
        where = f"{path}:{line + 1} (blank lines not counted)"
        try:
            prompt = Prompt.from_json(content, where)
            ids = encode_prompt(self._template, self._tokenizer, prompt.messages).tolist()
        except (InputError, KeyError, TypeError) as error:
            return {"place": place, "where": where, "reason": "unreadable", "detail": str(error)}
        if not 0 < len(ids) <= self._max_tokens:
            detail = f"{len(ids)} tokens; expected 1 to {self._max_tokens}, which leaves room for a response"
            return {"place": place, "where": where, "id": prompt.id, "reason": "too_long", "detail": detail}
        return PlacedPrompt(place, prompt, ids)

    def _locate(self, place: int) -> tuple[int, int]:
        """(file, line) of a place."""
        if place >= len(self._file_of):
            self._blend(max(2 * len(self._file_of), place + 1))
        file, number = int(self._file_of[place]), int(self._number_of[place])
        size = len(self._lines[file])
        epoch = number // size
        if (file, epoch) not in self._orders:
            # Neighbouring places are of the same pass, or of two.
            self._orders = {key: order for key, order in self._orders.items() if key[0] != file or key[1] == epoch - 1}
            self._orders[file, epoch] = numpy.random.default_rng([self._seed, file, epoch]).permutation(size)
        return file, int(self._orders[file, epoch][number % size])

    def _blend(self, places: int) -> None:
        # Megatron-Core's blend of datasets: a longer one begins with the shorter one.
        self._file_of, self._number_of = numpy.zeros(places, numpy.int16), numpy.zeros(places, numpy.int64)
        helpers.build_blending_indices(self._file_of, self._number_of, self._weights, len(self._weights), places, False)


def _paths_and_shares(files: Sequence[str | float]) -> tuple[list[Path], list[float] | None]:
    if not files:
        raise InputError("prompts.files is empty; expected prompt files, as `ptrl segment` writes them")
    numbers = [_as_number(item) for item in files]
    if all(number is None for number in numbers):
        return [Path(str(item)) for item in files], None
    shares = numbers[0::2]
    if len(files) % 2 or None in shares or any(number is not None for number in numbers[1::2]):
        raise InputError(f"prompts.files {list(files)} mixes forms; expected [share, file, share, file] or only files")
    known = [share for share in shares if share is not None and math.isfinite(share) and share > 0]
    if len(known) < len(shares):
        raise InputError(f"prompts.files {list(files)}: expected positive shares")
    return [Path(str(item)) for item in files[1::2]], known


def _as_number(item: str | float) -> float | None:
    try:
        return float(item)
    except ValueError:
        return None


def _line_offsets(path: Path) -> array:
    """Where each line that is not blank begins."""
    offsets, place = array("q"), 0
    try:
        with path.open("rb") as stream:
            for line in stream:
                if line.strip():
                    offsets.append(place)
                place += len(line)
    except OSError as error:
        raise InputError(f"prompts.files: {path}: {error.strerror}; expected a JSONL file of prompts") from error
    if not offsets:
        raise InputError(f"prompts.files: {path} has no prompt in it")
    return offsets
