"""A layout and a machine -> how long a step should take, part by part. Arithmetic, not a measurement.

    collectives, head_costs, plan  --Machine's published figures, Assumed shares of them-->  Prediction

Nothing overlaps unless the config says so: every call over tensor-, context- and pipeline-parallel ranks is waited for.
"""

import dataclasses
from dataclasses import dataclass

from megatron_ptrl.config import PretrainConfig, RLConfig, RunConfig
from megatron_ptrl.training import collectives as calls
from megatron_ptrl.training.collectives import Collective, Sizes, Stage
from megatron_ptrl.training.head_costs import HEADS, implementation
from megatron_ptrl.training.layout import Layout
from megatron_ptrl.training.plan import count_parameters, memory_per_rank


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A GPU and its links, by its maker's figures; bytes/s one way."""

    name: str
    flops: float
    """Of bf16 without sparsity, a second."""
    memory: float
    memory_bandwidth: float
    node_link: float
    network: float
    node: int
    """GPUs that `node_link` joins."""


H100 = Machine(
    name="H100 SXM",
    flops=989e12,
    memory=80e9,
    memory_bandwidth=3.35e12,
    node_link=900e9 / 2,
    network=400e9 / 8,
    node=8,
)
"""https://www.nvidia.com/en-us/data-center/h100/: 1,979 TFLOP/s of bf16 with sparsity, half of that without; 80 GB;
3.35 TB/s; NVLink 900 GB/s, both ways together. The network is one 400 Gb/s adapter a GPU, as in a DGX H100."""


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """What is reached of a machine's figures: assumptions, nothing of it measured."""

    flops: float = 0.55
    """Share of the layers and the head, with the element-wise work between the products."""
    memory_bandwidth: float = 0.9
    links: float = 0.8
    latency: float = 20e-6
    """Seconds of a call, whatever its size."""
    usable_memory: float = 0.9
    """The rest goes to the CUDA context, communication buffers and fragmentation."""


ASSUMED = Assumed()


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step by part, in the order of `PARTS`."""

    seconds: dict[str, float]
    tokens: int
    flops: float
    """Of the model, without recomputation, over all GPUs."""
    gpus: int
    peak: float

    @property
    def step(self) -> float:
        """Seconds."""
        return sum(self.seconds.values())

    @property
    def tokens_per_gpu(self) -> float:
        """Tokens a second and GPU."""
        return self.tokens / self.step / self.gpus

    @property
    def mfu(self) -> float:
        """Model FLOPs over those that the GPUs could do in that time."""
        return self.flops / (self.step * self.gpus * self.peak)


PARTS = {
    "layers": "products and attention of the layers, with recomputation",
    "head": "products of the head",
    "loss": "the loss's and the head's reads and writes of logits and gradients",
    "tp": "calls over tensor-parallel ranks",
    "cp": "calls over context-parallel ranks",
    "pp": "sends between stages",
    "bubble": "stages that wait for the first and the last microbatch",
    "dp": "reduction of gradients, gathering of weights",
    "optimizer": "AdamW's reads and writes",
    "reference": "the forward of ReMiT's online reference, with its own bubble and calls",
}


def predict(
    config: RunConfig,
    layout: Layout,
    padded_vocab: int,
    ffn: int,
    *,
    stage: Stage = "pretrain",
    reference: PretrainConfig | None = None,
    machine: Machine = H100,
    assumed: Assumed = ASSUMED,
) -> Prediction:
    """One step of `stage`; of `score` the forward of as many rows.

    reference: the config of an online reference, in the layout of the run; same vocabulary, its own MLP as configured
    Raises InputError as `collectives.sizes_of` does.
    """
    forward_only = stage == "score"
    sizes = calls.sizes_of(config, layout, padded_vocab, ffn, stage=stage)
    parts = calls.parts(stage, config)
    found = calls.collectives(sizes, parts, forward_only=forward_only)
    times = _Times(sizes, machine, assumed)
    seconds = times.passes(config, found, padded_vocab, ffn, forward_only=forward_only)
    if not forward_only:
        microbatch = sum(seconds[name] for name in ("layers", "head", "loss", "tp", "cp")) / sizes.m
        seconds["dp"] = _exposed(config, times, found, microbatch)
        seconds["optimizer"] = times.update()
    if reference is not None:
        its_ffn = reference.model.ffn_hidden_size or ffn
        its = calls.sizes_of(reference, layout, padded_vocab, its_ffn, stage="score")
        its_calls = calls.collectives(its, calls.parts("score", reference), forward_only=True)
        its_times = _Times(its, machine, assumed)
        passes = its_times.passes(reference, its_calls, padded_vocab, its_ffn, forward_only=True)
        seconds["reference"] = sum(passes.values())
    rows = sizes.b * sizes.m * sizes.dp
    count = count_parameters(config.model, padded_vocab, ffn)
    products = count.num_layers * (count.per_layer_dense - count.per_layer_norms) + padded_vocab * sizes.h
    # Two for a multiply-add; half of the keys lie ahead. Backward: twice the forward.
    a_token = 2 * products + 2 * sizes.s * sizes.q * sizes.L
    flops = (1 if forward_only else 3) * a_token * rows * sizes.s
    ordered = {name: seconds[name] for name in PARTS if name in seconds}
    return Prediction(ordered, rows * sizes.s, flops, layout.world_size, machine.flops)


def _exposed(config: RunConfig, times: "_Times", found: list[Collective], microbatch: float) -> float:
    """Seconds of the data-parallel calls, less what a backward or a forward of one microbatch covers where asked to."""
    parallel, total = config.parallel, 0.0
    for one in found:
        if one.part != "update" or one.group != "dp cp":
            continue
        time = times.call(one)
        if one.operation == "all-gather" and parallel.overlap_param_gather:
            time = max(0.0, time - microbatch / 3)
        elif one.operation != "all-gather" and parallel.overlap_grad_reduce:
            time = max(0.0, time - microbatch * 2 / 3)
        total += time
    return total


class _Times:
    """Seconds on the last stage, which has the head."""

    def __init__(self, sizes: Sizes, machine: Machine, assumed: Assumed) -> None:
        self._sizes, self._machine = sizes, machine
        self._latency = assumed.latency
        self._flops = machine.flops * assumed.flops
        self._memory = machine.memory_bandwidth * assumed.memory_bandwidth
        self._node_link, self._network = machine.node_link * assumed.links, machine.network * assumed.links

    def passes(
        self, config: RunConfig, found: list[Collective], padded_vocab: int, ffn: int, *, forward_only: bool
    ) -> dict[str, float]:
        """All microbatches through the layers and the head, and the bubble."""
        sizes, head = self._sizes, HEADS[implementation(config.loss)]
        count = count_parameters(config.model, padded_vocab, ffn)
        n, layers = sizes.b * sizes.s // sizes.cp, sizes.L // sizes.pp
        products = layers * (count.per_layer_dense - count.per_layer_norms) / sizes.tp
        linear, attention = 2 * n * products, 2 * n * sizes.s * sizes.q / sizes.tp * layers
        backward = 0 if forward_only else 2
        repeated = (1 if forward_only else sizes.r, 1 if forward_only else sizes.a)
        of_layers = (repeated[0] + backward) * linear + (repeated[1] + backward) * attention
        moved = sizes.value(head.loss_forward)
        if not forward_only:
            moved += sizes.value(head.loss_backward) + sizes.value(head.sums)
        heads = 2 * n * sizes.h * sizes.v / sizes.tp * (1 if forward_only else head.products)
        seconds = {"layers": sizes.m * of_layers / self._flops, "head": sizes.m * heads / self._flops}
        seconds["loss"] = sizes.m * moved / self._memory
        for group in ("tp", "cp"):
            seconds[group] = sum(self.call(one) for one in found if one.group == group and one.part != "update")
        ways = [[one for one in found if one.operation == name] for name in ("send", "receive")]
        seconds["pp"] = max(sum(self.call(one) for one in way) for way in ways)
        region = sum(self.call(one) for one in found if one.group in ("tp", "cp") and one.part == "layers")
        seconds["bubble"] = (sizes.pp - 1) / sizes.V * (seconds["layers"] + region) / sizes.m
        return seconds

    def call(self, one: Collective) -> float:
        """Of all calls of this kind: a ring over the slowest link, and the latency of each."""
        ranks = self._sizes.ranks(one.group)
        factors = {
            "all-gather": ranks - 1,
            "reduce-scatter": (ranks - 1) / ranks,
            "all-reduce": 2 * (ranks - 1) / ranks,
        }
        return one.count * (self._latency + factors.get(one.operation, 1) * one.bytes / self._link(one.group))

    def _link(self, group: str) -> float:
        """Bytes/s out of a rank. Ranks are numbered in the order tp, cp, dp, pp; nodes hold them in that order.

        Where a group goes over nodes, each of its ranks in a node brings its network adapter, and a ring of its own.
        """
        sizes = self._sizes
        model = sizes.tp * sizes.cp
        stride, ranks = {
            "tp": (1, sizes.tp),
            "cp": (sizes.tp, sizes.cp),
            "dp": (model, sizes.dp),
            "dp cp": (sizes.tp, sizes.cp * sizes.dp),
            "all": (1, model * sizes.dp * sizes.pp),
        }.get(group, (model * sizes.dp, sizes.pp))
        if stride * ranks <= self._machine.node:
            return self._node_link
        return min(max(self._machine.node // stride, 1) * self._network, self._node_link)

    def update(self) -> float:
        """Gradient, weight and two moments in fp32 read, the last three written, the weight in its own dtype."""
        sizes = self._sizes
        mine = sizes.P / (sizes.dp * sizes.cp if sizes.sharded else 1)
        return mine * (28 + sizes.z) / self._memory

    def generation(self, tokens: float, cache: float, weights: float) -> float:
        """Seconds to write `tokens` for each of B responses, reading `weights` and `cache` bytes for each of them."""
        sizes = self._sizes
        # All stages in turn; what goes from one to the next is small beside a region's calls.
        found = calls.collectives(dataclasses.replace(sizes, pp=1, first=1, last=1), {"generate"})
        return tokens * ((weights + cache) / self._memory + sum(self.call(one) for one in found))


def fits(config: RunConfig, layout: Layout, padded_vocab: int, ffn: int, machine: Machine = H100) -> bool:
    """Whether `plan.memory_per_rank` is within what is assumed to be usable of the machine's memory."""
    count = count_parameters(config.model, padded_vocab, ffn)
    needed = sum(memory_per_rank(config, layout, count, padded_vocab).values())
    return needed <= ASSUMED.usable_memory * machine.memory


def predict_generation(
    config: RLConfig, layout: Layout, padded_vocab: int, ffn: int, machine: Machine = H100, assumed: Assumed = ASSUMED
) -> float:
    """Seconds in which `ptrl rl`'s own engine writes the responses of a step, all of them of full length.

    Every token reads the weights of all stages, one after the other, and half of the longest KV cache.
    """
    from megatron_ptrl.training.rl_plan import kv_cache_bytes

    sizes = calls.sizes_of(config, layout, padded_vocab, ffn, stage="rl")
    responses = config.rollout.prompts * config.rollout.samples / layout.dp
    batch = int(min(config.rollout.batch, responses))
    count = count_parameters(config.model, padded_vocab, ffn)
    weights = sizes.z * count.total / sizes.tp
    cache = kv_cache_bytes(config) * sizes.pp / 2 * batch / min(config.rollout.batch, responses * layout.dp)
    times = _Times(dataclasses.replace(sizes, B=batch), machine, assumed)
    return times.generation(responses / batch * config.rollout.max_tokens, cache, weights)
