"""Tokens a second of the megatron engine against Hugging Face's `generate`, with one Llama's weights in both.

    python benchmarks/rollout.py [--batch 32] [--prompt 128] [--tokens 128] [--rounds 3] [--output FILE.json]

"alike": prompts and responses of equal lengths. "ragged": lengths that differ; a batch of `generate` ends with its
longest response. "groups": ragged, and 8 responses to each prompt, as in reinforcement; `generate` reads a prompt for
each of them, the engine once. Both draw at temperature 1, in the same precision, in turn. Tokens are those asked for.
The ratio is of processor seconds on a CPU, where other work on the machine does not count, and of the clock on a GPU.
"""

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megatron_ptrl.training import host

host.install_if_no_cuda()

import torch  # noqa: E402
import transformers  # noqa: E402

from megatron_ptrl.config import DataConfig, ModelConfig, PretrainConfig, TrainConfig  # noqa: E402
from megatron_ptrl.rollout.engine import Request  # noqa: E402
from megatron_ptrl.rollout.megatron_engine import MegatronEngine  # noqa: E402
from megatron_ptrl.training import mcore  # noqa: E402
from megatron_ptrl.training.runlog import environment  # noqa: E402

GROUP = 8
HUGGING_FACE, MEGATRON = "Hugging Face generate", "megatron engine"


def main() -> None:
    """Print a table and, when asked, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32, help="rows of a forward pass")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the longest prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of the longest response")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="bf16" if torch.cuda.is_available() else "fp32"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    config = PretrainConfig(
        model=ModelConfig(
            num_layers=arguments.layers,
            hidden_size=arguments.hidden,
            num_attention_heads=arguments.hidden // 64,
            num_query_groups=max(arguments.hidden // 128, 1),
            qk_layernorm=False,
            share_embeddings_and_output_weights=False,
        ),
        data=DataConfig(seq_length=arguments.prompt + arguments.tokens),
        train=TrainConfig(precision=arguments.precision),
    )
    mcore.initialize(config)
    chunks = mcore.build_model(config, arguments.vocab)
    llama = llama_of(config, chunks[0], arguments.vocab)
    device = next(llama.parameters()).device
    # Neither model may end a response by itself.
    engine = MegatronEngine(config, chunks, eod=-1, vocab_size=arguments.vocab, batch=arguments.batch)
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    far = farthest_logits(chunks[0], llama, arguments.vocab, device)
    others = ThreadPoolExecutor(1)
    results = []
    for case in ("alike", "ragged", "groups"):
        requests = make_requests(arguments, case)
        runs: dict[str, Callable[[], Any]] = {
            # In a thread of its own, which training/host.py's redirection does not slow down.
            HUGGING_FACE: lambda requests=requests: others.submit(
                hugging_face, llama, requests, arguments.batch, device
            ).result(),
            MEGATRON: lambda requests=requests: engine.generate(requests, temperature=1.0, top_p=1.0),
        }
        tokens = sum(request.max_tokens for request in requests)
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(arguments.rounds + 1):
            for name, run in runs.items():
                start = clock()
                run()
                if number:  # the first round warms up
                    rates[name].append(tokens / (clock() - start))
        median = {name: statistics.median(rate) for name, rate in rates.items()}
        results.append({"case": case, "tokens": tokens, "tokens_per_second": median, "rounds": rates})
    report(arguments, results, far)
    mcore.shutdown()


def make_requests(arguments: argparse.Namespace, case: str) -> list[Request]:
    """One batch that is alike, or four whose prompts and responses are from a quarter of the longest on."""
    draw = random.Random(0)
    alike = case == "alike"
    prompts = [
        [draw.randrange(arguments.vocab) for _ in range(draw.randint(arguments.prompt // 4, arguments.prompt))]
        for _ in range(4 * arguments.batch)
    ]
    if alike:
        prompts = [[draw.randrange(arguments.vocab) for _ in range(arguments.prompt)] for _ in range(arguments.batch)]
    if case == "groups":
        prompts = [prompts[number // GROUP] for number in range(len(prompts))]
    return [
        Request(prompt, arguments.tokens if alike else draw.randint(arguments.tokens // 4, arguments.tokens), number)
        for number, prompt in enumerate(prompts)
    ]


def llama_of(config: PretrainConfig, chunk: torch.nn.Module, vocab: int) -> Any:
    """Hugging Face's model with the weights of Megatron's."""
    model, settings = mcore.unwrap(chunk), config.model
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocab,
            hidden_size=settings.hidden_size,
            intermediate_size=mcore.ffn_size(settings),
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_attention_heads,
            num_key_value_heads=settings.num_query_groups,
            rms_norm_eps=settings.layernorm_epsilon,
            rope_theta=float(settings.rotary_base),
            max_position_embeddings=config.data.seq_length,
            tie_word_embeddings=False,
        )
    ).to(dtype)
    groups, heads, hidden = settings.num_query_groups or 1, settings.num_attention_heads, settings.hidden_size
    with torch.no_grad():
        llama.model.embed_tokens.weight.copy_(model.embedding.word_embeddings.weight[:vocab])
        llama.lm_head.weight.copy_(model.output_layer.weight[:vocab])
        for ours, theirs in zip(model.decoder.layers, llama.model.layers, strict=True):
            # Per group: its queries, its key, its value.
            qkv = ours.self_attention.linear_qkv.weight.view(groups, heads // groups + 2, -1, hidden)
            parts = qkv.split((heads // groups, 1, 1), dim=1)
            for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
                getattr(theirs.self_attn, name).weight.copy_(part.reshape(-1, hidden))
            theirs.self_attn.o_proj.weight.copy_(ours.self_attention.linear_proj.weight)
            gate, up = ours.mlp.linear_fc1.weight.chunk(2)
            theirs.mlp.gate_proj.weight.copy_(gate)
            theirs.mlp.up_proj.weight.copy_(up)
            theirs.mlp.down_proj.weight.copy_(ours.mlp.linear_fc2.weight)
    return llama.to(next(model.parameters()).device).eval()


@torch.no_grad()
def farthest_logits(chunk: torch.nn.Module, llama: Any, vocab: int, device: torch.device) -> float:
    """How far the two models' logits are apart, as a share of the largest: both must compute the same."""
    tokens = torch.arange(32, device=device)[None] * 7 % vocab
    ours = chunk.eval()(tokens, None, None)[..., :vocab].float()
    theirs = llama(tokens).logits.float()
    chunk.train()
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.no_grad()
def hugging_face(llama: Any, requests: list[Request], batch: int, device: torch.device) -> None:
    """`generate` over the requests, padded on the left; those of about one length share a batch."""
    ordered = sorted(requests, key=lambda request: (len(request.prompt_ids), request.max_tokens))
    for begin in range(0, len(ordered), batch):
        rows = ordered[begin : begin + batch]
        width = max(len(row.prompt_ids) for row in rows)
        tokens = torch.tensor([[0] * (width - len(row.prompt_ids)) + row.prompt_ids for row in rows], device=device)
        mask = torch.tensor([[i >= width - len(row.prompt_ids) for i in range(width)] for row in rows], device=device)
        longest = max(row.max_tokens for row in rows)
        llama.generate(
            tokens,
            attention_mask=mask.long(),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=longest,
            min_new_tokens=longest,
            pad_token_id=0,
            eos_token_id=None,
        )


def report(arguments: argparse.Namespace, results: list[dict[str, Any]], far: float) -> None:
    """Print the table and write the figures."""
    about = environment()
    kind = "seconds of the clock" if torch.cuda.is_available() else "processor seconds"
    print(f"# {about['machine']}, {about['cores']} cores, GPUs {about['gpus'] or 'none'}, commit {about['commit']}")
    print(f"# torch {torch.__version__}, transformers {transformers.__version__}, rates by {kind}, medians")
    print(f"# logits differ by {far:.1e} of the largest; {arguments.precision}, batch {arguments.batch}")
    print("case\tengine\ttokens\ttokens/s\tms/token\tratio")
    for result in results:
        base = result["tokens_per_second"][HUGGING_FACE]
        for name, rate in result["tokens_per_second"].items():
            print(f"{result['case']}\t{name}\t{result['tokens']}\t{rate:.0f}\t{1e3 / rate:.2f}\t{rate / base:.2f}")
    if arguments.output:
        settings = {name: value for name, value in vars(arguments).items() if name != "output"}
        when = datetime.now(timezone.utc).isoformat(timespec="seconds")
        figures = {"when": when, "environment": about, "settings": settings, "results": results, "logits_far": far}
        arguments.output.write_text(json.dumps(figures, indent=1) + os.linesep)


if __name__ == "__main__":
    main()
