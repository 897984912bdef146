"""ReMiT's CUDA kernels in the emulation of cuda_emulation/, in place of the operators of megatron_ptrl.ops."""

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from emulated import ROOT
from torch import Tensor

from megatron_ptrl import ops

SOURCE = ROOT / "tests" / "cuda_emulation" / "remit_kernels.cpp"
GUARD = 8  # elements after each result that must stay as they are


def compile_remit_kernels(folder: Path, flags: Sequence[str] = ("-O2",)) -> Path:
    library = folder / "emulated_remit.so"
    options = ["-std=c++17", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    include = [f"-I{SOURCE.parent}", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *options, *flags, *include, str(SOURCE), "-o", str(library)], check=True)
    return library


class EmulatedRemit:
    """The two operators, with the signatures of their wrappers in megatron_ptrl.ops."""

    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))
        for name in ("gap_sums", "weights"):
            getattr(self._library, name).restype = ctypes.c_char_p

    def install(self, monkeypatch) -> None:
        monkeypatch.setattr(ops, "remit_gap_sums", self.gap_sums)
        monkeypatch.setattr(ops, "remit_weights", self.weights)

    def seed(self, value: int) -> None:
        """Of the order in which threads run."""
        self._library.seed(value)

    def gap_sums(self, logprob, reference_logprob, keep, segment, segments):
        scratch, sums = _guarded(3 * segments, torch.int64, 0), _guarded(2 * segments, torch.float64, torch.nan)
        tokens = _tokens(logprob, reference_logprob, keep, segment, segments)
        self._call("gap_sums", *tokens, _pointer(scratch), _pointer(sums))
        _within_bounds(scratch)
        return _within_bounds(sums).view(2, segments)

    def weights(self, logprob, reference_logprob, keep, segment, sums, epsilon):
        assert sums.is_contiguous() and sums.dtype == torch.float64
        out = _guarded(logprob.numel(), torch.float32, torch.nan)
        tokens = _tokens(logprob, reference_logprob, keep, segment, sums.shape[1])
        self._call("weights", *tokens, _pointer(sums), ctypes.c_double(epsilon), _pointer(out))
        return _within_bounds(out).view(logprob.shape)

    def _call(self, name: str, *arguments: object) -> None:
        failure = getattr(self._library, name)(*arguments)
        if failure is not None:
            raise RuntimeError(f"{name}: {failure.decode()}")


def _tokens(logprob: Tensor, reference_logprob: Tensor, keep: Tensor, segment: Tensor | None, segments: int) -> list:
    expected = [(logprob, torch.float32), (reference_logprob, torch.float32), (keep, torch.bool)]
    if segment is not None:
        expected.append((segment, torch.int64))
    for x, dtype in expected:
        assert x.shape == logprob.shape and x.dtype == dtype and x.is_contiguous()
    pointers = [_pointer(x) for x in (logprob, reference_logprob, keep, segment)]
    return [*pointers, *(ctypes.c_int64(size) for size in (*logprob.shape, segments))]


def _pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _guarded(count: int, dtype: torch.dtype, value: float) -> Tensor:
    """What the kernels leave out stays as it is and is seen, and so is what they write beyond the end."""
    out = torch.full((count + GUARD,), value, dtype=dtype)
    out[count:] = 77
    return out


def _within_bounds(out: Tensor) -> Tensor:
    assert (out[-GUARD:] == 77).all()
    return out[:-GUARD]
