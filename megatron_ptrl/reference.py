"""The losses in plain torch, unsharded, a few lines each: what the tests trust. Any float dtype; fp64 for truth."""

import torch
from torch import Tensor

from megatron_ptrl.config import RewardShaping


def _memberships(logits: Tensor, target: Tensor, top_k: int, vocab_size: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Masks over the vocabulary: the k largest (ties in, the target ranked too), the rest, the target."""
    columns = torch.arange(logits.shape[-1], device=logits.device)
    real = columns < (logits.shape[-1] if vocab_size is None else vocab_size)
    ranked = logits.detach().masked_fill(~real, -torch.inf)
    threshold = ranked.topk(min(top_k, int(real.sum())), dim=-1).values[..., -1:]
    return real & (ranked >= threshold), real & (ranked < threshold), columns == target.unsqueeze(-1)


def reward_shaped_cross_entropy(
    logits: Tensor, target: Tensor, shaping: RewardShaping, vocab_size: int | None = None
) -> Tensor:
    """[..., v] and [...] -> [...]; autograd gives the gradient, with w and the top-k held constant."""
    head, tail, is_target = _memberships(logits, target, shaping.top_k, vocab_size)
    log_p = logits.log_softmax(-1)
    others = log_p.exp().masked_fill(is_target, 0)
    log_px = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    q = others.sum(-1).detach()
    exponent = torch.where((q > 0) & (q < 1), 1 - q**shaping.beta, 0)
    w = torch.where(exponent == 0, 1, (exponent * log_px.detach()).exp())
    p_head, p_tail = (others * head).sum(-1), (others * tail).sum(-1)
    return -w * log_px - shaping.lambda_head * p_head - shaping.lambda_tail * p_tail


def token_stats(
    logits: Tensor, target: Tensor, top_k: int, vocab_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log p_x, the entropy, P_head and whether the target is among the top-k, each [...]."""
    head, _, is_target = _memberships(logits, target, top_k, vocab_size)
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0).sum(-1)
    logprob = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return logprob, entropy, (p * (head & ~is_target)).sum(-1), (head & is_target).any(-1)


def remit_weights(
    logprob: Tensor, reference_logprob: Tensor, loss_mask: Tensor, epsilon: float, document_ids: Tensor | None = None
) -> Tensor:
    """[b, s] -> [b, s]: clip(2 sigmoid(gap - mean gap), 1 - eps, 1 + eps), the mean over a row or a document of it."""
    ids = torch.zeros_like(logprob) if document_ids is None else document_ids
    weights = torch.zeros_like(logprob)
    for row in range(len(logprob)):
        for document in ids[row].unique():
            kept = (ids[row] == document) & (loss_mask[row] != 0)
            gap = reference_logprob[row, kept] - logprob[row, kept]
            weights[row, kept] = (2 * (gap - gap.mean()).sigmoid()).clamp(1 - epsilon, 1 + epsilon)
    return weights
