"""A document -> the places where its segments begin.

A cut is a list of places: 0, where the second segment begins, ..., the length of the text. Every character is in one
segment, white space in the one it follows, so the segments make up the document again. No segment is blank.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from megatron_ptrl.config import SplitConfig
from megatron_ptrl.errors import InputError

Cut = Callable[[str], list[int]]
"""text -> places; [0] for a blank or empty text, which has no segment."""

PARAGRAPH_END = re.compile(r"\n[^\S\n]*\n\s*")
# Other scripts' ends of sentences, which Punkt, made for periods before blanks, cannot see.
_OTHER_END = re.compile(r"[。！？｡।॥؟۔]+[」』”’）】》]*\s*")


def make_cut(split: SplitConfig, punkt: Path) -> Cut:
    """The function that `split` describes; `punkt` is the file of its parameters, where it needs them.

    Raises InputError for sentencex when that is not installed.
    """
    if split.unit == "paragraph":
        return lambda text: _tidied(text, (match.end() for match in PARAGRAPH_END.finditer(text)))
    if split.unit == "steps" and split.step_of == "words":
        return lambda text: _every([match.start() for match in re.finditer(r"\S+", text)], split.step, text)
    sentences = _sentencex(split.language) if split.sentences == "sentencex" else _punkt(punkt)
    if split.unit == "sentence":
        return sentences
    return lambda text: _every(sentences(text)[:-1], split.step, text)


def _every(starts: list[int], step: int, text: str) -> list[int]:
    return _tidied(text, starts[step::step])


def _punkt(parameters: Path) -> Cut:
    from megatron_ptrl.segmenting.punkt import Tokenizer, read_parameters

    tokenizer = Tokenizer(read_parameters(parameters))

    def cut(text: str) -> list[int]:
        # The first sentence begins behind the white space that is to be its own.
        starts = [start for start, _ in tokenizer.span_tokenize(text)][1:]
        starts += [match.end() for match in PARAGRAPH_END.finditer(text)]
        if not text.isascii():
            starts += [match.end() for match in _OTHER_END.finditer(text)]
        return _tidied(text, starts)

    return cut


def _sentencex(language: str) -> Cut:
    try:
        import sentencex
    except ImportError as error:
        raise InputError("split.sentences sentencex needs it; pip install megatron-ptrl[sentencex]") from error

    def cut(text: str) -> list[int]:
        starts, place = [], 0
        for sentence in sentencex.segment(language, text):
            # In texts of more than some 10,000 characters it leaves out a line end here and there.
            place = text.index(sentence, place)
            starts.append(place)
            place += len(sentence)
        return _tidied(text, [*starts, *(match.end() for match in PARAGRAPH_END.finditer(text))])

    return cut


def _tidied(text: str, starts: Iterable[int]) -> list[int]:
    """The cut at `starts`, whatever their order: a blank segment goes to the one before it, or is the next one's."""
    places = [0]
    for start in sorted({*starts, len(text)}):
        if start <= places[-1]:
            continue
        if not text[places[-1] : start].isspace():
            places.append(start)
        elif len(places) > 1:
            places[-1] = start
    return places
