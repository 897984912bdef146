"""Which parameters NLTK's Punkt works with: given, installed, or learned from a sample of the corpus.

    split.punkt  >  punkt_tab where it is installed  >  abbreviations.txt + PunktTrainer on a sample fit for it
                                                                            |
                                                    OUTPUT/punkt.json  <----+   every process reads this

NLTK's own files for parameters may only lie in its data folder, so ours are one JSON file.
"""

import functools
import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any

from nltk import redos
from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer, PunktTokenizer, PunktTrainer

from megatron_ptrl.config import SplitConfig
from megatron_ptrl.data.input_parts import InputFile, Unreadable, read_part
from megatron_ptrl.errors import InputError

ABBREVIATIONS = Path(__file__).parent / "abbreviations.txt"
# The folders of punkt_tab.
_LANGUAGES = {
    "cs": "czech",
    "da": "danish",
    "de": "german",
    "el": "greek",
    "en": "english",
    "es": "spanish",
    "et": "estonian",
    "fi": "finnish",
    "fr": "french",
    "it": "italian",
    "ml": "malayalam",
    "nl": "dutch",
    "no": "norwegian",
    "pl": "polish",
    "pt": "portuguese",
    "ru": "russian",
    "sl": "slovene",
    "sv": "swedish",
    "tr": "turkish",
}
# Of a file no more is read than this many times its share of the sample.
_WINDOW = 8
_SMALLEST_SHARE = 1 << 16

# What NLTK's tokens make of a text up to a possible end of a sentence, and what follows it, where that is simple:
# the last token is a mark of its own, or a word of no number and no hyphen with its period. NLTK's expressions take
# other characters for white space than Python's do.
_IN_WORD = r"[\w`/=<>$%+|~^\\]"
_PLAIN_END = re.compile(
    rf"""(?:\S*[()\[\]{{}}":;@*])? `*
    (?: (?P<word>[^\W\d] \.?{_IN_WORD}+ (?:\.{_IN_WORD}+)*) \. | (?<=[)\]}}":;*`]) (?P<bare>\.) | \S*[?!] )
    (?: [ \n]+\S | [)\]}}"'\u2019\u201d] $ )""",
    re.VERBOSE,
)
# What NLTK's expressions take for white space; Python's add U+001C to U+001F.
_BLANKS = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_KEPT_DECISIONS = 1 << 16

# Below it, a name that ends some sentences passes for an abbreviation.
_SMALLEST_SAMPLE = 100_000
# Share of all periods: in prose, no word but those of the list has as much.
_FREQUENT = 0.01

# NLTK gives up on an expression after five seconds by the clock; no clock may decide what comes out.
redos.DEFAULT_TIMEOUT = None


def find_parameters(split: SplitConfig, files: Sequence[InputFile], text_field: str, seed: int) -> dict[str, Any]:
    """{"source": where they are from, "sample": SHA-256 or null, "parameters": {...}}, for punkt.json.

    Raises InputError for a file that holds none.
    """
    if split.punkt:
        return {"source": split.punkt, "sample": None, "parameters": _to_json(read_parameters(Path(split.punkt)))}
    try:
        name = _LANGUAGES.get(split.language, split.language)
        return {"source": f"punkt_tab {name}", "sample": None, "parameters": _to_json(PunktTokenizer(name)._params)}
    except LookupError:
        pass
    sample = draw_sample(files, text_field, seed, int(split.punkt_megabytes * 1e6))
    digest = hashlib.sha256("\0".join(sample).encode("utf-8", "surrogatepass")).hexdigest()
    listed = frozenset(ABBREVIATIONS.read_text().split()) if split.language == "en" else frozenset[str]()
    size = sum(map(len, sample))
    if size < _SMALLEST_SAMPLE:
        parameters, why = PunktParameters(), f"{size:,} characters are too few to learn from"
    else:
        parameters, why = learn(sample, listed)
    if why:
        parameters = PunktParameters()
        source = f"the list of {len(listed)} abbreviations alone: {why}; split.punkt takes other parameters"
    else:
        source = f"learned from {size:,} characters of the corpus"
    parameters.abbrev_types.update(listed)
    return {"source": source, "sample": digest, "parameters": _to_json(parameters)}


def learn(sample: Sequence[str], listed: Set[str]) -> tuple[PunktParameters, str]:
    """Parameters from texts, and why they are of no use, or "".

    Punkt takes a word that nearly always has a period for an abbreviation, and so the last words of texts that are
    made by one pattern. None but `listed` ones are as frequent in other texts as such words are, or are never
    followed by a word in lower case or a number.
    """
    trainer = PunktTrainer()
    for text in sample:
        trainer.train(text, finalize=False)
    trainer.finalize_training()
    parameters = trainer.get_params()
    ends = [
        word
        for word in sorted(parameters.abbrev_types - listed)
        if len(word) > 1
        and trainer._type_fdist[word + "."] > _FREQUENT * trainer._num_period_toks
        and _ends_sentences(word, sample)
    ]
    return parameters, f"{', '.join(map(repr, ends))} end too many of its sentences to learn from it" if ends else ""


def _ends_sentences(word: str, sample: Sequence[str]) -> bool:
    """Whether next to nothing but an upper-case letter or the end of a text follows the word's period."""
    next_letter = re.compile(rf"(?<!\w){re.escape(word)}\.[ \n]+(\w)", re.IGNORECASE)
    followers = [match[1] for text in sample for match in next_letter.finditer(text)]
    return sum(not follower.isupper() for follower in followers) <= _FREQUENT * len(followers)


def draw_sample(files: Sequence[InputFile], text_field: str, seed: int, characters: int) -> list[str]:
    """About `characters` of text: an equal share of each file, in the order and with the documents the seed draws.

    The documents are from the first megabytes of a file, so that no corpus is read to its end for this.
    """
    draw, sample, wanted = random.Random(seed), [], characters
    share = max(characters // max(len(files), 1), _SMALLEST_SHARE)
    for file in draw.sample(list(files), len(files)):
        window, size = [], 0
        for _, record in read_part((file,), text_field):
            if not isinstance(record, Unreadable):
                window.append(record.text[:share])
                size += len(window[-1])
            if size >= _WINDOW * share:
                break
        draw.shuffle(window)
        left = min(share, wanted)
        for text in window:
            if left > 0:
                sample.append(text[:left])
                left -= len(sample[-1])
                wanted -= len(sample[-1])
        if wanted <= 0:
            break
    return sample


def read_parameters(path: Path) -> PunktParameters:
    """The parameters of a punkt.json. Raises InputError for what is none."""
    parameters = PunktParameters()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["parameters"]
        parameters.abbrev_types = set(found["abbreviations"])
        parameters.collocations = {(first, second) for first, second in found["collocations"]}
        parameters.sent_starters = set(found["sentence_starters"])
        parameters.ortho_context.update({word: int(context) for word, context in found["contexts"].items()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"split.punkt {path}: {error!r}; expected a punkt.json of `ptrl segment`") from error
    return parameters


class Tokenizer(PunktSentenceTokenizer):
    """NLTK's in fewer steps, which asks its tokens only where they may say no."""

    def __init__(self, parameters: PunktParameters) -> None:
        super().__init__(parameters)
        self._collocated = {first for first, _ in parameters.collocations}
        self._may_go_on = parameters.abbrev_types | self._collocated
        self._decide = functools.lru_cache(_KEPT_DECISIONS)(super().text_contains_sentbreak)
        possible_end = self._lang_vars.period_context_re().pattern
        possible_end = possible_end.replace(r"\s", f"[{_BLANKS}]").replace(r"\S", f"[^{_BLANKS}]")
        # Python's expressions take half the time of those that NLTK uses.
        self._possible_end = re.compile(possible_end, re.VERBOSE)
        self._closing = self._lang_vars.re_boundary_realignment

    def _slices_from_text(self, text: str) -> Iterator[slice]:
        begin = word = place = 0
        last = None
        for possible in itertools.chain(self._possible_end.finditer(text), (None,)):
            # Of the possible ends in one word, the last one counts.
            blank = self._get_last_whitespace_index(text[place : possible.start()]) if possible else 0
            new_word = blank or word == place or not possible
            if last and new_word and self.text_contains_sentbreak(text[word : last.end("after_tok")]):
                yield slice(begin, last.end())
                following = last.start("next_tok")
                begin = last.end() if following < 0 else following
            if possible:
                word = place + blank + 1 if blank else word
                last, place = possible, possible.start()
        yield slice(begin, len(text.rstrip()))

    def _realign_boundaries(self, text: str, slices: Iterator[slice]) -> Iterator[slice]:
        sentence = next(slices)
        for following in slices:
            # No letter closes anything.
            letter = text[following.start : following.start + 1].isalnum()
            closing = None if letter else self._closing.match(text, following.start, following.stop)
            if closing:
                yield slice(sentence.start, following.start + len(closing[0].rstrip()))
                following = slice(closing.end(), following.stop)
            elif sentence.start < sentence.stop:
                yield sentence
            sentence = following
        if sentence.start < sentence.stop:
            yield sentence

    def text_contains_sentbreak(self, text: str) -> bool:
        """Whether a sentence ends in `text`, a possible end with what stands before and behind it."""
        if plain := _PLAIN_END.match(text):
            word = plain["word"]
            if word.lower() not in self._may_go_on if word else not plain["bare"] or "." not in self._collocated:
                return True
        return bool(self._decide(text))


def _to_json(parameters: PunktParameters) -> dict[str, Any]:
    return {
        "abbreviations": sorted(parameters.abbrev_types),
        "collocations": sorted(map(list, parameters.collocations)),
        "sentence_starters": sorted(parameters.sent_starters),
        "contexts": dict(sorted(parameters.ortho_context.items())),
    }
