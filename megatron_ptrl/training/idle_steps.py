"""Steps of `ptrl rl` that teach nothing: how many there were, for what reason, and what to change."""

from megatron_ptrl.training.rollouts import Group, Round

_ADVICE = {
    "all right": "the prompts are too easy: take harder ones, or a stricter judge (judge.reward strict)",
    "all wrong": "the policy never meets the reward: see rollouts/ and outcome_* in metrics.jsonl for why, then take a "
    "longer cold start, easier prompts or more rollout.samples",
    "otherwise equal": "every group agrees with itself: take more rollout.samples, or rollout.resample",
    "cut off": "responses that differ in reward were cut off: raise rollout.max_tokens, or set "
    "rollout.mask_truncated to false",
}


class IdleSteps:
    """Those of one call of the command."""

    def __init__(self) -> None:
        self.steps = 0
        self._counts = dict.fromkeys(_ADVICE, 0)

    def add(self, found: Round, *, drop_equal: bool) -> str:
        """Count a step. What to say of it: something after 1, 2, 4, 8, ... such steps, else nothing."""
        self.steps += 1
        cut = bool(found.trained(drop_equal=drop_equal))
        self._counts["cut off" if cut else _kind(found.groups)] += 1
        return self.told() if self.steps & (self.steps - 1) == 0 else ""

    def told(self) -> str:
        """All of them in one line."""
        counts = {kind: count for kind, count in self._counts.items() if count}
        shown = ", ".join(f"{kind} in {count:,}" for kind, count in counts.items())
        most = max(counts, key=lambda kind: counts[kind])
        told = f"nothing was learnt from {self.steps:,} steps so far (responses {shown})"
        return f"{told}, which left the weights as they were; {_ADVICE[most]}"


def _kind(groups: list[Group]) -> str:
    """What most of the groups, all of which have equal rewards, are."""
    right = [{response.judgement.reward for response in group.responses} - {None, 0.0} != set() for group in groups]
    share = sum(right) / max(len(right), 1)
    return "all right" if share > 2 / 3 else "all wrong" if share < 1 / 3 else "otherwise equal"
