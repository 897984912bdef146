"""The embedded judge: likeness of characters, for smoke runs and tests. It does not know what a sentence means.

prediction, reference  ->  words  ->  the reference cut to as many  ->  rapidfuzz ratio, and the same numbers
"""

from rapidfuzz import fuzz

from megatron_ptrl.config import JudgeConfig
from megatron_ptrl.rollout.words import joined, numbers, words


class LexicalJudge:
    """1 for a prediction that is spelt nearly like the reference's beginning, or all of it under the strict reward.

    One short word of a long sentence makes no difference to it, be it "not"; a higher `lexical.threshold` does.
    """

    name = "lexical"
    description = "lexical judge: compares characters, understands nothing, for smoke runs only"

    def __init__(self, config: JudgeConfig) -> None:
        self._prefix = config.reward == "prefix"
        self._threshold = config.lexical.threshold
        self._numbers_agree = config.lexical.numbers_agree

    async def score(self, prediction: str, reference: str) -> float:
        """0.0 or 1.0; about 10 us."""
        predicted, wanted = words(prediction), words(reference)
        if self._prefix:
            wanted = wanted[: len(predicted)]
        if not predicted or (self._numbers_agree and numbers(predicted) != numbers(wanted)):
            return 0.0
        return float(fuzz.ratio(joined(predicted), joined(wanted)) >= self._threshold)

    async def close(self) -> None:
        """Nothing to let go of."""
