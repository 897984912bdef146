"""The rewarder: what it counts, that it works beside its caller, and that no answer is not a reward of 0."""

import asyncio
import threading
import time

import pytest
from judging import TARGET, answer, prompt

from megatron_ptrl.config import JudgeConfig
from megatron_ptrl.errors import InputError
from megatron_ptrl.rollout.judge import JudgeFailed
from megatron_ptrl.rollout.rewards import Rewarder

SECONDS = 60.0


class PlannedJudge:
    """Does what the first word of the prediction says, after a while."""

    name = "planned"

    def __init__(self, latency: float = 0.0) -> None:
        self.latency = latency
        self.under_way = self.most = 0
        self.seen: list[tuple[str, str]] = []
        self.closed = False

    async def score(self, prediction: str, reference: str) -> float:
        self.seen.append((prediction, reference))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            word = prediction.split()[0]
            await asyncio.sleep(3600 if word == "hang" else self.latency)
        finally:
            self.under_way -= 1
        if word == "fail":
            raise JudgeFailed("unparsed", "prose")
        if word == "gone":
            raise InputError("no judge has answered for 180 s")
        return float(word == "right")

    async def close(self) -> None:
        self.closed = True


def rewarder_of(judge: PlannedJudge, at_once: int = 8, **settings: float) -> Rewarder:
    return Rewarder(judge, JudgeConfig(**settings), at_once=at_once)


def said(word: str) -> str:
    return answer(f"{word} he gave 3 of them to Anna.")


def test_rewards_reasons_and_counts():
    judge = PlannedJudge()
    rewarder = rewarder_of(judge, deadline=1.0)
    responses = [said("right"), said("wrong"), said("fail"), said("hang"), "no tags", answer(":")]
    futures = [rewarder.submit(prompt(), response, truncated=False) for response in responses]
    judgements = [future.result(SECONDS) for future in futures]
    assert [(judgement.reward, judgement.reason) for judgement in judgements] == [
        (1.0, "judged"),
        (0.0, "judged"),
        (None, "unparsed"),
        (None, "deadline"),
        (0.0, "no_tags"),
        (0.0, "no_letters"),
    ]
    assert judgements[3].seconds >= 1.0 and judgements[4].seconds == 0.0
    assert [judgement.prediction for judgement in judgements[3:]] == ["hang he gave 3 of them to Anna.", "", ":"]
    counts = rewarder.counts()
    assert {name: value for name, value in counts.items() if "seconds" not in name and "slowest" not in name} == {
        "judged": 2,
        "failed/unparsed": 1,
        "failed/deadline": 1,
        "gate/no_tags": 1,
        "gate/no_letters": 1,
    }
    assert counts["judge_slowest"] >= 1.0 and counts["judge_seconds"] >= counts["judge_slowest"]
    # Two of the four that the judge was asked for; what the gate stopped is no failure of the judge.
    assert rewarder.failed_share() == 0.5
    rewarder.close()
    assert judge.closed


@pytest.mark.parametrize("reward, expected", [("prefix", prompt().reference), ("strict", TARGET)])
def test_the_judge_sees_what_the_reward_compares_with(reward, expected):
    judge = PlannedJudge()
    rewarder = rewarder_of(judge, reward=reward)
    rewarder.submit(prompt(), said("right"), truncated=False).result(SECONDS)
    assert judge.seen == [("right he gave 3 of them to Anna.", expected)]
    rewarder.close()


def test_judging_goes_on_while_the_caller_computes():
    rewarder = rewarder_of(PlannedJudge(latency=0.02), at_once=4)
    futures = []
    for _ in range(40):
        futures.append(rewarder.submit(prompt(), said("right"), truncated=False))
        end = time.perf_counter() + 0.01
        while time.perf_counter() < end:  # holds the interpreter as Python code between two kernels does
            pass
    # All of it is 40 x 0.02 / 4 = 0.2 s of judging, beside 0.4 s of work.
    assert sum(future.done() for future in futures) >= 20
    assert all(future.result(SECONDS).reward == 1.0 for future in futures)
    rewarder.close()


def test_no_more_at_once_than_allowed_and_waiting_is_not_the_deadlines():
    judge = PlannedJudge(latency=0.1)
    rewarder = rewarder_of(judge, at_once=2, deadline=0.9)
    futures = [rewarder.submit(prompt(), said("right"), truncated=False) for _ in range(24)]  # 1.2 s
    assert [future.result(SECONDS).reward for future in futures] == [1.0] * 24
    assert judge.most == 2
    rewarder.close()


def test_a_judge_that_is_gone_stops_everything():
    rewarder = rewarder_of(PlannedJudge())
    for word in ("gone", "right"):
        with pytest.raises(InputError, match="no judge has answered for 180 s"):
            rewarder.submit(prompt(), said(word), truncated=False).result(SECONDS)
    rewarder.close()


def test_closing_gives_up_what_is_under_way_and_ends_the_thread():
    rewarder = rewarder_of(PlannedJudge())
    future = rewarder.submit(prompt(), said("hang"), truncated=False)
    while not rewarder.judge.seen:
        time.sleep(0.001)
    rewarder.close()
    rewarder.close()
    assert future.cancelled()
    assert not any(thread.name == "rewarder" and thread is rewarder._thread for thread in threading.enumerate())
