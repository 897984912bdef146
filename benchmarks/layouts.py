"""Tables of docs/scaling.md: the formulas of collectives and heads, and the predicted memory and step time of layouts.

    python benchmarks/layouts.py            # print them
    python benchmarks/layouts.py --write    # put them into docs/scaling.md

Nothing is measured and nothing is built: arithmetic of megatron_ptrl/training/{plan,collectives,head_costs,prediction}.
"""

import argparse
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megatron_ptrl.training import host

host.install_if_no_cuda()

from megatron_ptrl.cli import parse  # noqa: E402
from megatron_ptrl.config import PretrainConfig, RLConfig  # noqa: E402
from megatron_ptrl.training import collectives, mcore  # noqa: E402
from megatron_ptrl.training.head_costs import HEADS  # noqa: E402
from megatron_ptrl.training.layout import Layout, check_layout  # noqa: E402
from megatron_ptrl.training.plan import GIB, count_parameters, memory_per_rank, reference_memory  # noqa: E402
from megatron_ptrl.training.prediction import PARTS, Prediction, fits, predict, predict_generation  # noqa: E402

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
# The shapes of Llama-3.2-1B, Llama-3.1-8B and -70B, from their public config.json.
VOCAB, SEQ_LENGTH, ROWS = 128256, 8192, 512
MODELS: dict[str, dict[str, Any]] = {
    "1B": {"num_layers": 16, "hidden_size": 2048, "num_attention_heads": 32, "ffn_hidden_size": 8192},
    "8B": {"num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "ffn_hidden_size": 14336},
    "70B": {"num_layers": 80, "hidden_size": 8192, "num_attention_heads": 64, "ffn_hidden_size": 28672},
}
Settings = dict[str, Any]
FULL: Settings = {
    "model.recompute_granularity": "full",
    "model.recompute_method": "uniform",
    "model.recompute_num_layers": 1,
}


def parallel(overlap: bool = True, **sizes: int) -> Settings:
    """Settings of a layout; sequence parallelism with tp."""
    switches = {"sequence_parallel": sizes.get("tp", 1) > 1}
    switches |= {"overlap_grad_reduce": overlap, "overlap_param_gather": overlap}
    return {f"parallel.{name}": value for name, value in (sizes | switches).items()}


LAYOUTS: list[tuple[str, int, Settings]] = [
    *(("1B", gpus, parallel()) for gpus in (1, 8, 64, 512)),
    ("8B", 1, parallel() | FULL),
    *(("8B", gpus, parallel(tp=2)) for gpus in (8, 64, 512)),
    ("70B", 1, parallel() | FULL),
    ("70B", 8, parallel(tp=8) | FULL),
    *(("70B", gpus, parallel(tp=8, pp=4, vpp=5)) for gpus in (64, 512)),
]

SHAPED: Settings = {"loss.beta": -0.25, "loss.lambda_head": 0.1, "loss.lambda_tail": -0.1, "loss.top_k": 100}
LINEAR = SHAPED | {"loss.impl": "linear"}
SIDECAR = SHAPED | {"remit.weighting": "remit", "remit.sidecar": ["scored"]}
ONLINE = SHAPED | {"remit.weighting": "remit", "remit.reference": "runs/reference"}
VARIANTS: list[tuple[str, Settings]] = [
    ("Megatron-Core's cross entropy, unfused", {"loss.impl": "megatron"}),
    ("reward_shaped, all rewards 0", {}),
    ("reward_shaped, rewards and k = 100", SHAPED),
    ("linear", LINEAR),
    ("linear, 8192 tokens a chunk", LINEAR | {"loss.chunk_tokens": 8192}),
    ("linear, gradients in the forward", LINEAR | {"loss.recompute_logits": False}),
    ("ReMiT from a side-car", SIDECAR),
    ("ReMiT from a side-car by document", SIDECAR | {"remit.center": "document"}),
    ("ReMiT online, reference of 8B", ONLINE),
    ("ReMiT online, reference of 1B", ONLINE),
    ("attention recomputed", SHAPED | {"model.recompute_granularity": "selective"}),
    ("layers recomputed", SHAPED | FULL),
    ("gradients and weights not overlapped", SHAPED | parallel(overlap=False, tp=2)),
    ("one rank holds the model, layers recomputed", SHAPED | parallel() | FULL),
    ("pp 2, vpp 4 x tp 1, layers recomputed", SHAPED | parallel(pp=2, vpp=4) | FULL),
    ("cp 2 x tp 1", SHAPED | parallel(cp=2)),
]


@functools.cache
def _defaults() -> PretrainConfig:
    """With the fields of Megatron-Core, which only parsing brings."""
    return parse(PretrainConfig, [], prog="ptrl pretrain")


def configured(model: str, gpus: int, settings: Settings) -> tuple[PretrainConfig, Layout]:
    """`ptrl pretrain`'s config of a model, 512 rows of 8192 tokens a step, and its layout on `gpus`."""
    whole = {f"model.{name}": value for name, value in MODELS[model].items()} | {
        "model.num_query_groups": 8,
        "model.qk_layernorm": False,
        "model.share_embeddings_and_output_weights": model == "1B",
        "data.seq_length": SEQ_LENGTH,
        "train.global_batch": ROWS,
        "train.micro_batch": 1,
        "train.precision": "bf16",
    }
    parts: dict[str, Settings] = {}
    for name, value in (whole | settings).items():
        part, _, field = name.partition(".")
        parts.setdefault(part, {})[field] = value
    defaults = _defaults()
    changed = {part: dataclasses.replace(getattr(defaults, part), **values) for part, values in parts.items()}
    config = dataclasses.replace(defaults, **changed)
    return config, check_layout(config, gpus)


def table(header: list[str], rows: Iterable[Iterable[Any]]) -> str:
    """Markdown; columns of numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    number = [all(re.match(r"^[-~]?[\d,.]+( %| \(.*\))?$|^-$|^$", row[i]) for row in cells) for i in range(len(header))]
    rule = ["---:" if right else "---" for right in number]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *cells])


def symbols() -> str:
    """What the letters mean."""
    return table(["symbol", "meaning"], collectives.SYMBOLS.items())


def calls(ours: bool) -> str:
    """Every row of the formulas, ours or Megatron-Core's."""
    rows = [
        (row.part, row.way, row.group, row.operation, f"`{row.bytes}`", f"`{row.count}`", _when(row.when))
        for row in collectives.ROWS
        if (row.caller == collectives.OURS) == ours
    ]
    return table(["part", "in", "over", "call", "bytes of a rank", "calls", "where"], rows)


def _when(condition: str) -> str:
    words = {"sp": "sequence parallel", "sharded": "distributed optimizer", "by_document": "`remit.center` document"}
    for name, text in words.items():
        condition = re.sub(rf"\b{name}\b", text, condition)
    return "" if condition == "True" else condition


def heads() -> str:
    """What each head computes, moves and keeps."""
    rows = [
        (name, h.products, *(f"`{x}`" for x in (h.loss_forward, h.loss_backward, h.sums, h.kept, h.peak)))
        for name, h in HEADS.items()
    ]
    return table(["head", "products", "loss, forward", "loss, backward", "gradient of weight", "kept", "peak"], rows)


def layouts() -> str:
    """Memory and step time of every model on every number of GPUs."""
    rows = []
    for model, gpus, settings in LAYOUTS:
        config, layout = configured(model, gpus, SHAPED | settings)
        ffn = mcore.ffn_size(config.model)
        parts = memory_per_rank(config, layout, count_parameters(config.model, VOCAB, ffn), VOCAB)
        gib = {name: size / GIB for name, size in parts.items()}
        p = config.parallel
        shape = f"tp {p.tp} pp {p.pp}" + (f" vpp {p.vpp}" if p.vpp else "") + f" dp {layout.dp}"
        shape += ", layers recomputed" if settings.items() >= FULL.items() else ""
        state = f"{gib['weights']:.1f} + {gib['gradients']:.1f} + {gib['optimizer']:.1f}"
        memory = (state, f"{gib['activations']:.1f}", f"{gib['logits']:.1f}", f"{sum(gib.values()):.1f}")
        if not fits(config, layout, VOCAB, ffn):
            rows.append((model, gpus, shape, layout.num_microbatches, *memory, "does not fit", "", "", "", ""))
            continue
        found = predict(config, layout, VOCAB, ffn)
        rows.append((model, gpus, shape, layout.num_microbatches, *memory, *_times(found)))
    header = ["model", "GPUs", "layout", "m", "weights + gradients + optimizer", "activations", "logits", "GiB in all"]
    return table([*header, "bubble", "communication", "s a step", "tokens/s a GPU", "MFU"], rows)


def _times(found: Prediction) -> tuple[str, ...]:
    talk = sum(found.seconds.get(name, 0.0) for name in ("tp", "cp", "pp", "dp"))
    shares = (found.seconds["bubble"] / found.step, talk / found.step)
    return (
        *(f"{100 * share:.1f} %" for share in shares),
        f"{found.step:.2f}",
        f"{found.tokens_per_gpu:,.0f}",
        f"{100 * found.mfu:.1f} %",
    )


def variants() -> str:
    """8B on 512 GPUs, with and without each part."""
    shown = [name for name in PARTS if name != "cp"]
    rows = []
    for name, settings in VARIANTS:
        own = any(key.startswith("parallel.") for key in settings)
        config, layout = configured("8B", 512, settings if own else parallel(tp=2) | settings)
        ffn = mcore.ffn_size(config.model)
        parts = memory_per_rank(config, layout, count_parameters(config.model, VOCAB, ffn), VOCAB)
        reference = None
        if config.remit.online:
            reference = _reference(config, "8B" if "8B" in name else "1B")
            parts["reference"] = reference_memory(reference, layout, VOCAB, mcore.ffn_size(reference.model))
        found = predict(config, layout, VOCAB, ffn, reference=reference)
        seconds = {**found.seconds, "tp": found.seconds["tp"] + found.seconds["cp"]}
        times = [f"{1e3 * seconds[part]:.1f}" if seconds.get(part) else "-" for part in shown]
        gib = sum(parts.values()) / GIB
        rows.append((name, *times, f"{1e3 * found.step:.0f}", f"{found.tokens_per_gpu:,.0f}", f"{gib:.1f}"))
    return table(["8B on 512 GPUs, ms", *(_HEADINGS.get(n, n) for n in shown), "step", "tokens/s a GPU", "GiB"], rows)


_HEADINGS = {"tp": "tp, cp"}


def _reference(config: PretrainConfig, model: str) -> PretrainConfig:
    its, _ = configured(model, 512, {})
    loss = dataclasses.replace(config.loss, beta=0.0, lambda_head=0.0, lambda_tail=0.0, top_k=1)
    return dataclasses.replace(config, model=its.model, loss=loss, remit=its.remit)


def stages() -> str:
    """The other stages of 8B on 512 GPUs."""
    rows = []
    config, layout = configured("8B", 512, SHAPED | parallel(tp=2))
    ffn = mcore.ffn_size(config.model)
    for name, stage in (("pretrain, sft", "pretrain"), ("score", "score")):
        found = predict(config, layout, VOCAB, ffn, stage=stage)  # type: ignore[arg-type]
        rows.append((name, f"{found.tokens:,} tokens", f"{found.step:.2f}", f"{found.tokens_per_gpu:,.0f}"))
    # Qwen3-8B as in RLPT: 512 prompts of 8 responses, every one of them written to its full length.
    example = Path(__file__).parents[1] / "examples" / "configs" / "rlpt-qwen3-8b.yaml"
    rl = parse(RLConfig, [f"--config={example}"], prog="ptrl rl")
    dp = 512 // rl.parallel.tp
    responses = rl.rollout.prompts * rl.rollout.samples
    full = Layout(512, dp, responses // dp)
    vocab, ffn = rl.model.make_vocab_size_divisible_by, mcore.ffn_size(rl.model)
    update = predict(rl, full, vocab, ffn, stage="rl")
    generation = predict_generation(rl, full, vocab, ffn)
    of = f"{responses:,} rows of {rl.data.seq_length:,}"
    rows.append(("rl, update", of, f"{update.step:.2f}", f"{update.tokens_per_gpu:,.0f}"))
    written = responses * rl.rollout.max_tokens
    of = f"{written:,} tokens, {rl.rollout.batch} responses at a time, at most {responses // dp} here"
    rows.append(("rl, responses", of, f"{generation:.1f}", f"{written / generation / 512:,.0f}"))
    return table(["stage, on 512 GPUs", "of a step", "s", "tokens/s a GPU"], rows)


SECTIONS: dict[str, Callable[[], str]] = {
    "symbols": symbols,
    "our calls": lambda: calls(ours=True),
    "Megatron-Core's calls": lambda: calls(ours=False),
    "heads": heads,
    "layouts": layouts,
    "variants": variants,
    "stages": stages,
}


def filled(page: str) -> str:
    """The page with each of SECTIONS between its marks."""
    for name, make in SECTIONS.items():
        begin, end = f"<!-- made by benchmarks/layouts.py: {name} -->", "<!-- end -->"
        before, found, rest = page.partition(begin)
        assert found and end in rest, f"{name} has no place in the page"
        page = f"{before}{begin}\n{make()}\n{end}{rest.partition(end)[2]}"
    return page


def main() -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    if parser.parse_args().write:
        PAGE.write_text(filled(PAGE.read_text()))
    else:
        print("\n\n".join(f"{name}\n\n{make()}" for name, make in SECTIONS.items()))


if __name__ == "__main__":
    main()
