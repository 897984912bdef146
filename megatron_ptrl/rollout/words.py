"""Text -> the words that the gate and the lexical judge compare, in any script.

NFKC, case folded, without punctuation; the operators of a formula are words of their own. Where a script has no spaces
between words, each character is one.
"""

import re
import sys
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

_PUNCTUATION = "".join(re.escape(chr(c)) for c in range(0x10000) if unicodedata.category(chr(c))[0] == "P")
# Kana, Han, and the scripts of Thailand, Laos, Myanmar and Cambodia.
_UNSPACED = (
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\U00020000-\U0003ffff"
)
_OPERATORS = "+=<>^$%\u20ac\u00a3\u00d7\u00f7\u2212\u2260\u2264\u2265"
_WORD = re.compile(
    rf"\d+(?:[.,:]\d+)*"  # 3.5 is not 3 5
    rf"|[{_UNSPACED}]"
    rf"|(?:[^\s{_PUNCTUATION}{_OPERATORS}{_UNSPACED}]|(?<=\w)['\u2019](?=\w))+"
    rf"|[{_OPERATORS}]|[-*/](?=\s?\d)"  # a hyphen is a minus only before a number
)
_ALONE = re.compile(rf"[{_UNSPACED}]")


@lru_cache(maxsize=512)
def words(text: str) -> tuple[str, ...]:
    """The words of `text`, comparable by ==."""
    folded = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    return tuple(sys.intern(word.replace("'", "")) for word in _WORD.findall(folded))


def joined(words: Sequence[str]) -> str:
    """The words as one text to compare by characters: spaces only where the script has them."""
    return "".join(word if _ALONE.match(word) else word + " " for word in words)


def numbers(words: Sequence[str]) -> list[str]:
    """Those of the words that are numbers, without separators of thousands."""
    return [word.replace(",", "") for word in words if word[0].isdigit()]
