"""Text -> words, their hashes and the hashes of runs of them: what documents are compared by."""

import hashlib
import itertools
import re

import numpy

# Chinese and Japanese have no blanks between words, so each character counts as one.
_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_HAS_IDEOGRAPHS = re.compile(f"[{_IDEOGRAPHS}]")
_WORD = re.compile(r"[^\W_]+")
_WORD_OR_IDEOGRAPH = re.compile(rf"[{_IDEOGRAPHS}]|(?:(?![{_IDEOGRAPHS}])[^\W_])+")
# The same for ASCII, in half the time.
_ASCII_BLANKS = {code: " " for code in range(128) if not chr(code).isalnum()}

_MULTIPLIER = numpy.uint64(0x9E3779B97F4A7C15)
_KEPT_HASHES = 1 << 20


def words_of(text: str) -> list[str]:
    """The words in lower case: runs of letters and digits, or single ideographs."""
    text = text.lower()
    return text.translate(_ASCII_BLANKS).split() if text.isascii() else _word_in(text).findall(text)


def count_words(text: str, places: list[int]) -> list[int]:
    """How many words there are between each place and the next."""
    spans = itertools.pairwise(places)
    if text.isascii():
        text = text.translate(_ASCII_BLANKS)
        return [len(text[begin:end].split()) for begin, end in spans]
    find = _word_in(text).findall
    return [len(find(text, begin, end)) for begin, end in spans]


def _word_in(text: str) -> re.Pattern[str]:
    return _WORD_OR_IDEOGRAPH if _HAS_IDEOGRAPHS.search(text) else _WORD


class _Known(dict[str, int]):
    """Word -> 64 bits, worked out when a word is first asked for."""

    def __missing__(self, word: str) -> int:
        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self[word] = found = int.from_bytes(digest, "little")
        return found


class WordHashes:
    """64 bits for a word, the same in every process."""

    def __init__(self) -> None:
        self._known = _Known()

    def __call__(self, words: list[str]) -> numpy.ndarray:
        """uint64, one for each word."""
        if len(self._known) > _KEPT_HASHES:
            self._known.clear()
        return numpy.fromiter(map(self._known.__getitem__, words), numpy.uint64, len(words))


def run_hashes(hashes: numpy.ndarray, length: int) -> numpy.ndarray:
    """uint64 for each run of `length` along the first axis of words' own: sum h_k m^(length - 1 - k) mod 2^64.

    Empty for a text with fewer words.
    """
    count = max(len(hashes) - length + 1, 0)
    runs = numpy.zeros_like(hashes[:count])
    for k in range(length if count else 0):
        runs *= _MULTIPLIER
        runs += hashes[k : k + count]
    return runs
