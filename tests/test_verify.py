"""Answers that can be checked: where they are found, which rule settles them, and what never ends."""

import pytest
from judging import answer, prompt

from megatron_ptrl.config import JudgeConfig, VerifyConfig
from megatron_ptrl.errors import InputError
from megatron_ptrl.rollout.rewards import make_rewarder
from megatron_ptrl.rollout.verify import find_answer, same_number, same_text

EVERY = ["boxed", "tags", "last_number"]
SECONDS = 120.0


@pytest.mark.parametrize(
    "response, order, expected",
    [
        (r"So \boxed{\frac{1}{2}}.", ["boxed"], r"\frac{1}{2}"),
        (r"First \boxed{1}, no: \boxed{ 2 }", ["boxed"], "2"),
        (r"\boxed{unfinished {", ["boxed"], None),
        (r"\boxed{}", ["boxed"], None),
        ("12", ["boxed"], None),
        (answer("42"), ["tags"], "42"),
        (answer("42") + answer("43"), ["tags"], None),
        ("It costs 5, no, 1,234.50 dollars.", ["last_number"], "1,234.50"),
        ("It is -7.", ["last_number"], "-7"),
        ("none", EVERY, None),
        (answer(r"\boxed{3} of 4"), EVERY, "3"),
        (answer("3 of 4"), EVERY, "3 of 4"),
        (answer("3 of 4"), ["last_number", "tags"], "4"),
    ],
)
def test_where_the_answer_is_found(response, order, expected):
    assert find_answer(response, VerifyConfig(answer=order)) == expected


def test_the_rules_that_need_no_algebra():
    for left, right, equal in (("12", "12.0", True), ("1,000", "1000", True), ("$7.", "7", True), ("-3", "3", False)):
        assert same_number(left, right) is equal
    for left, right in (("1/2", "0.5"), ("x", "1"), ("12 cm", "12"), ("1,00", "100")):
        assert same_number(left, right) is None
    for left, right, equal in (
        ("Blue", " blue", True),
        ("x", "X", False),
        ("(1, 2)", "(1,2)", True),
        ("a b", "ac", False),
    ):
        assert same_text(left, right) is equal


PAIRS = [
    (r"\frac{1}{2}", "0.5", 1),
    ("1/2", r"\frac{2}{4}", 1),
    ("(x+1)^2", "x^2+2x+1", 1),
    ("(x-1)^2", "x^2+2x+1", 0),
    (r"\{1,2\}", r"\{2,1\}", 1),
    ("(1,2)", "(2,1)", 0),
    (r"\sqrt{8}", r"2\sqrt{2}", 1),
    (r"12\text{ cm}", "12", 1),
    ("x=5", "5", 1),
    ("13", "14", 0),
]


def test_rewards_of_answers():
    rewarder = make_rewarder(JudgeConfig(verify=VerifyConfig(max_characters=60)))
    futures = [
        rewarder.submit(prompt(target, task="rlvr"), rf"so \boxed{{{given}}}", truncated=False)
        for given, target, _ in PAIRS
    ]
    assert [future.result(SECONDS).reward for future in futures] == [reward for _, _, reward in PAIRS]
    for response, truncated, reason in (
        ("no answer", False, "no_answer"),
        ("no ans", True, "truncated"),
        (rf"\boxed{{{'1' * 61}}}", False, "answer_too_long"),
    ):
        judgement = rewarder.submit(prompt("5", task="rlvr"), response, truncated=truncated).result(SECONDS)
        assert (judgement.reward, judgement.reason) == (0.0, reason)
    counts = rewarder.counts()
    assert (counts["verify/math"], counts["verify/same_number"]) == (9, 1)
    rewarder.close()


def test_a_comparison_that_never_ends_has_no_reward_and_costs_no_other():
    """A tower of powers; sympy would compute it within one call that no signal handler interrupts."""
    rewarder = make_rewarder(JudgeConfig(verify=VerifyConfig(workers=1, timeout=1.0)))
    futures = [
        rewarder.submit(prompt(r"\frac{1}{2}", task="rlvr"), rf"\boxed{{{given}}}", truncated=False)
        for given in ("9^{9^{9^{9}}}", "0.5")
    ]
    stuck, other = (future.result(SECONDS) for future in futures)
    assert (stuck.reward, stuck.reason, other.reward) == (None, "verify_timeout", 1.0)
    assert rewarder.failed_share() == 0.5
    rewarder.close()


def test_without_algebra_the_text_decides():
    rewarder = make_rewarder(JudgeConfig(verify=VerifyConfig(math=False)))
    for given, reward in (("0.5", 0.0), (r"\frac{1}{2}", 1.0)):
        asked = prompt(r"\frac{1}{2}", task="rlvr")
        assert rewarder.submit(asked, rf"\boxed{{{given}}}", truncated=False).result(SECONDS).reward == reward
    assert "verify/math" not in rewarder.counts()
    rewarder.close()


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(InputError, match="verify.answer is empty"):
        VerifyConfig(answer=[])
    with pytest.raises(InputError, match="verify.timeout is 0; expected > 0"):
        VerifyConfig(timeout=0)
