"""A model as a policy: prompts -> sampled answers, and the loss of given answers, many at once on one rank.

    rows of tokens of different lengths  --right-padded-->  (b, s)  --Megatron's GPTModel-->  logits or losses

Every new token is one forward pass over all that is written so far, without a KV cache: right for answers of twenty
tokens from a small model, not for more. Causal attention keeps the padding behind a row from its tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ptrl.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Rows:
    """Prompts with their answers, as a batch: label i is the token behind token i."""

    tokens: Tensor
    """(b, s) int64"""
    labels: Tensor
    """(b, s) int64"""
    answer_mask: Tensor
    """(b, s) fp32, 1 where the label belongs to the answer"""
    text_mask: Tensor
    """(b, s) fp32, 1 where the label belongs to the prompt or the answer"""

    def part(self, rows: slice) -> "Rows":
        """Some of the rows."""
        return Rows(self.tokens[rows], self.labels[rows], self.answer_mask[rows], self.text_mask[rows])


def make_rows(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Rows:
    """Right-padded rows of prompt and answer; the first token of a row is no label, as nothing stands before it."""
    whole = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    length = max(map(len, whole))
    padded = torch.zeros(len(whole), length, dtype=torch.long)
    answer_mask, text_mask = torch.zeros(2, len(whole), length - 1)
    for i, (row, prompt) in enumerate(zip(whole, prompts, strict=True)):
        padded[i, : len(row)] = torch.tensor(row)
        answer_mask[i, len(prompt) - 1 : len(row) - 1] = 1.0
        text_mask[i, : len(row) - 1] = 1.0
    return Rows(padded[:, :-1], padded[:, 1:].contiguous(), answer_mask, text_mask)


def forward(model: Any, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
    """Logits (b, s, v) without labels, else the loss of each label (b, s): -log p where nothing is shaped."""
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    length = tokens.shape[1]
    positions = torch.arange(length, device=device).expand_as(tokens)
    barred = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)[None, None]
    labels = None if labels is None else labels.to(device)
    return model(tokens.to(device), positions, barred, labels=labels)


@torch.no_grad()
def sample(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> list[list[int]]:
    """An answer to each prompt, the end-of-document token last unless `new_tokens` came first; temperature 0 is argmax.

    Cost: a forward pass over all unfinished rows for each new token.
    """
    model.eval()
    answers: list[list[int]] = [[] for _ in prompts]
    unfinished = list(range(len(prompts)))
    for _ in range(new_tokens):
        lengths = [len(prompts[i]) + len(answers[i]) for i in unfinished]
        tokens = torch.zeros(len(unfinished), max(lengths), dtype=torch.long)
        for row, i in enumerate(unfinished):
            tokens[row, : lengths[row]] = torch.tensor([*prompts[i], *answers[i]])
        last = forward(model, tokens)[torch.arange(len(unfinished)), torch.tensor(lengths) - 1]
        # The columns behind the vocabulary are padding that no training has touched.
        last = last[:, : tokenizer.vocab_size].float().cpu()
        if temperature == 0:
            chosen = last.argmax(-1)
        else:
            chosen = torch.multinomial((last / temperature).softmax(-1), 1, generator=generator)[:, 0]
        for i, token in zip(unfinished, chosen.tolist(), strict=True):
            answers[i].append(token)
        unfinished = [i for i in unfinished if answers[i][-1] != tokenizer.eod]
        if not unfinished:
            break
    model.train()
    return answers
