"""What the ranks say to one another in a step, by formula: which call, over which group, how many bytes, how often.

The formulas are text, so that docs/scaling.md shows the very ones that are evaluated here. benchmarks/collectives.py
holds them against the calls of real steps. They are of Megatron-Core 0.16 and its own layers; Transformer Engine's make
the same calls over tensor- and pipeline-parallel ranks, and pass keys and values around instead of gathering them.
"""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from megatron_ptrl.config import PretrainConfig, RemitConfig, RunConfig
from megatron_ptrl.errors import InputError
from megatron_ptrl.training.head_costs import implementation
from megatron_ptrl.training.layout import Layout
from megatron_ptrl.training.plan import count_parameters, parameters_of_stage

Stage = Literal["pretrain", "sft", "score", "rl"]
OURS, MEGATRON = "megatron_ptrl", "Megatron-Core"

SYMBOLS = {
    "s, b, h, v, L": "tokens of a row, rows of a microbatch, hidden size, padded vocabulary, layers",
    "tp, pp, V, cp, dp": "sizes of the groups; V is vpp, or 1",
    "m": "microbatches of a step on a rank",
    "k": "logits of a shard that travel: top_k in training (the log wants the head's mass), 1 in score and rl",
    "n": "tokens of a microbatch on a rank, b s / cp",
    "l": "layers on a rank, L / pp",
    "t": "tp with sequence parallelism, else 1",
    "z": "bytes of a weight or an activation: 2 in bf16, 4 in fp32",
    "q, kv": "width of the queries and of the keys of all heads",
    "c": "loss.chunk_tokens, at most n",
    "P, N, Q": "parameters on a rank; those in norms; those in norms of queries and keys",
    "f": "figures of the log: 7, with ReMiT's weights 23, with RHO-1's 11",
    "r, a": "forwards of a layer and of its attention in a step: 2 with recomputation, else 1; 1 without backward",
    "B": "responses that a rank writes at a time",
    "first, last": "1 on the first, the last pipeline stage, else 0",
    "pad(x)": "x up to the next multiple of 128 and of dp cp",
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The values of SYMBOLS on one rank, and the switches that conditions ask for."""

    s: int
    b: int
    h: int
    v: int
    L: int
    tp: int
    pp: int
    V: int
    cp: int
    dp: int
    m: int
    k: int
    z: int
    kv: int
    c: int
    P: int
    N: int
    Q: int
    f: int
    r: int
    a: int
    q: int
    B: int
    sp: bool
    tied: bool
    sharded: bool
    by_document: bool
    first: int
    last: int

    def value(self, formula: str) -> float:
        """What a formula or a condition amounts to here."""
        cut = math.lcm(128, self.dp * self.cp)
        names = {name: getattr(self, name) for name in self.__dataclass_fields__}
        names |= {"n": self.b * self.s // self.cp, "l": self.L // self.pp, "t": self.tp if self.sp else 1}
        names |= {"ceil": math.ceil, "pad": lambda x: -(-x // cut) * cut}
        return eval(formula, {"__builtins__": {}}, names)

    def ranks(self, group: str) -> int:
        """Of one group of this kind."""
        return math.prod(int(getattr(self, name)) for name in _RANKS[group])


_RANKS = {
    "tp": ("tp",),
    "pp": ("pp",),
    "cp": ("cp",),
    "dp": ("dp",),
    "dp cp": ("dp", "cp"),
    "tp pp": ("tp", "pp"),
    "all": ("tp", "pp", "cp", "dp"),
    "first and last of pp": ("pp",),
}


@dataclass(frozen=True)
class Row:
    """One kind of call in a step."""

    part: str
    """What it is there for; `parts` says which a step has."""
    way: Literal["forward", "backward", "step"]
    group: str
    operation: str
    bytes: str
    """What one rank hands in: its part of what is gathered, the whole of what is reduced."""
    count: str
    """A step, on a rank."""
    when: str = "True"
    caller: str = OURS


@dataclass(frozen=True)
class Collective:
    """A `Row` with numbers."""

    caller: str
    group: str
    operation: str
    bytes: int
    count: int
    way: str = dataclasses.field(compare=False, default="step")
    part: str = dataclasses.field(compare=False, default="")


def _of_layers() -> Iterable[Row]:
    """Megatron-Core's tensor parallelism: two regions a layer, the embedding, the head."""
    one, whole = "n/tp*h*z", "n*h*z"
    yield Row("layers", "forward", "tp", "all-gather", one, "2*l*m*r", "sp", MEGATRON)
    yield Row("layers", "forward", "tp", "reduce-scatter", whole, "2*l*m*r", "sp", MEGATRON)
    yield Row("layers", "backward", "tp", "all-gather", one, "4*l*m", "sp", MEGATRON)
    yield Row("layers", "backward", "tp", "reduce-scatter", whole, "2*l*m", "sp", MEGATRON)
    yield Row("layers", "forward", "tp", "all-reduce", whole, "2*l*m*r", "not sp", MEGATRON)
    yield Row("layers", "backward", "tp", "all-reduce", whole, "2*l*m", "not sp", MEGATRON)
    yield Row("layers", "forward", "tp", "reduce-scatter", whole, "first*m", "sp", MEGATRON)
    yield Row("layers", "backward", "tp", "all-gather", one, "first*m", "sp", MEGATRON)
    yield Row("layers", "forward", "tp", "all-reduce", whole, "first*m", "not sp", MEGATRON)
    for way, operation in (("forward", "send"), ("backward", "receive")):
        yield Row("layers", way, "pp", operation, "n/t*h*z", "m*(V - last)", "True", MEGATRON)  # type: ignore[arg-type]
    for way, operation in (("forward", "receive"), ("backward", "send")):
        yield Row("layers", way, "pp", operation, "n/t*h*z", "m*(V - first)", "True", MEGATRON)  # type: ignore[arg-type]
    yield Row("layers", "forward", "cp", "all-gather", "n*kv/tp*z", "2*l*m*a", "True", MEGATRON)
    yield Row("layers", "backward", "cp", "reduce-scatter", "n*cp*kv/tp*z", "2*l*m", "True", MEGATRON)


def _of_losses() -> Iterable[Row]:
    """The head and the loss on the last stage."""
    one, whole, record = "n/tp*h*z", "n*h*z", "n*(28 + k*z)"
    yield Row("reward_shaped", "forward", "tp", "all-gather", record, "last*m")
    for part in ("reward_shaped", "megatron"):
        yield Row(part, "forward", "tp", "all-gather", one, "last*m", "sp", MEGATRON)
        yield Row(part, "backward", "tp", "all-gather", one, "last*m", "sp", MEGATRON)
        yield Row(part, "backward", "tp", "reduce-scatter", whole, "last*m", "sp", MEGATRON)
        yield Row(part, "backward", "tp", "all-reduce", whole, "last*m", "not sp", MEGATRON)
    yield Row("megatron", "forward", "tp", "all-reduce", "4*n", "3*last*m", "True", MEGATRON)
    yield Row("linear", "forward", "tp", "all-gather", record, "last*m")
    yield Row("linear", "forward", "tp", "all-gather", one, "last*m", "sp")
    yield Row("linear", "backward", "tp", "all-gather", one, "last*m", "sp")
    yield Row("linear", "backward", "tp", "reduce-scatter", "4*n*h", "last*m", "sp")
    yield Row("linear", "backward", "tp", "all-reduce", "4*n*h", "last*m", "not sp")
    yield Row("linear, gradients in the forward", "forward", "tp", "all-gather", "c*(28 + k*z)", "last*m*ceil(n/c)")
    yield Row("linear, gradients in the forward", "forward", "tp", "all-gather", one, "last*m", "sp")
    yield Row("linear, gradients in the forward", "forward", "tp", "reduce-scatter", "4*n*h", "last*m", "sp")
    yield Row("linear, gradients in the forward", "forward", "tp", "all-reduce", "4*n*h", "last*m", "not sp")


def _of_weights() -> Iterable[Row]:
    """Weights of tokens on the last stage; the forward of a reference that runs along comes on top."""
    yield Row("remit", "forward", "cp", "all-reduce", "16*b", "last*m", "not by_document")
    yield Row("remit", "forward", "cp", "all-reduce", "16*b*s", "last*m", "by_document")
    yield Row("remit", "forward", "cp", "all-gather", "8*n", "last*m", "by_document")
    yield Row("rho1", "forward", "cp", "all-gather", "16*n", "last*m")
    yield Row("rho1", "forward", "cp", "all-gather", "8*n", "last*m", "by_document")


def _of_step() -> Iterable[Row]:
    """Once a step."""
    yield Row("update", "step", "dp cp", "reduce-scatter", "4*pad(P)", "1", "sharded", MEGATRON)
    yield Row("update", "step", "dp cp", "all-gather", "z*pad(P)/(dp*cp)", "1", "sharded", MEGATRON)
    yield Row("update", "step", "dp cp", "all-reduce", "4*P", "1", "not sharded", MEGATRON)
    yield Row("update", "step", "tp", "all-reduce", "4*N", "1", "sp", MEGATRON)
    yield Row("update", "step", "tp", "all-reduce", "4*Q", "1", "not sp", MEGATRON)
    tied = "tied and (first or last)"
    yield Row("update", "step", "first and last of pp", "all-reduce", "4*v/tp*h", "1", tied, MEGATRON)
    yield Row("update", "step", "pp", "broadcast", "4", "1", "True", MEGATRON)
    yield Row("update", "step", "dp cp", "all-reduce", "4", "1", "True", MEGATRON)
    yield Row("update", "step", "all", "all-reduce", "4", "1", "sharded", MEGATRON)
    yield Row("update", "step", "tp pp", "all-reduce", "4", "1", "not sharded", MEGATRON)
    for group in ("dp cp", "pp"):
        yield Row("log", "step", group, "all-reduce", "4*f", "1")
    for group in ("dp", "pp"):
        yield Row("log of rl", "step", group, "all-reduce", "96", "1")
        yield Row("log of rl", "step", group, "all-reduce", "16", "1")
    yield Row("signals", "step", "all", "all-reduce", "2", "1")


def _of_generation() -> Iterable[Row]:
    """For each token that B responses grow by."""
    yield Row("generate", "forward", "tp", "all-reduce", "B*h*z", "2*l")
    yield Row("generate", "forward", "tp", "all-reduce", "B*h*z", "1", "first", MEGATRON)
    yield Row("generate", "forward", "tp", "all-gather", "B*v/tp*z", "1", "last", MEGATRON)
    yield Row("generate", "forward", "pp", "send", "B*h*z", "1", "not last")
    yield Row("generate", "forward", "pp", "receive", "B*h*z", "1", "not first")
    yield Row("generate", "step", "pp", "broadcast", "16*B", "1")


ROWS = tuple(row for rows in (_of_layers, _of_losses, _of_weights, _of_step, _of_generation) for row in rows())


def parts(stage: Stage, config: RunConfig) -> set[str]:
    """The parts of ROWS that a step of `stage` has; of `score`, one microbatch after the other, no update."""
    model = {"layers", implementation(config.loss)}
    if stage == "score":
        return model
    weighting = config.remit.weighting if isinstance(config, PretrainConfig) else "none"
    return model | {"update", "signals", "log of rl" if stage == "rl" else "log"} | ({weighting} - {"none"})


def collectives(sizes: Sizes, parts: set[str], *, forward_only: bool = False) -> list[Collective]:
    """The rows of `parts` on the rank that `sizes` describes, but for groups of one rank, where nothing moves."""
    found = []
    for row in ROWS:
        if row.part not in parts or (forward_only and row.way == "backward") or not sizes.value(row.when):
            continue
        size, count = sizes.value(row.bytes), sizes.value(row.count)
        if count and sizes.ranks(row.group) > 1:
            found.append(Collective(row.caller, row.group, row.operation, int(size), int(count), row.way, row.part))
    return found


def sizes_of(
    config: RunConfig, layout: Layout, padded_vocab: int, ffn: int, *, stage: Stage = "pretrain", place: int = -1
) -> Sizes:
    """The values of SYMBOLS on a rank of pipeline stage `place`, negative from the end.

    Raises InputError for a model that the formulas leave out: experts, multi-token prediction, uneven stages.
    """
    model, parallel = config.model, config.parallel
    for name in ("num_moe_experts", "mtp_num_layers", "pipeline_model_parallel_layout"):
        if getattr(model, name, None):
            raise InputError(f"model.{name} is {getattr(model, name)}; the formulas of collectives know no such model")
    remit = config.remit if isinstance(config, PretrainConfig) else RemitConfig()
    place %= parallel.pp
    count = count_parameters(model, padded_vocab, ffn)
    own = parameters_of_stage(count, parallel, place)
    tokens = config.train.micro_batch * config.data.seq_length // parallel.cp
    head_width = model.kv_channels or model.hidden_size // model.num_attention_heads
    recomputes = getattr(model, "recompute_granularity", None) if stage != "score" else None
    return Sizes(
        s=config.data.seq_length,
        b=config.train.micro_batch,
        h=model.hidden_size,
        v=padded_vocab,
        L=model.num_layers,
        tp=parallel.tp,
        pp=parallel.pp,
        V=parallel.vpp or 1,
        cp=parallel.cp,
        dp=layout.dp,
        m=layout.num_microbatches,
        k=1 if stage in ("score", "rl") else config.loss.top_k,
        z=2 if config.train.precision == "bf16" else 4,
        q=model.num_attention_heads * head_width,
        kv=(model.num_query_groups or model.num_attention_heads) * head_width,
        c=min(config.loss.chunk_tokens, tokens),
        P=own.total,
        N=own.norms,
        Q=own.query_key_norms,
        f={"none": 7, "remit": 23 if remit.epsilon else 11, "rho1": 11}[remit.weighting],
        r=2 if recomputes == "full" else 1,
        a=2 if recomputes else 1,
        B=0,
        sp=parallel.sequence_parallel,
        tied=model.share_embeddings_and_output_weights,
        sharded=parallel.distributed_optimizer,
        by_document=remit.center == "document",
        first=int(place == 0),
        last=int(place == parallel.pp - 1),
    )
