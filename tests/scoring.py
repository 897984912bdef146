"""A tiny reference, data to score with it, and `ptrl score` on the ranks of the pool."""

import contextlib
import io
import json
import random
import sysconfig
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tiny import Settings, parsed, pretraining, tiny_config

from megatron_ptrl.config import TokenizeConfig
from megatron_ptrl.data.tokenize_stage import run as tokenize

WINDOW = 64


def make_data(folder: Path, tokenizer: str, name: str = "data") -> str:
    """Prefix of documents from one token and its end to six windows, a few thousand tokens in all."""
    text = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text()
    sizes = [1, 300, 2, 40, 1000, 9, 120, 60, 700, 25, *random.Random(3).choices(range(5, 160), k=14)]
    source, at = folder / f"{name}.jsonl", 2000
    with source.open("w") as stream:
        for size in sizes:
            stream.write(json.dumps({"text": text[at : at + size]}) + "\n")
            at += size
    with contextlib.redirect_stdout(io.StringIO()):
        tokenize(TokenizeConfig(input=[str(source)], output=str(folder / name), tokenizer=tokenizer))
    return str(folder / name)


def reference_settings(prefix: str, run_dir: Path) -> Settings:
    # 512 tokens padded to 1024: the padding is in the softmax. Large weights make an untrained model opinionated.
    model = {"model__make_vocab_size_divisible_by": 1024, "model__init_method_std": 0.1}
    return tiny_config(prefix, run_dir, train__steps=3, data__seq_length=WINDOW, **model)


def direct(rank: int, world_size: int, settings: Settings, data: str, windows: list[list[int]]) -> list[list[float]]:
    """For each (document, begin, end): fp64 log-probabilities of tokens begin + 1 .. end - 1 given those from begin on.

    One forward pass a list of tokens, unpacked; a begin of -1 puts the end-of-document token first.
    """
    with pretraining(settings, world_size) as run:
        model, indexed = run.chunks[0].eval(), IndexedDataset(data)
        found = []
        for document, begin, end in windows:
            before = [run.tokenizer.eod] if begin < 0 else []
            tokens = torch.tensor(before + indexed.get(document)[max(begin, 0) : end].tolist())
            with torch.no_grad():
                logits = model(tokens[None, :-1], torch.arange(len(tokens) - 1)[None], None)[0]
            found.append(logits.double().log_softmax(-1).gather(-1, tokens[1:, None])[:, 0].tolist())
        return found


def score(rank: int, world_size: int, settings: Settings, change: Any = None) -> str:
    """`ptrl score` on this rank of the pool; what it printed. `change` is called with the module before."""
    config = parsed(settings, "ScoreConfig")
    from megatron_ptrl.training import score as module

    with contextlib.ExitStack() as stack:
        if change:
            stack.enter_context(change(module))
        output = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        module.Scoring(config).run()
    return output.getvalue()


def values_of(output: str) -> numpy.ndarray:
    """All values of an fp32 side-car."""
    return numpy.fromfile(output + ".bin", numpy.float32)
