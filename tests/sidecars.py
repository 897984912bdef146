"""Side-cars with values of the test's choice."""

import numpy

from megatron_ptrl.data import sidecar
from megatron_ptrl.data.indexed import open_indexed
from megatron_ptrl.data.sidecar import SideCarMeta


def describe(data: str, storage: str = "fp32", **changes: object) -> SideCarMeta:
    """What a side-car of `data` says of itself."""
    indexed, meta = open_indexed(data)
    known = {
        "storage": storage,
        "data": sidecar.identify(data),
        "data_sha256": sidecar.hash_file(data + ".bin"),
        "tokenizer_sha256": meta.tokenizer_sha256,
        "reference": {"checkpoint": "runs/x"},
        "window": 8,
        "overlap": 4,
        "documents": len(indexed),
        "tokens": meta.tokens,
        "mean_logprob": -1.0,
    }
    return SideCarMeta(**{**known, **changes})


def write_sidecar(data: str, output: str, values: numpy.ndarray, **changes: object) -> str:
    """`output`, now the prefix of an fp32 side-car of `data` with one of `values` for each token."""
    payload = [sidecar.encode(values.astype(numpy.float32), "fp32")]
    sidecar.publish(output, data, payload, describe(data, **changes))
    return output


def any_values(data: str, seed: int) -> numpy.ndarray:
    """Log-probabilities of no model, between -8 and 0."""
    tokens = open_indexed(data)[1].tokens
    return -8 * numpy.random.default_rng(seed).random(tokens, dtype=numpy.float32)


def write_by_token(data: str, output: str) -> str:
    """`output`, now the prefix of a side-car with the value -(token + 1) / 1024 for each token of `data`."""
    tokens = numpy.fromfile(data + ".bin", open_indexed(data)[0].index.dtype)
    return write_sidecar(data, output, -(tokens.astype(numpy.float32) + 1) / 1024)
