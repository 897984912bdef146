"""Short texts with a sum in them, and the thinking that works such a sum out. Everything follows from a seed.

    The mill at Ash ground 47 sacks in March and 86 in May. Together that made 133 sacks.

The total is hard to foretell in one go, digit by digit from the left, and easy in steps from the right. Every second
text leaves it open, as texts do that take their reader for granted.
"""

import random
import re
import zlib
from dataclasses import dataclass

PLACES = ("Ash", "Birk", "Cole", "Dunn", "Esk", "Firth", "Glen", "Holm")
SOURCES = {
    "The mill at {place} ground {a} sacks in {first} and {b} in {second}.": "sacks",
    "In {first} the farm at {place} sold {a} eggs, in {second} {b}.": "eggs",
    "The school at {place} had {a} books in {first}; {b} were given to it in {second}.": "books",
    "From {place} came {a} letters in {first} and {b} more in {second}.": "letters",
}
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "October", "November")
STATED = "Together that made {total} {things}."
OPEN = "What that made together was left to the reader."
OPENINGS = ("{things} together: ", "How many {things}? ", "Add up the {things}: ")

_SUM = re.compile(r"(\d+)\D+?(\d+)\D")
_THINGS = re.compile(r"\b(sacks|eggs|books|letters)\b")
_TOTAL = re.compile(r"Together (\d+)\.")


@dataclass(frozen=True)
class Sum:
    """A text up to where its total may stand, and the total."""

    beginning: str
    things: str
    total: int

    def text(self, *, stated: bool) -> str:
        """The whole document."""
        ending = STATED.format(total=self.total, things=self.things) if stated else OPEN
        return f"{self.beginning} {ending}"

    @property
    def up_to_total(self) -> str:
        """The document that states it, cut before the total; a space belongs to what follows, as in the tokenizer."""
        return f"{self.beginning} {STATED.partition(' {total}')[0]}"


def is_held_out(a: int, b: int) -> bool:
    """Whether these operands never occur in training: every eighth pair, by chance.

    Not by a rule of arithmetic: 7 a + 3 b = 0 (mod 8), say, holds out multiples of 4 alone, which training then avoids.
    """
    return zlib.crc32(f"{a} {b}".encode()) % 8 == 0


def draw_sum(rng: random.Random, *, held_out: bool) -> Sum:
    """Two numbers of two digits in a sentence."""
    while True:
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        if is_held_out(a, b) == held_out:
            break
    sentence, things = rng.choice(list(SOURCES.items()))
    first, second = rng.sample(MONTHS, 2)
    source = sentence.format(place=rng.choice(PLACES), a=a, b=b, first=first, second=second)
    return Sum(source, things, a + b)


def think(document: str, rng: random.Random) -> str | None:
    """What an expert thinks of the document: the sum of its first two numbers, digit by digit; None without two.

    It goes by the text alone, as a model would, and does not look at the total that may stand there.
    """
    found, things = _SUM.search(document), _THINGS.search(document)
    if found is None or things is None:
        return None
    a, b = int(found[1]), int(found[2])
    units = a % 10 + b % 10
    tens = a // 10 + b // 10 + units // 10
    steps = f"{a % 10}+{b % 10}={units}, {a // 10}+{b // 10}+{units // 10}={tens}"
    return f"{rng.choice(OPENINGS).format(things=things[1])}{steps}. Together {a + b}."


def is_right(thinking: str, total: int) -> bool:
    """Whether thinking ends in the right total."""
    found = _TOTAL.findall(thinking)
    return bool(found) and int(found[-1]) == total
