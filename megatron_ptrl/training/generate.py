"""A short text from the model as it stands, under any tensor- and pipeline-parallel layout.

Every token is one forward pass over the whole window through Megatron's schedule, without a KV cache: right for a look
at a model at the end of a run, not for rollouts.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_ptrl.config import PretrainConfig, RunConfig


@torch.no_grad()
def generate(config: PretrainConfig, chunks: list[Any], prompt: list[int], *, vocab_size: int, eod: int) -> list[int]:
    """`sample.tokens` token ids that continue `prompt`, up to the end-of-document token, alike on every rank.

    The prompt and the new tokens must fit into data.seq_length; the prompt loses its beginning otherwise.
    """
    room = config.data.seq_length - config.sample.tokens
    written = list(prompt[-max(room, 1) :])
    start = len(written)
    generator = torch.Generator().manual_seed(config.train.seed)
    for chunk in chunks:
        chunk.eval()
    while len(written) - start < config.sample.tokens and len(written) < config.data.seq_length:
        logits = next_logits(config, chunks, written)
        token = _choose(logits[:vocab_size].float().cpu(), config.sample.temperature, generator)
        if token == eod:
            break
        written.append(token)
    for chunk in chunks:
        chunk.train()
    return written[start:]


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))


def next_logits(config: RunConfig, chunks: list[Any], written: list[int]) -> Tensor:
    """Logits (v,) after the last token of `written`, on every rank."""
    return window_logits(config, chunks, written, range(len(written) - 1, len(written)))[0]


@torch.no_grad()
def window_logits(config: RunConfig, chunks: list[Any], written: list[int], places: range) -> Tensor:
    """Logits (places, v) after those tokens of `written`, counted from 0, on every rank. places: without gaps

    The window is always seq_length long: sequence parallelism cannot split one token.
    """
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    tokens = torch.zeros(1, config.data.seq_length, dtype=torch.long, device=device)
    tokens[0, : len(written)] = torch.tensor(written, device=device)
    positions = torch.arange(config.data.seq_length, device=device)[None]
    mask = None
    if config.data.isolate_documents:
        mask = torch.ones(config.data.seq_length, config.data.seq_length, dtype=torch.bool, device=device).triu_(1)[
            None, None
        ]

    def forward_step(batches: Any, model: torch.nn.Module) -> tuple[Tensor, Any]:
        output = model(tokens, positions, mask)
        return output, lambda logits, non_loss_data: logits[0, places.start : places.stop].clone()

    collected = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[None] * len(chunks) if len(chunks) > 1 else None,
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=1 if len(chunks) == 1 else config.parallel.pp,
        seq_length=config.data.seq_length,
        micro_batch_size=1,
        decoder_seq_length=config.data.seq_length,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return _from_last_stage(collected[0] if collected else None, device)


def _from_last_stage(shard: Tensor | None, device: Any) -> Tensor:
    """The whole vocabulary's logits (n, v) from the last stage's shards (n, v/tp). One all-gather, three broadcasts."""
    tp_group = parallel_state.get_tensor_model_parallel_group()
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    pp_group = parallel_state.get_pipeline_model_parallel_group()
    size = torch.tensor([0, 0] if shard is None else list(shard.shape), device=device)
    dist.broadcast(size, src=last, group=pp_group)
    mine = torch.zeros(size.tolist(), device=device) if shard is None else shard.float().contiguous()
    dist.broadcast(mine, src=last, group=pp_group)
    shards = [torch.empty_like(mine) for _ in range(tp_group.size())]
    dist.all_gather(shards, mine, group=tp_group)
    whole = torch.cat(shards, -1)
    dist.broadcast(whole, src=0)
    return whole
