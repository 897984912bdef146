"""The responses of a step -> what the metrics say of them."""

import math
from collections import Counter

from megatron_ptrl.rollout.gate import RULES
from megatron_ptrl.training.rollouts import LATE, Group, Response, Round

JUDGED = "judged"
OUTCOMES = (
    JUDGED,
    *(*RULES, "no_answer", "answer_too_long"),
    *("server_error", "bad_request", "malformed_reply", "timeout", "unparsed", "deadline", LATE),
)
"""What can become of a response; all are logged at every step, so that every step logs the same figures."""


def figures(found: Round) -> dict[str, float]:
    """Figures over all responses of a step, those of groups that were left out included.

    reward, and reward_TASK: mean of the judged     unjudged_share     outcome_REASON: share of the responses
    gate_failed_share: 0 by a rule, before any judge     all_right_share, all_wrong_share: of the groups
    response_tokens_mean, _p95, _max     truncated_share     prompt_tokens_mean     passes: 1 + resamplings
    judge_seconds_mean, judge_seconds_p95: of one judgement
    """
    responses = [response for group in found.groups for response in group.responses]
    lengths = sorted(len(response.token_ids) for response in responses)
    waits = sorted(r.judgement.seconds for r in responses if r.judgement.reason == JUDGED)
    failed = [r for r in responses if r.judgement.reward is not None and r.judgement.reason != JUDGED]
    outcomes = dict.fromkeys(OUTCOMES, 0) | Counter(response.judgement.reason for response in responses)
    return {
        **_rewards(found.groups),
        "unjudged_share": _share(responses, [r for r in responses if r.judgement.reward is None]),
        "gate_failed_share": _share(responses, failed),
        **{f"outcome_{reason}": count / len(responses) for reason, count in sorted(outcomes.items())},
        "all_right_share": _share(found.groups, [g for g in found.groups if _alike(g, right=True)]),
        "all_wrong_share": _share(found.groups, [g for g in found.groups if _alike(g, right=False)]),
        "response_tokens_mean": sum(lengths) / len(lengths),
        "response_tokens_p95": float(_percentile(lengths, 0.95)),
        "response_tokens_max": float(lengths[-1]),
        "truncated_share": _share(responses, [r for r in responses if r.truncated]),
        "prompt_tokens_mean": sum(len(group.placed.ids) for group in found.groups) / len(found.groups),
        "passes": float(found.passes),
        "judge_seconds_mean": sum(waits) / max(len(waits), 1),
        "judge_seconds_p95": _percentile(waits, 0.95) if waits else 0.0,
    }


def tokens(found: Round) -> int:
    """Of all responses with their prompts."""
    return sum(len(group.placed.ids) + len(r.token_ids) for group in found.groups for r in group.responses)


def _rewards(groups: list[Group]) -> dict[str, float]:
    by_task: dict[str, list[float]] = {"reward": []}
    for group in groups:
        of_group = [r.judgement.reward for r in group.responses if r.judgement.reward is not None]
        by_task["reward"] += of_group
        by_task.setdefault(f"reward_{group.placed.prompt.task}", []).extend(of_group)
    return {name: sum(rewards) / len(rewards) for name, rewards in sorted(by_task.items()) if rewards}


def _alike(group: Group, *, right: bool) -> bool:
    rewards = {r.judgement.reward for r in group.responses} - {None}
    return len(rewards) == 1 and (rewards == {0.0}) != right


def _share(of: list[Group] | list[Response], some: list[Group] | list[Response]) -> float:
    return len(some) / max(len(of), 1)


def _percentile(ordered: list, share: float) -> float:
    return ordered[min(math.ceil(share * len(ordered)), len(ordered)) - 1]
