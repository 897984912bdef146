"""Short stories whose ends follow from their beginnings, and the steps by which they do. All follows from a seed.

    Anna had 9 apples. Anna found 3 apples, and then Anna lost 2 apples. So in the end Anna had 10 apples. One more
    would make 11 apples. Twice as many would be 20 apples.

What happens in the second sentence nobody can foretell. The three sentences behind it can be worked out.
"""

import hashlib
import random
import re
from dataclasses import dataclass

NAMES = ("Anna", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gail", "Hugo")
THINGS = ("apples", "books", "coins", "eggs")
QUESTIONS = ("How many {things} did {name} have in the end?", "How many {things} are twice as many as in the end?")

_START = re.compile(r"(\w+) had (\d+) (\w+)\.")
_EVENT = re.compile(r"(found|lost) (\d+) ")


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
        """All five."""
        name, things, end = self.name, self.things, self.end
        events = [f"{name} {'found' if change > 0 else 'lost'} {abs(change)} {things}" for change in self.changes]
        return [
            f"{name} had {self.had} {things}.",
            f"{events[0]}, and then {events[1]}.",
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
        return f"{' '.join(self.sentences[:2])}\n{asked}"

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


def find_story(text: str) -> Story | None:
    """The story that a text begins with, read by its first two sentences; None where they do not stand in it."""
    start, events = _START.search(text), _EVENT.findall(text)
    if start is None or len(events) < 2:
        return None
    first, second = (int(count) if event == "found" else -int(count) for event, count in events[:2])
    return Story(start[1], start[3], int(start[2]), (first, second))


def steps(story: Story) -> str:
    """How one arrives at the end: `9 + 3 = 12, 12 - 2 = 10.`"""
    sums, count = [], story.had
    for change in story.changes:
        sums.append(f"{count} {'+' if change > 0 else '-'} {abs(change)} = {count + change}")
        count += change
    return f"{', '.join(sums)}."


def think(story: Story | None, sentence: int) -> str:
    """What leads to a sentence, from 1: its steps, where there are any."""
    if story is None or sentence == 2:
        return "Something happens."
    if sentence == 3:
        return steps(story)
    more = 1 if sentence == 4 else story.end
    return f"{story.end} + {more} = {story.end + more}."
