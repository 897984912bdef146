"""The table that a run ends with."""

import math
import statistics

_HELD_OUT = {
    "valid_entropy": "held-out entropy",
    "valid_target_probability": "held-out target probability",
    "valid_head_mass": "held-out head mass",
    "valid_tail_mass": "held-out tail mass",
    "valid_loss": "held-out shaped loss",
}


def summary(
    last_step: dict[str, float],
    held_out: dict[str, float],
    unigram: float | None,
    rates: list[float],
    *,
    steps: int,
    tokens: int,
    seconds: float,
) -> str:
    """Held-out figures beside the unigram baseline (nats a token), the last step's, the rates (tokens/s), the cost.

    Perplexity is that of the plain cross entropy; the shaped loss is shown as what it is.
    """
    rows: list[tuple[str, str]] = []
    if held_out:
        rows.append(("held-out cross entropy", f"{held_out['valid_ce']:.4f} nats a token"))
        rows.append(("held-out perplexity", f"{held_out['valid_perplexity']:.2f}"))
        if unigram is not None:
            rows.append(("unigram perplexity", f"{math.exp(unigram):.2f}"))
        rows += [(label, f"{held_out[name]:.4f}") for name, label in _HELD_OUT.items() if name in held_out]
    if last_step:
        rows.append(("training cross entropy", f"{last_step['ce']:.4f} nats a token (last step)"))
        rows.append(("tokens/s", f"{statistics.median(rates):,.0f} (median over the steps of this call)"))
    rows.append(("steps, tokens", f"{steps:,}, {tokens:,}"))
    rows.append(("this call", f"{seconds:.0f} s of training and evaluation"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(["", *(f"{name:<{width}}  {value}" for name, value in rows), ""])
