"""The lexical judge behind its gate, on pairs judged by hand, and the words that both compare."""

import pytest
from judging import AFTER, TARGET, answer, prompt

from megatron_ptrl.config import GateConfig, JudgeConfig, LexicalConfig
from megatron_ptrl.records import Prompt
from megatron_ptrl.rollout.rewards import Rewarder, make_rewarder
from megatron_ptrl.rollout.words import joined, numbers, words

CAT = prompt("The cat sat on the mat and looked at the dog.", "The dog barked. Then it slept.", "It was noon.")
ZH = prompt("猫坐在垫子上看着那只狗。", "狗叫了起来。然后它睡着了。", "现在是中午。")
JA = prompt("猫はマットの上に座っていました。", "犬が吠えました。", "正午でした。")
TH = prompt("แมวนั่งอยู่บนเสื่อและมองดูสุนัข", "สุนัขเห่า", "เที่ยงวัน")
RU = prompt("Кошка сидела на коврике и смотрела на собаку.", "Собака залаяла.", "Был полдень.")
SUM = prompt("So 12 + 5 = 17 and 17 - 3 = 14.", "The answer is 14.", "Add 12 and 5, then take 3 away.")
ONE = prompt("Stop!", "He ran away at once.", "A dog barked.")
US = prompt("The U.S. spent $3.5 million, i.e. 7% more.", "It was not enough.", "The report is out.")

PAIRS: list[tuple[Prompt, str, float]] = [
    # The seven of the design: exact and lightly edited prefix, then what must not pass.
    (CAT, "The cat sat on the mat and looked at the dog.", 1),
    (CAT, "The cat sat upon the mat and looked at the dog", 1),
    (CAT, "Stock markets fell sharply on Monday after the news.", 0),
    (CAT, ":", 0),
    (CAT, "The cat", 0),
    (CAT, "Let's solve this problem step by step.", 0),
    (
        CAT,
        "The cat sat on the mat and looked at the dog. The dog barked. Then it slept. " + "And so on it went. " * 6,
        0,
    ),
    # Spelling that means nothing.
    (CAT, "the CAT sat on the mat, and looked at the dog", 1),
    (CAT, "The cat  sat on\nthe mat and looked at the dog.", 1),
    (CAT, "Ｔｈｅ cat sat on the mat and looked at the dog.", 1),
    (CAT, "The cat sat on the mat and looked at the dog. The dog barked.", 1),
    (CAT, "The cat sat on the mat and", 1),
    (CAT, "The dog sat in the rain and stared up at the moon.", 0),
    (CAT, "and looked at the dog. The dog barked. Then it slept.", 0),
    (CAT, "The dog barked. Then it slept.", 0),
    (CAT, "dog the at looked and mat the on sat cat The", 0),
    (CAT, "The the the the the the the the the the the", 0),
    # Numbers.
    (prompt(), TARGET, 1),
    (prompt(), f"{TARGET} {AFTER}", 1),
    (prompt(), "He gave 4 of them to Anna because she was hungry.", 0),
    (prompt(), "He gave some of them to Anna because she was hungry.", 0),
    (prompt(), f"{TARGET} Now he has 8 apples left.", 0),
    (SUM, "So 12 + 5 = 17 and 17 - 3 = 14", 1),
    (SUM, "So 12 + 5 = 17 and 17 - 3 = 15.", 0),
    (US, "The U.S. spent $3.5 million, i.e. 7% more.", 1),
    (US, "The U.S. spent $35 million, i.e. 7% more.", 0),
    # Other scripts.
    (ZH, "猫坐在垫子上看着那只狗。", 1),
    (ZH, "猫坐在垫子上看着那只狗。狗叫了起来", 1),
    (ZH, "猫坐在垫子上,看着一只狗", 1),
    (ZH, "狗在公园里跑来跑去很开心。", 0),
    (ZH, "猫", 0),
    (JA, "猫はマットの上に座っていました。", 1),
    (JA, "犬は庭で元気に走り回っています。", 0),
    (TH, "แมวนั่งอยู่บนเสื่อและมองดูสุนัข", 1),
    (TH, "วันนี้อากาศร้อนมากและไม่มีฝนตก", 0),
    (RU, "кошка сидела на коврике, и смотрела на собаку", 1),
    (RU, "Мальчик купил хлеб и молоко в магазине.", 0),
    # A target of one word may be predicted by one.
    (ONE, "Stop!", 1),
    (ONE, "Go!", 0),
]


@pytest.fixture(scope="module")
def rewarders():
    made = {reward: make_rewarder(JudgeConfig(reward=reward)) for reward in ("prefix", "strict")}
    yield made
    for rewarder in made.values():
        rewarder.close()


def reward(rewarder: Rewarder, asked: Prompt, prediction: str) -> float | None:
    return rewarder.submit(asked, answer(prediction), truncated=False).result(timeout=60).reward


@pytest.mark.parametrize("asked, prediction, expected", PAIRS)
def test_pairs_judged_by_hand(rewarders, asked, prediction, expected):
    assert reward(rewarders["prefix"], asked, prediction) == expected


@pytest.mark.parametrize(
    "prediction, prefix, strict",
    [(TARGET, 1, 1), (f"{TARGET} Now he has 9 apples left.", 1, 0), ("He gave 3 of them to Anna", 1, 0)],
)
def test_the_strict_reward_wants_the_segment_and_no_more(rewarders, prediction, prefix, strict):
    assert reward(rewarders["prefix"], prompt(), prediction) == prefix
    assert reward(rewarders["strict"], prompt(), prediction) == strict


def test_the_settings_decide():
    loose = JudgeConfig(
        gate=GateConfig(min_words=1, min_share=0.0), lexical=LexicalConfig(threshold=40.0, numbers_agree=False)
    )
    rewarder = make_rewarder(loose)
    assert reward(rewarder, CAT, "The cat") == 1
    assert reward(rewarder, prompt(), "He gave 4 of them to Anna because she was hungry.") == 1
    rewarder.close()


@pytest.mark.parametrize("threshold, expected", [(85.0, 1), (97.0, 0)])
def test_what_it_cannot_see_but_with_a_higher_threshold(threshold, expected):
    rewarder = make_rewarder(JudgeConfig(lexical=LexicalConfig(threshold=threshold)))
    asked = prompt("After that the ball was in the red box on the left.", "Tom saw it.", "Anna took the ball.")
    assert reward(rewarder, asked, "After that the ball was in the blue box on the left.") == expected
    rewarder.close()


def test_words():
    assert words("Don’t go: it's $3.50 (well-known)!") == ("dont", "go", "its", "$", "3.50", "well", "known")
    assert words("3-2=1, 6/2, 1,000") == ("3", "-", "2", "=", "1", "6", "/", "2", "1,000")
    assert words("हिन्दी भाषा") == ("हिन्दी", "भाषा")
    assert words("GPT-4 用了3天") == ("gpt", "-", "4", "用", "了", "3", "天")
    assert joined(words("a 猫 b")) == "a 猫b "
    assert numbers(words("1,000 of 3.5 a2")) == ["1000", "3.5"]
    assert words(" .,!? ") == ()
