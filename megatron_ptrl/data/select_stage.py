"""`ptrl select`: `.bin/.idx` and two side-cars -> the documents that the reference prefers most to the base model.

Difference sampling of MiniPLM (arXiv:2410.17215), a baseline for weighting tokens: what a small base model finds as
likely as the reference does is noise or known already. Metadata and tokenizer come along, so the result is data like
any other.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_ptrl.config import DataConfig, SelectConfig
from megatron_ptrl.data.indexed import IndexedMeta, open_indexed, resolve_tokenizer
from megatron_ptrl.data.indexed_output import PUBLISHED
from megatron_ptrl.data.parts import Part
from megatron_ptrl.data.sidecar import SideCar
from megatron_ptrl.data.tokenizer import Tokenizer
from megatron_ptrl.errors import InputError


def run(config: SelectConfig) -> None:
    """Write the chosen documents, in their old order, to `config.output`.*; prints counts and the threshold.

    Raises InputError for data without metadata, side-cars of other data, an output that would overwrite its input
    or cannot be written.
    """
    for name in ("data", "reference", "base", "output"):
        if not getattr(config, name):
            raise InputError(f"{name} is empty; expected the prefix of a pair of files")
    if os.path.realpath(config.output) in {os.path.realpath(x) for x in (config.data, config.reference, config.base)}:
        raise InputError(f"output {config.output} would overwrite its input; choose another prefix")
    if os.path.realpath(config.reference) == os.path.realpath(config.base):
        raise InputError(f"reference and base are both {config.base}, which would choose nothing; name two side-cars")
    tokenizer = resolve_tokenizer(DataConfig(train=[config.data]))
    indexed, meta = open_indexed(config.data)
    assert meta is not None, "resolve_tokenizer refuses data without metadata"
    part = Part(1.0, config.data, indexed, 0, len(indexed))
    sidecars = [SideCar.open(prefix) for prefix in (config.reference, config.base)]
    for sidecar in sidecars:
        sidecar.check(part, tokenizer)
    gains = mean_gains(indexed, *sidecars)
    chosen = largest(gains, config.keep)
    try:
        tokens = _write(config.output, indexed, chosen)
        _publish(config.output, meta, tokenizer, len(indexed), len(chosen), tokens)
    except OSError as error:
        raise InputError(f"output {config.output}: {error.strerror}: {error.filename or config.output}") from error
    print(
        f"{config.output}: {len(chosen):,} of {len(indexed):,} documents, {tokens:,} of {meta.tokens:,} tokens; kept "
        f"from a mean of log p_ref - log p_base of {gains[chosen].min():.4f} nats a token on"
    )


def mean_gains(indexed: IndexedDataset, reference: SideCar, base: SideCar) -> numpy.ndarray:
    """float64 [documents]: mean over a document's tokens of log p_ref - log p_base; -inf for one without tokens.

    Reads both side-cars once. Raises InputError for a value that is no log-probability.
    """
    gains = numpy.full(len(indexed), -numpy.inf)
    for document in numpy.flatnonzero(indexed.sequence_lengths):
        difference = reference.read(int(document)).astype(numpy.float64) - base.read(int(document))
        gains[document] = difference.mean()
    return gains


def largest(gains: numpy.ndarray, keep: float) -> numpy.ndarray:
    """Ascending numbers of the share `keep` with the largest gains, rounded to at least one; ties go to the first."""
    count = max(round(keep * len(gains)), 1)
    return numpy.sort(numpy.argsort(-gains, kind="stable")[:count])


def _write(output: str, indexed: IndexedDataset, chosen: numpy.ndarray) -> int:
    """The `.bin` and `.idx` under temporary names; returns the number of tokens."""
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    builder, tokens = IndexedDatasetBuilder(output + ".bin.tmp", dtype=indexed.index.dtype), 0
    for document in chosen:
        ids = indexed.get(int(document))
        builder.add_document(ids, [ids.size])
        tokens += ids.size
    builder.finalize(output + ".idx.tmp")
    return tokens


def _publish(output: str, meta: IndexedMeta, tokenizer: Tokenizer, of: int, documents: int, tokens: int) -> None:
    """Metadata and tokenizer of `documents` chosen among `of`, and all files under their names."""
    rejected = {**meta.rejected, "not selected": of - documents}
    written = dataclasses.replace(meta, documents=documents, tokens=tokens, rejected=rejected)
    Path(output + ".json.tmp").write_text(json.dumps(dataclasses.asdict(written), indent=2) + "\n")
    shutil.copyfile(tokenizer.path, output + ".tokenizer.json.tmp")
    # As `ptrl tokenize` does: a pair counts when its index is there.
    Path(output + ".idx").unlink(missing_ok=True)
    for suffix in PUBLISHED:
        os.replace(output + suffix + ".tmp", output + suffix)
