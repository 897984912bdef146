"""A Hugging Face model -> a run directory that holds its weights, settings and tokenizer.

config.json -> model_fields_of     *.safetensors -> pieces -> torch_dist, a tensor at a time

RUN/config.yaml                    the model's settings, for --config of `ptrl pretrain`, `sft` and `rl`
RUN/checkpoints/step_00000000/     the weights, for --checkpoint.load and everything that takes a checkpoint
RUN/hf/                            tokenizer, chat template and config.json as they came
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from megatron_ptrl.cli import parse
from megatron_ptrl.config import ConvertConfig, PretrainConfig
from megatron_ptrl.conversion import safetensors, torch_dist
from megatron_ptrl.conversion.hf_config import model_fields_of, read_config
from megatron_ptrl.conversion.safetensors import Stored
from megatron_ptrl.conversion.torch_dist import Part
from megatron_ptrl.conversion.weights import Piece, empty_objects, pieces, sizes_of, to_megatron
from megatron_ptrl.data.tokenizer import Tokenizer, token_of
from megatron_ptrl.errors import InputError
from megatron_ptrl.training import checkpoint, mcore
from megatron_ptrl.training.resume import describe, model_fields

DESCRIPTIONS = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "tokenizer.model"),
)
HF = "hf"
# Rows of training are shorter than the longest text that many models can read.
_LONGEST_ROW = 4096
_ALONE = {"world_size": 1, "tp": 1, "pp": 1, "cp": 1}
# Buffers that old files have, which follow from config.json.
_NO_WEIGHT = ".rotary_emb.inv_freq"


def from_hf_folder(config: ConvertConfig, source: Path, output: Path, final: Path) -> str:
    """Convert the model in `source` into the empty folder `output`, which will be `final`; returns what to say.

    Raises InputError for what is missing, unknown, damaged or of the wrong shape.
    """
    described, where = read_config(source), source / "config.json"
    fields = model_fields_of(described, where)
    tokenizer = _tokenizer(config, source, described)
    rows = described.get("vocab_size")
    if not isinstance(rows, int) or rows < tokenizer.vocab_size:
        raise InputError(
            f"{where}: vocab_size is {rows}, and {tokenizer.path} has tokens up to {tokenizer.vocab_size - 1}; "
            "expected a row of the embedding for each"
        )
    fields["make_vocab_size_divisible_by"] = divisor(rows, tokenizer.vocab_size)
    stored = safetensors.open_folder(source)
    settings = {
        "model": fields,
        "data": {
            "tokenizer": str(final / HF / "tokenizer.json"),
            "eod_token": tokenizer.eod_token,
            "seq_length": config.seq_length or min(described.get("max_position_embeddings", 2048), _LONGEST_ROW),
        },
        "train": {"precision": "bf16" if _dtype(stored, source) == torch.bfloat16 else "fp32"},
    }
    run = parsed(settings)
    write_settings(output, run)
    (output / HF).mkdir()
    for name in DESCRIPTIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, output / HF / name)
    shutil.copyfile(tokenizer.path, output / HF / "tokenizer.json")
    path = output / "checkpoints" / "step_00000000"
    path.mkdir(parents=True)
    count = _write_weights(run, stored, rows, path, source)
    about = {**describe(run, tokenizer), "weights_only": True, "source": str(source)}
    checkpoint.write_manifest(path, checkpoint.Progress(), about, _ALONE)
    return (
        f"{final}: {count:,} parameters of {described['architectures'][0]}, vocabulary {tokenizer.vocab_size} in "
        f"{rows} rows, end of document {tokenizer.eod_token!r}, rows of {run.data.seq_length} tokens\n"
        f"  ptrl rl --config {final / 'config.yaml'} --checkpoint.load {final} --run_dir ..."
    )


def parsed(settings: dict[str, dict[str, Any]]) -> PretrainConfig:
    """Settings by section and name -> what `ptrl pretrain` makes of them."""
    words = [
        f"--{section}.{name}={value if isinstance(value, str) else json.dumps(value)}"
        for section, values in settings.items()
        for name, value in values.items()
    ]
    return parse(PretrainConfig, words, prog="ptrl convert")


def write_settings(output: Path, run: PretrainConfig, *, whole: bool = False) -> None:
    """config.yaml: what every stage that trains has, or the `whole` of a run of `ptrl pretrain` that is to go on."""
    shared: dict[str, Any] = {
        "model": model_fields(run.model),
        "data": {
            "tokenizer": run.data.tokenizer,
            "eod_token": run.data.eod_token,
            "seq_length": run.data.seq_length,
        },
        "train": {"precision": run.train.precision},
    }
    if run.data.isolate_documents:
        shared["data"]["isolate_documents"] = True
    if whole:
        shared["data"]["split"] = run.data.split
        shared |= {name: dataclasses.asdict(getattr(run, name)) for name in ("train", "optimizer", "parallel")}
    (output / "config.yaml").write_text(yaml.safe_dump(shared, sort_keys=False))


def divisor(rows: int, vocab_size: int) -> int:
    """The `make_vocab_size_divisible_by` that pads a vocabulary to exactly so many rows: 64 if that does it, else the
    smallest, so that it goes with as many tensor-parallel sizes as can be."""
    for candidate in (64, *(d for d in range(1, rows + 1) if rows % d == 0)):
        if -(-vocab_size // candidate) * candidate == rows:
            return candidate
    raise AssertionError("the number of rows divides by itself")


def _tokenizer(config: ConvertConfig, source: Path, described: dict[str, Any]) -> Tokenizer:
    path = Path(config.tokenizer) if config.tokenizer else source / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; expected a fast tokenizer, as transformers' save_pretrained writes it; name one by "
            "--tokenizer"
        )
    eod = config.eod_token
    if eod is None:
        ends = described.get("eos_token_id")
        number = ends[0] if isinstance(ends, list) and ends else ends
        eod = token_of(path, number) if isinstance(number, int) else None
        if eod is None:
            raise InputError(
                f"{source / 'config.json'}: eos_token_id is {ends}, no token of {path}; name the end-of-document token "
                "by --eod_token"
            )
    return Tokenizer(path, eod)


def _dtype(stored: dict[str, Stored], source: Path) -> torch.dtype:
    name = "model.embed_tokens.weight"
    if name not in stored:
        raise InputError(f"{source} has no {name}")
    return stored[name].dtype


def _write_weights(run: PretrainConfig, stored: dict[str, Stored], rows: int, path: Path, source: Path) -> int:
    """Returns the number of parameters."""
    sizes = sizes_of(run.model, rows)
    wanted = pieces(run.model, sizes, mcore.padded_vocab_size(rows, run.model, 1))
    _check_tensors(wanted, stored, source)
    parts: dict[Part, Piece] = {}
    groups: dict[int | None, list[Part]] = {}
    for piece in wanted:
        part = piece.part(run.model.num_layers, stored[next(iter(piece.hf))].dtype)
        parts[part] = piece
        # One outside of the layers, an embedding, may be as large as a layer.
        groups.setdefault(-len(parts) if piece.layer is None else piece.layer, []).append(part)

    def read(part: Part) -> Tensor:
        piece = parts[part]
        return to_megatron(piece, [stored[name].read() for name in piece.hf], sizes)

    torch_dist.write(path, list(groups.values()), read, objects=empty_objects(run.model), common={})
    return sum(torch.Size(part.sizes).numel() for part in parts)


def _check_tensors(wanted: list[Piece], stored: dict[str, Stored], source: Path) -> None:
    """Exactly the tensors of this model, in the shapes of its config.json, those of one piece in one type."""
    shapes = {name: shape for piece in wanted for name, shape in piece.hf.items()}
    for name, shape in shapes.items():
        if name not in stored:
            raise InputError(f"{source} has no {name}, which its config.json asks for")
        if stored[name].shape != shape:
            raise InputError(f"{stored[name].path}: {name} has shape {stored[name].shape}; expected {shape}")
    for name, extra in stored.items():
        if name in shapes or name.endswith(_NO_WEIGHT):
            continue
        tied = name == "lm_head.weight"
        if not tied or not torch.equal(extra.read(), stored["model.embed_tokens.weight"].read()):
            raise InputError(
                f"{extra.path} has {name}, which "
                + ("config.json says is the embedding (tie_word_embeddings), but it differs" if tied else "is unknown")
            )
    for piece in wanted:
        dtypes = {stored[name].dtype for name in piece.hf}
        if len(dtypes) > 1:
            raise InputError(f"{source}: {', '.join(piece.hf)} have types {dtypes}; expected the same, they are packed")
