"""A reference's log-probabilities -> the weights of a microbatch's tokens, and the sums over them that the logs need.

batches (side-car) or OnlineReference  ->  TokenWeighting.weigh, in the loss on the last stage  ->  loop, TokenLog
"""

from typing import cast

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ptrl.config import RemitConfig
from megatron_ptrl.data.batches import DOCUMENT_IDS, REFERENCE_LOGPROB, Batch
from megatron_ptrl.errors import InputError
from megatron_ptrl.losses.remit import remit_weights, rho1_weights
from megatron_ptrl.training.token_log import TokenLog

ONLINE = "online_reference_logprob"
"""Key of a batch: fp32 (b, s/cp), of this context-parallel rank's part, from an `OnlineReference`."""
BINS = 10
_COMMON = ("remit_weight_mean", "remit_gap", "reference_ce")
_OF_REMIT = ("remit_low_share", "remit_high_share", *(f"remit_weight_bin_{i}" for i in range(BINS)))


class TokenWeighting:
    """The weights of `config`, with the log of single tokens beside them.

    `names` are those of the sums that `weigh` returns: the weight, the gap (the reference's log-probability minus the
    model's), the reference's cross entropy and, for ReMiT, whether the weight is clipped at the lower or upper edge and
    in which of ten equal parts of [1 - epsilon, 1 + epsilon] it lies, lower edge included (the last one: both).
    """

    def __init__(self, config: RemitConfig) -> None:
        self.config = config
        self.log = TokenLog()
        self.counts_kept_tokens = config.weighting == "rho1"
        self._with_histogram = config.weighting == "remit" and config.epsilon > 0
        self.names = (*_COMMON, *_OF_REMIT) if self._with_histogram else _COMMON

    def weigh(self, logprob: Tensor, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """(weights, sums over the unmasked tokens, one fp32 scalar for each of `names`).

        logprob: (b, s/cp) fp32, the plain log-probability of each label, never the shaped loss
        batch: this rank's part, with the reference's log-probabilities and, to centre by document, document ids
        returns: weights (b, s/cp) fp32 without gradient, 0 where masked

        Cost: the collectives of `remit_weights` or `rho1_weights` over the context-parallel group.
        Raises InputError for log-probabilities that are not finite.
        """
        config, logprob = self.config, logprob.detach()
        reference = cast(Tensor, batch[ONLINE if ONLINE in batch else REFERENCE_LOGPROB])
        mask = cast(Tensor, batch["loss_mask"])
        cp = parallel_state.get_context_parallel_world_size()
        document_ids = batch[DOCUMENT_IDS] if config.center == "document" else None
        cp_group = parallel_state.get_context_parallel_group() if cp > 1 else None
        try:
            if config.weighting == "rho1":
                weights = rho1_weights(
                    logprob, reference, mask, keep=config.keep, document_ids=document_ids, cp_group=cp_group
                )
            else:
                weights = remit_weights(
                    logprob, reference, mask, epsilon=config.epsilon, document_ids=document_ids, cp_group=cp_group
                )
        except InputError as error:
            raise InputError(f"remit, {'side-car' if config.sidecar else config.reference}: {error}") from error
        # What the reference says of a masked token may be anything.
        gap, reference = (torch.where(mask != 0, x, 0) for x in (reference - logprob, reference))
        self.log.see(cast(Tensor, batch["labels"]), weights, gap, mask)
        sums = [(column * mask).sum() for column in (weights, gap, -reference)]
        return weights, [*sums, *self._histogram(weights, mask)] if self._with_histogram else sums

    def _histogram(self, weights: Tensor, mask: Tensor) -> list[Tensor]:
        epsilon = self.config.epsilon
        place = (((weights - 1) / epsilon + 1) * (BINS / 2)).floor().long().clamp(0, BINS - 1)
        bins = torch.zeros(BINS, device=weights.device).index_add_(0, place.view(-1), mask.reshape(-1).float())
        low, high = ((weights <= 1 - epsilon) * mask).sum(), ((weights >= 1 + epsilon) * mask).sum()
        return [low, high, *bins.unbind()]
