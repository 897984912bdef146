"""Arithmetic word problems with worked steps, and the prose that is mixed with them. Everything follows from a seed.

    Q: Ann has 34 plums and finds 57 more. How many plums does Ann have?
    A: 4+7=11, 3+5+1=9. Answer 91

The text up to `A:` is the prompt, ` Answer 91` at the end of what follows is what a reward can check.
"""

import random
import re
import zlib
from dataclasses import dataclass

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gita", "Hal")
THINGS = ("plums", "coins", "books", "stamps", "shells", "nails", "eggs", "beads")
ADDITIONS = (
    "{name} has {a} {things} and finds {b} more. How many {things} does {name} have?",
    "There are {a} {things} in one box, {b} in another. How many in both?",
    "What is {a}+{b}?",
    "{name} sold {a} {things} on Monday, {b} on Friday. How many in all?",
)
MULTIPLICATIONS = (
    "Each of {b} boxes holds {a} {things}. How many {things} is that?",
    "{name} packs {a} {things} a day for {b} days. How many {things}?",
    "What is {a}*{b}?",
    "{b} rows of {a} {things}: how many {things}?",
)
SUBJECTS = ("The miller", "A fox", "The old clock", "My aunt", "The river", "A letter", "The captain", "Somebody")
VERBS = ("waited", "slept", "turned", "sang", "hurried", "stood still", "went away", "came back")
PLACES = ("by the bridge", "in the rain", "behind the barn", "at the fair", "near the sea", "under the stairs")
ENDINGS = ("until it was dark", "without a word", "as always", "and nobody knew why", "for {n} years", "in {n}")

_ANSWER = re.compile(r"Answer (\d+)\s*$")


@dataclass(frozen=True)
class Problem:
    """A question, its worked solution and the number that is right."""

    prompt: str
    solution: str
    answer: int


def is_held_out(a: int, b: int, operation: str) -> bool:
    """Whether these operands never occur in training: one pair in eight, by chance.

    Not by a rule on the numbers: the totals of what a rule holds out have something in common, and a model that has
    never met such totals would be tested on nothing else.
    """
    return zlib.crc32(f"{a}{operation}{b}".encode()) % 8 == 0


def draw_problem(rng: random.Random, *, held_out: bool, wrong: bool = False) -> Problem:
    """A sum or a product of a two-digit number; `wrong` slips a mistake into a step, and the answer follows from it.

    `answer` is the right number all the same.
    """
    while True:
        operation = rng.choice("+*")
        a, b = rng.randint(10, 99), rng.randint(10, 99) if operation == "+" else rng.randint(2, 9)
        if is_held_out(a, b, operation) == held_out:
            break
    wording = rng.choice(ADDITIONS if operation == "+" else MULTIPLICATIONS)
    question = wording.format(name=rng.choice(NAMES), things=rng.choice(THINGS), a=a, b=b)
    slip = rng.choice((1, 2, 3)) if wrong else 0
    slip_first = rng.random() < 0.5
    units = (a % 10 + b % 10 if operation == "+" else a % 10 * b) + slip * slip_first
    carry = units // 10
    tens = (a // 10 + b // 10 if operation == "+" else a // 10 * b) + carry + slip * (not slip_first)
    first = f"{a % 10}+{b % 10}" if operation == "+" else f"{a % 10}*{b}"
    second = f"{a // 10}+{b // 10}+{carry}" if operation == "+" else f"{a // 10}*{b}+{carry}"
    solution = f" {first}={units}, {second}={tens}. Answer {10 * tens + units % 10}"
    return Problem(f"Q: {question}\nA:", solution, a + b if operation == "+" else a * b)


def draw_prose(rng: random.Random) -> str:
    """A few sentences that mean nothing, with numbers in them that nothing foretells."""
    sentences = []
    for _ in range(rng.randint(2, 4)):
        ending = rng.choice(ENDINGS).format(n=rng.randint(10, 1999))
        sentences.append(f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(PLACES)} {ending}.")
    return " ".join(sentences)


def is_right(text: str, answer: int) -> bool:
    """The verifiable reward: whether `text` ends in the number `answer`."""
    found = _ANSWER.search(text)
    return found is not None and int(found[1]) == answer
