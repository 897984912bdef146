"""Two rows of a logged step -> token_weights.jsonl: every token's text, weight and gap, and those that stand out.

The rows are the first ones of the first microbatch of data-parallel rank 0. They are seen on the last pipeline stage,
in parts under context parallelism, and written by rank 0.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ptrl.data.tokenizer import Tokenizer

ROWS = 2


class TokenLog:
    """`arm` before a step that is logged, `see` in its first loss, `collect` after it on every rank."""

    def __init__(self) -> None:
        self._armed = False
        self._seen: Tensor | None = None

    def arm(self) -> None:
        """Keep the rows of the next microbatch."""
        self._armed = True
        self._seen = None

    def see(self, labels: Tensor, weights: Tensor, gap: Tensor, loss_mask: Tensor) -> None:
        """All (b, s/cp), of the last pipeline stage. No collective."""
        if self._armed:
            # An id of a token is exact in fp64, so that all four travel as one tensor.
            self._seen = torch.stack([x[:ROWS].double() for x in (labels, weights, gap, loss_mask)])
            self._armed = False

    def collect(self, micro_batch: int, seq_length: int) -> Tensor | None:
        """(4, rows, s) fp64 on rank 0: labels, weights, gaps, mask; None elsewhere. To be called by every rank.

        Cost: with context parallelism one all-gather of 32 bytes a token, with pipeline parallelism one broadcast.
        """
        if parallel_state.get_data_parallel_rank() != 0:
            self._seen = None
            return None
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        rows = torch.zeros(4, min(ROWS, micro_batch), seq_length, dtype=torch.float64, device=device)
        if self._seen is not None:
            rows.copy_(_uncut(self._seen))
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(rows, src=last, group=parallel_state.get_pipeline_model_parallel_group())
        self._armed, self._seen = False, None
        return rows.cpu() if dist.get_rank() == 0 else None


def _uncut(mine: Tensor) -> Tensor:
    """The whole rows: context-parallel rank r of cp has the chunks r and 2 cp - 1 - r of them."""
    cp = parallel_state.get_context_parallel_world_size()
    if cp == 1:
        return mine
    parts = [torch.empty_like(mine) for _ in range(cp)]
    dist.all_gather(parts, mine.contiguous(), group=parallel_state.get_context_parallel_group())
    halves = [part.chunk(2, dim=-1) for part in parts]
    return torch.cat([first for first, _ in halves] + [second for _, second in reversed(halves)], dim=-1)


def lines(rows: Tensor, tokenizer: Tokenizer, step: int, top_tokens: int) -> list[dict[str, Any]]:
    """One object for token_weights.jsonl for each row of what `collect` gave.

    step; text, weight, gap, loss_mask: lists with an entry for each token; highest, lowest: the `top_tokens` unmasked
    tokens with the largest and the smallest weight, those of equal weight by the gap.
    """
    found = []
    for row in range(rows.shape[1]):
        labels, weight, gap, loss_mask = rows[:, row].tolist()
        text = [tokenizer.decode([int(label)]) for label in labels]
        kept = sorted((i for i in range(len(gap)) if loss_mask[i]), key=lambda i: (weight[i], gap[i]))
        tokens = [{"position": i, "text": text[i], "weight": weight[i], "gap": gap[i]} for i in kept]
        found.append(
            {
                "step": step,
                "text": text,
                "weight": weight,
                "gap": gap,
                "loss_mask": [int(x) for x in loss_mask],
                "highest": tokens[::-1][:top_tokens],
                "lowest": tokens[:top_tokens],
            }
        )
    return found
