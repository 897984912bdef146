"""Text -> words, their hashes and the hashes of runs of them: what documents are compared by."""

import hashlib
import re

import numpy

# Chinese and Japanese have no blanks between words, so each character counts as one.
_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_HAS_IDEOGRAPHS = re.compile(f"[{_IDEOGRAPHS}]")
_WORD = re.compile(r"[^\W_]+")
_WORD_OR_IDEOGRAPH = re.compile(rf"[{_IDEOGRAPHS}]|(?:(?![{_IDEOGRAPHS}])[^\W_])+")

_MULTIPLIER = numpy.uint64(0x9E3779B97F4A7C15)
_KEPT_HASHES = 1 << 20


def words_of(text: str) -> list[str]:
    """The words in lower case: runs of letters and digits, or single ideographs."""
    return (_WORD_OR_IDEOGRAPH if _HAS_IDEOGRAPHS.search(text) else _WORD).findall(text.lower())


class WordHashes:
    """64 bits for a word, the same in every process."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def __call__(self, words: list[str]) -> numpy.ndarray:
        """uint64, one for each word."""
        if len(self._known) > _KEPT_HASHES:
            self._known.clear()
        known = self._known
        for word in set(words).difference(known):
            digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            known[word] = int.from_bytes(digest, "little")
        return numpy.fromiter((known[word] for word in words), numpy.uint64, len(words))


def run_hashes(hashes: numpy.ndarray, length: int) -> numpy.ndarray:
    """uint64 for each run of `length` words, from the words' own: sum h_k m^(length - 1 - k) mod 2^64.

    Empty for a text with fewer words.
    """
    count = max(len(hashes) - length + 1, 0)
    runs = numpy.zeros(count, numpy.uint64)
    for k in range(length if count else 0):
        runs = runs * _MULTIPLIER + hashes[k : k + count]
    return runs
