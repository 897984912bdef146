"""Text -> its language, as far as counting letters and small words tells: enough to see that thinking went astray.

The script decides, and among languages in Latin letters their commonest words. Text that has too few of those (code,
formulas, another language) is just "latin", and text without letters is None: no verdict.
"""

import re
from collections import Counter
from itertools import chain

LETTERS = {
    "han": "\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0002ffff",
    "kana": "\u3040-\u30ff\u31f0-\u31ff",
    "hangul": "\u1100-\u11ff\uac00-\ud7af",
    "cyrillic": "\u0400-\u052f",
    "arabic": "\u0600-\u06ff\u0750-\u077f",
    "hebrew": "\u0590-\u05ff",
    "devanagari": "\u0900-\u097f",
    "thai": "\u0e00-\u0e7f",
    "greek": "\u0370-\u03ff",
}
"""Blocks of Unicode, as in a regular expression's character class."""

# None that are names in code or English words as well: a page of Python is full of "os", "no", "as", "do" and "e".
SMALL_WORDS = {
    "en": "the of and to is that in it for this with are as be so on which we what how by from not an or but can if",
    "de": "der die das und ist nicht ein eine zu den mit von auf für sich des dem im auch es werden wir wie wird kann",
    "fr": "le la les des et est une dans que qui pour pas sur du par au avec ce il nous cette sont ou mais comme",
    "es": "el la los las de que en es una por con para del al lo como más pero esto este son también y hay ser puede",
    "it": "il la di che è un una per non con del della sono dei come questo gli più anche nel alla quindi può essere",
    "pt": "de que em um uma para com não da por na dos mais como isso são ao também mas é ou pelo pela seu sua ser",
    "nl": "de het een van en dat niet op te zijn met voor die er aan ook als bij wordt om dit maar door deze kan",
}

# An ideograph or syllable says as much as this many letters of an alphabet.
_WEIGHTS = {"han": 4, "kana": 2, "hangul": 3}
_LETTER = {script: re.compile(f"[{blocks}]") for script, blocks in LETTERS.items()}
_LATIN = re.compile("[a-zA-Z\u00c0-\u024f]")
_WORD = re.compile(r"[^\W\d_]+")
_ASCII = re.compile("[\0-\x7f]+")
# In ASCII these and a split find the same words in a third of the time.
_NO_LETTERS = str.maketrans({character: " " for character in map(chr, range(128)) if not character.isalpha()})
_LANGUAGES_OF: dict[str, list[str]] = {}
for _language, _words in SMALL_WORDS.items():
    for _word in _words.split():
        _LANGUAGES_OF.setdefault(_word, []).append(_language)

# Enough to judge by, from both ends: what goes astray does so on the way.
SAMPLE_CHARACTERS = 1500
# Prose has a third to a half of small words, code and formulas hardly any.
MIN_SHARE = 0.12
MIN_WORDS = 12
# One name that a program uses all the time is no language.
MIN_DISTINCT = 4
# The runner-up shares words (Spanish "de", Portuguese "de"), but not as many.
MIN_LEAD = 1.25


def language_of(text: str) -> str | None:
    """A key of SMALL_WORDS or LETTERS, "latin", or None for text with hardly a letter.

    Looks at the first and last 1,500 characters.
    """
    if len(text) > 2 * SAMPLE_CHARACTERS:
        text = text[:SAMPLE_CHARACTERS] + " " + text[-SAMPLE_CHARACTERS:]
    script = "latin" if text.isascii() else _script_of(text)
    if script != "latin":
        return script
    words = text.lower().translate(_NO_LETTERS).split() if text.isascii() else _WORD.findall(text.lower())
    if len(words) < MIN_WORDS:
        return "latin" if words else None
    counts = Counter(chain.from_iterable(_LANGUAGES_OF[word] for word in words if word in _LANGUAGES_OF))
    ((first, most), (_, next_most)) = (counts.most_common(2) + [("", 0), ("", 0)])[:2]
    if most < MIN_SHARE * len(words) or most < MIN_LEAD * next_most:
        return "latin"
    distinct = sum(first in _LANGUAGES_OF.get(word, ()) for word in set(words))
    return first if distinct >= MIN_DISTINCT else "latin"


def _script_of(text: str) -> str | None:
    rest = _ASCII.sub("", text)
    counts = {script: _WEIGHTS.get(script, 1) * len(letter.findall(rest)) for script, letter in _LETTER.items()}
    # A Japanese sentence has as many kanji as kana, a Chinese one no kana at all.
    if counts["kana"] > 0.1 * counts["han"]:
        counts["kana"] += counts.pop("han")
    counts["latin"] = len(_LATIN.findall(text))
    script, most = max(counts.items(), key=lambda item: item[1])
    return script if most else None


def is_allowed(language: str | None, allowed: list[str], document: str) -> bool:
    """Whether `language` is one of `allowed`, in which "document" stands for the language of that text.

    Without a verdict it is: "latin" may be any language of that script.
    """
    if not allowed or language is None:
        return True
    known = {name for name in allowed if name != "document"}
    if "document" in allowed:
        own = language_of(document)
        if own is None:
            return True
        known.add(own)
    latin = {"latin", *SMALL_WORDS}
    if language == "latin":
        return bool(known & latin)
    return language in known or ("latin" in known and language in latin)
