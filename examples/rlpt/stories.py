"""Short stories whose ends follow from their beginnings, and the steps by which they do. All follows from a seed.

    Anna had 9 apples, found 3 apples, and then lost 2 apples. So in the end Anna had 10 apples. One more would make
    11 apples. Twice as many would be 20 apples.

The first sentence is never asked for. The three behind it can be worked out.
"""

import hashlib
import random
import re
from dataclasses import dataclass

NAMES = ("Anna", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gail", "Hugo")
THINGS = ("apples", "books", "coins", "eggs")
QUESTIONS = ("How many {things} did {name} have in the end?", "How many {things} are twice as many as in the end?")

_START = re.compile(r"(\w+) had (\d+) (\w+), (found|lost) (\d+) \w+, and then (found|lost) (\d+) ")


@dataclass(frozen=True)
class Story:
    """What somebody has, and what becomes of it."""

    name: str
    things: str
    had: int
    changes: tuple[int, int]
    """What is found, or lost where it is negative."""

    @property
    def end(self) -> int:
        """What there is in the end."""
        return self.had + sum(self.changes)

    @property
    def sentences(self) -> list[str]:
        """All four."""
        name, things, end = self.name, self.things, self.end
        first, second = (f"{'found' if change > 0 else 'lost'} {abs(change)} {things}" for change in self.changes)
        return [
            f"{name} had {self.had} {things}, {first}, and then {second}.",
            f"So in the end {name} had {end} {things}.",
            f"One more would make {end + 1} {things}.",
            f"Twice as many would be {2 * end} {things}.",
        ]

    @property
    def text(self) -> str:
        """The whole document."""
        return " ".join(self.sentences)

    def question(self, number: int) -> str:
        """The story without its end, and one of two questions about it."""
        asked = QUESTIONS[number].format(things=self.things, name=self.name)
        return f"{self.sentences[0]}\n{asked}"

    def answer(self, number: int) -> int:
        """To that question."""
        return self.end * (1 + number)

    @property
    def is_held_out(self) -> bool:
        """Whether no training sees these numbers: every eighth story, by chance.

        A checksum would not do: crc32 is linear, and holds out more stories of one kind than of another.
        """
        return hashlib.blake2b(f"{self.had} {self.changes}".encode()).digest()[0] % 8 == 0


def draw_story(rng: random.Random, *, held_out: bool) -> Story:
    """A story that has at least two things at any time."""
    while True:
        first, second = (rng.choice((-1, 1)) * rng.randint(2, 6) for _ in range(2))
        story = Story(rng.choice(NAMES), rng.choice(THINGS), rng.randint(6, 15), (first, second))
        if min(story.had + first, story.end) >= 2 and story.is_held_out == held_out:
            return story


def find_story(text: str) -> Story:
    """The story that a text begins with."""
    found = _START.search(text)
    assert found is not None, text
    name, had, things, *events = found.groups()
    first, second = (int(count) if event == "found" else -int(count) for event, count in (events[:2], events[2:]))
    return Story(name, things, int(had), (first, second))


def steps(story: Story) -> str:
    """How one arrives at the end: `9 + 3 = 12, 12 - 2 = 10.`"""
    sums, count = [], story.had
    for change in story.changes:
        sums.append(f"{count} {'+' if change > 0 else '-'} {abs(change)} = {count + change}")
        count += change
    return f"{', '.join(sums)}."


def think(story: Story, sentence: int) -> str:
    """What leads to a sentence, from 2."""
    if sentence == 2:
        return steps(story)
    more = 1 if sentence == 3 else story.end
    return f"{story.end} + {more} = {story.end + more}."
