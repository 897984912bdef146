"""A document -> the first of Gopher's rules that it breaks (arXiv:2112.11446, appendix A.1).

datatrove's block has the same rules and needs spaCy for words; here they are what blanks part.
"""

import re

from megatron_ptrl.config import CleanConfig

REASONS = (
    "too_few_words",
    "too_many_words",
    "short_words",
    "long_words",
    "hash_signs",
    "ellipses",
    "bullets",
    "lines_ending_in_ellipsis",
    "few_alphabetic_words",
    "few_stop_words",
)
STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
_ALPHABETIC = re.compile(r"[^\W\d_]")
_ELLIPSES = ("...", "…")
_BULLETS = ("-", "•", "*")


def broken_rule(text: str, config: CleanConfig) -> str | None:
    """One of REASONS, or None for a document that keeps them all.

    Words of 3 to 10 characters on average; at most 0.1 hash signs and 0.1 ellipses a word; at most 90 % of the lines
    with a bullet and 30 % with an ellipsis at their end; a letter in at least 80 % of the words; two of STOP_WORDS.
    """
    words = text.split()
    count = len(words)
    if count < config.min_words or not count:
        return "too_few_words"
    if count > config.max_words:
        return "too_many_words"
    mean_length = sum(map(len, words)) / count
    if mean_length < 3:
        return "short_words"
    if mean_length > 10:
        return "long_words"
    if text.count("#") > 0.1 * count:
        return "hash_signs"
    if sum(text.count(mark) for mark in _ELLIPSES) > 0.1 * count:
        return "ellipses"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if sum(line.startswith(_BULLETS) for line in lines) > 0.9 * len(lines):
        return "bullets"
    if sum(line.endswith(_ELLIPSES) for line in lines) > 0.3 * len(lines):
        return "lines_ending_in_ellipsis"
    # Most words are of letters alone, which is seen at once.
    others = [word for word in words if not word.isalpha()]
    if count - len(others) + sum(_ALPHABETIC.search(word) is not None for word in others) < 0.8 * count:
        return "few_alphabetic_words"
    found: set[str] = set()
    for word in words:
        if len(found) >= config.min_stop_words:
            return None
        if (lower := word.lower()) in STOP_WORDS:
            found.add(lower)
    return "few_stop_words" if len(found) < config.min_stop_words else None
