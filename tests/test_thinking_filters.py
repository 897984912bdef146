"""Filters of thinking: each catches what it is named for, and leaves real text alone."""

import random
import sysconfig
from pathlib import Path

import pytest
from thoughts import prose, thought

from megatron_ptrl.config import AssembleConfig, ThinkingFilterConfig
from megatron_ptrl.config.assemble import ALPHABETIC, SCRIPTS
from megatron_ptrl.errors import InputError
from megatron_ptrl.thinking.filters import REASONS, copied_share, largest_compression, reason_against
from megatron_ptrl.thinking.language import LETTERS, SMALL_WORDS, is_allowed, language_of

GERMAN = (
    "Die Summe der ersten ungeraden Zahlen ist immer eine Quadratzahl, und das kann man mit einem Bild zeigen: man "
    "legt zu einem Quadrat auf zwei Seiten eine Reihe von Steinen, und in der Ecke noch einen."
)
CHINESE = (
    "前n个奇数之和总是一个平方数，这可以用一幅图来说明："
    "在正方形的两边各放一排石子，再在角上放一颗，就又得到一个正方形。"
)
LANGUAGE_SAMPLES = {
    "en": "The sum of the first odd numbers is always a square, and this can be shown with a picture of stones.",
    "de": GERMAN,
    "fr": "La somme des premiers nombres impairs est toujours un carré, et on le montre avec une figure dans le plan.",
    "es": "La suma de los primeros números impares es siempre un cuadrado, y esto se puede mostrar con una figura.",
    "it": "La somma dei primi numeri dispari è sempre un quadrato, e questo si può mostrare con una figura del piano.",
    "pt": "A soma dos primeiros números ímpares é sempre um quadrado, e isso se pode mostrar com uma figura no plano.",
    "nl": "De som van de eerste oneven getallen is altijd een kwadraat, en dat kan men met een plaatje zien.",
    "cyrillic": "Сумма первых нечётных чисел всегда является квадратом, и это можно показать на рисунке.",
    "han": CHINESE,
    "kana": "最初の奇数の和はつねに平方数になり、それは図で示すことができる。",
    "hangul": "처음 홀수들의 합은 항상 제곱수이며 이것은 그림으로 보일 수 있다.",
    "arabic": "مجموع الأعداد الفردية الأولى هو دائما مربع كامل",
    "hebrew": "סכום המספרים האי זוגיים הראשונים הוא תמיד ריבוע",
    "greek": "Το άθροισμα των πρώτων περιττών αριθμών είναι πάντα τετράγωνο",
    "devanagari": "पहली विषम संख्याओं का योग सदैव एक वर्ग होता है",
    "thai": "ผลรวมของจำนวนคี่แรกเป็นกำลังสองเสมอ",
    "latin": "x1 = y1 + z1; x2 = foo(bar, baz); qux[3] = x1 * x2; frob(x1, x2, qux, bar, baz, quux)",
}
TEXT = prose(1, 300)
LOOP = prose(2, 400) + " Wait, let me check this once more." * 60
# What is against it, and what would have to be switched off for it to pass; None for what always counts.
BAD = {
    "empty_document": ({"text": " \n"}, None),
    "empty_thinking": ({"thinking": "\n"}, None),
    "bad_text": ({"thinking": "half \ud800 of a pair"}, None),
    "tag_in_document": ({"text": "HTML has no <think> tag."}, None),
    "tag_in_thinking": ({"thinking": "So </think> closes it."}, None),
    "truncated": ({"finish_reason": "length"}, {"truncated": "keep"}),
    "refusal": ({"thinking": "I\u2019m sorry, but I can't help with that. " + prose(3, 40)}, {"refusals": False}),
    "repetition": ({"thinking": LOOP}, {"max_compression": 0}),
    "copy_of_document": ({"text": TEXT, "thinking": "Let me read it. " + TEXT.replace(" ", "\n")}, {"max_copied": 1}),
    "wrong_language": ({"thinking": CHINESE * 2}, {"languages": []}),
}


@pytest.mark.parametrize("reason", BAD)
def test_what_is_bad_is_named_and_can_be_let_through(reason):
    changed, switch = BAD[reason]
    found = reason_against(thought(0, **changed), AssembleConfig())
    assert found is not None and found[0] == reason and reason in REASONS
    for other in [name for name in BAD if BAD[name][1]]:
        config = AssembleConfig(filters=ThinkingFilterConfig(**BAD[other][1]))
        assert (reason_against(thought(0, **changed), config) is None) == (other == reason)
    assert reason_against(thought(0), AssembleConfig()) is None


@pytest.mark.parametrize(
    "opening",
    [
        "I cannot assist with that request.",
        "As an AI language model, I don't have opinions on this matter.",
        "Okay. I am unable to provide an analysis of this text.",
        "抱歉，我无法回答这个问题。",
        "Sorry, I can't do this.",
        "I'm sorry, but as an assistant, I cannot comment on the case.",
        "I apologize, but I won't be able to work on this text.",
        "I can't help with that.",
        "I'm unable to assist with this.",
        "I must respectfully decline.",
        "I'm not comfortable writing about this.",
        "I am not comfortable with this request.",
        "As an AI developed to help, I cannot take part in it.",
        "I cannot fulfill this request. It asks for instructions.",
    ],
)
def test_refusals(opening):
    config = AssembleConfig(filters=ThinkingFilterConfig(languages=[]))
    assert (reason_against(thought(0, thinking=opening), config) or ("",))[0] == "refusal"


@pytest.mark.parametrize(
    "opening",
    [
        "I can't see at once why the sum is even, so let me try small cases.",
        "I cannot assume that n is prime here.",
        "I can't help but wonder whether the sum is even.",
        "I cannot answer this without the value of n, so let me find that.",
        "I cannot provide a proof yet; small cases first.",
        "Anna says 'I'm sorry I missed it', which is where the plot turns.",
        "As an AI policy this reads oddly, and I can see why.",
        "The author is sorry, but I think the argument holds.",
        "I won't discuss the basics here; the key is the second step.",
        "I will not discuss the trivial parts, but the lemma matters.",
        "I'm not comfortable with the notation yet, so let me restate it.",
        "As an AI researcher would note, I don't see the sample size.",
        "An AI model is trained on text; I can picture it as a table of counts.",
        prose(5, 60) + " I'm sorry, but I can't help with that.",
    ],
)
def test_thinking_that_only_sounds_like_a_refusal(opening):
    assert reason_against(thought(0, thinking=opening), AssembleConfig()) is None


def test_a_loop_is_seen_in_any_script_and_at_the_end_and_real_text_is_none():
    assert largest_compression(LOOP) > 20 and largest_compression(CHINESE * 20) > 8
    assert largest_compression("again " * 20) == 0  # too short to tell
    assert largest_compression("对，" * 60) > 8 > 3 > largest_compression(CHINESE * 2)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:120]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    found = sorted(largest_compression(text[:20_000]) for text in texts if len(text) > 2000)
    assert found[-1] < 8 and found[len(found) // 2] < 4


def test_the_share_that_is_copied():
    own, document = prose(7, 400), prose(8, 400)
    assert copied_share(own, document) == 0 and copied_share(document[100:900], document) == 1
    for share in (0.25, 0.75):
        mixed = document[: int(share * 2000)] + own[: int((1 - share) * 2000)]
        assert copied_share(mixed, document) == pytest.approx(share, abs=1 / 16)
    assert copied_share("short", "a short text") == 1 and copied_share("brief", "a short text") == 0


@pytest.mark.parametrize("language", LANGUAGE_SAMPLES)
def test_languages(language):
    sample = LANGUAGE_SAMPLES[language]
    assert language_of(sample) == language
    assert language_of("日本 " + sample + " x = 3" if language not in ("han", "kana") else sample + " GPT") == language


def test_the_names_of_languages_are_the_ones_of_the_configuration():
    assert set(SMALL_WORDS) == set(ALPHABETIC) and {*LETTERS, "latin"} == set(SCRIPTS)
    assert language_of("12 + 30 = 42") is None
    with pytest.raises(InputError, match="filters.languages has klingon; expected of document, de"):
        ThinkingFilterConfig(languages=["en", "klingon"])


@pytest.mark.parametrize(
    "thinking, document, allowed, expected",
    [
        ("de", "de", ["document"], True),
        ("en", "de", ["document"], False),
        ("en", "han", ["document", "en"], True),
        ("han", "en", ["document", "en"], False),
        ("de", "en", ["document", "en"], False),
        ("latin", "en", ["document"], True),  # formulas: no verdict
        ("latin", "han", ["document"], False),
        ("de", "latin", ["document"], True),  # who knows what the document was in
        ("cyrillic", "en", [], True),
        ("fr", "en", ["fr"], True),
    ],
)
def test_which_languages_are_allowed(thinking, document, allowed, expected):
    assert is_allowed(language_of(LANGUAGE_SAMPLES[thinking]), allowed, LANGUAGE_SAMPLES[document]) == expected


def test_the_language_of_long_text_is_that_of_its_ends():
    drifted = LANGUAGE_SAMPLES["en"] * 40 + CHINESE * 60
    assert language_of(drifted) == "han"
    words = LANGUAGE_SAMPLES["en"].split()
    random.Random(1).shuffle(words)
    assert language_of(" ".join(words) * 100) == "en"
