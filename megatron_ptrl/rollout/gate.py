"""Response -> the prediction between its tags, if rules that need no judge let it pass.

A judge is a model and can be talked round: ":" alone, or the opening phrase of a solution, counts as correct with many
(arXiv:2507.08794), and the policy finds such answers. What fails a rule gets the reward 0, as the paper gives it to an
output that cannot be parsed, and is never shown to the judge. Each rule has a name, which is counted.
"""

import math
import re
from dataclasses import dataclass

from megatron_ptrl.config import GateConfig
from megatron_ptrl.records import Prompt
from megatron_ptrl.rollout.words import words

OPEN_TAG, CLOSE_TAG = "<|startofprediction|>", "<|endofprediction|>"

RULES = (
    "truncated",  # cut off before the prediction was whole
    "no_tags",  # not both of them
    "repeated_tags",  # one of them more than once
    "tags_out_of_order",
    "no_letters",  # where the target has some
    "too_short",
    "too_long",
    "addresses_judge",  # a heading or a score of the judge's own prompt
    "copied",  # a run of the prompt's words, the segment that follows a mask included
)

# What a prediction would write to end the judge's prompt early and answer it itself.
_JUDGE_MARKUP = re.compile(
    r"(?im)^\s*#+\s*(?:task|scoring rules)\b|^\W*(?:reference|predicted|output format)\b.*:\s*$|\bscore\s*:\s*[01]\b"
)


@dataclass(frozen=True, slots=True)
class Gated:
    """What the gate made of a response."""

    prediction: str
    """Between the tags, without the space around it; empty where there are no tags to trust."""
    failed: str | None
    """The rule that failed first, one of RULES; None to have it judged."""


def gate(prompt: Prompt, response: str, *, truncated: bool, reference: str, config: GateConfig) -> Gated:
    """The prediction of `response` and the first rule that it fails.

    reference: what it will be judged by     truncated: the response was cut off at its longest
    """
    opened, closed = response.count(OPEN_TAG), response.count(CLOSE_TAG)
    if not opened or not closed:
        return Gated("", "truncated" if truncated else "no_tags")
    if opened > 1 or closed > 1:
        return Gated("", "repeated_tags")
    before, _, rest = response.partition(OPEN_TAG)
    if CLOSE_TAG in before:
        return Gated("", "tags_out_of_order")
    prediction = rest.partition(CLOSE_TAG)[0].strip()
    return Gated(prediction, _failed(prediction, prompt, reference, config))


def _failed(prediction: str, prompt: Prompt, reference: str, config: GateConfig) -> str | None:
    if not _has_letters(prediction) and (_has_letters(prompt.target) or not prediction):
        return "no_letters"
    predicted, target = words(prediction), words(prompt.target)
    if len(predicted) < max(1, min(config.min_words, len(target)), math.ceil(config.min_share * len(target))):
        return "too_short"
    if len(predicted) > max(config.min_words, config.max_share * len(words(reference))):
        return "too_long"
    if _JUDGE_MARKUP.search(prediction) and not _JUDGE_MARKUP.search(reference):
        return "addresses_judge"
    shown = " ".join(message["content"] for message in prompt.messages)
    return "copied" if _is_copied(predicted, shown, reference, config.copied_share) else None


def _has_letters(text: str) -> bool:
    return any(character.isalpha() for character in text)


def _is_copied(predicted: tuple[str, ...], shown: str, reference: str, share: float) -> bool:
    """Whether a run of that share of the words is in what the prompt shows; a run of the reference is no copy."""
    if not share:
        return False
    length = math.ceil(share * len(predicted))
    prompt_run, reference_run = (f" {' '.join(words(text))} " for text in (shown, reference))
    runs = (f" {' '.join(predicted[i : i + length])} " for i in range(len(predicted) - length + 1))
    return any(run in prompt_run and run not in reference_run for run in runs)
