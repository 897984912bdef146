"""The CUDA kernels of csrc/ in the emulation of cuda_emulation/, in place of the operators of megatron_ptrl.ops."""

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_ptrl import ops

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "tests" / "cuda_emulation" / "kernels.cpp"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]  # in the order of ptrl::Dtype
SANITIZE = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


def compile_kernels(folder: Path, flags: Sequence[str] = ("-O2",)) -> Path:
    library = folder / "emulated_kernels.so"
    include = [f"-I{SOURCE.parent}", f"-I{ROOT / 'csrc'}"]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    subprocess.run(
        ["g++", "-std=c++17", "-shared", "-fPIC", *flags, *warnings, *include, str(SOURCE), "-o", str(library)],
        check=True,
    )
    return library


class Emulated:
    """The operators of the loss, with the signatures of their wrappers in megatron_ptrl.ops."""

    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))
        for name in ("stats", "combine", "grad", "one_pass"):
            getattr(self._library, name).restype = ctypes.c_char_p

    def install(self, monkeypatch) -> None:
        for name in ("stats", "combine", "grad", "grad_"):
            monkeypatch.setattr(ops, f"reward_shaped_ce_{name}", getattr(self, name))

    def seed(self, value: int) -> None:
        """Of the order in which threads run."""
        self._library.seed(value)

    def stretch(self, size: int) -> None:
        """Bytes of a row that one block of a cluster should hold."""
        self._library.stretch(ctypes.c_int64(size))

    def blocks(self, dtype: torch.dtype, columns: int, top_k: int, on_gpu: bool = False) -> int:
        """Of the cluster for a row in one pass, with the threads of the emulation or of a GPU; 0: two passes."""
        return self._library.blocks(
            DTYPES.index(dtype), ctypes.c_int64(columns), ctypes.c_int64(top_k), ctypes.c_int(on_gpu)
        )

    def stats(self, logits, target, vocab_start, ranked, top_k, entropy, ignore_index):
        rows = target.numel()
        # What the kernels leave out stays NaN and is seen.
        numbers, keys = torch.full((rows, ops.NUMBERS), torch.nan), logits.new_full((rows, top_k), torch.nan)
        self._call(
            "stats", logits.dtype, logits, *_layout(logits), logits.dim(), target, vocab_start, ranked, top_k,
            entropy, *_ignoring(ignore_index), numbers, keys,
        )  # fmt: skip
        return numbers, keys

    def combine(self, numbers, keys, target, beta, lambda_head, lambda_tail, ignore_index):
        shards, rows, top_k = keys.shape
        assert numbers.is_contiguous() and keys.is_contiguous()
        loss, coefficients = torch.full((rows,), torch.nan), torch.full((rows, ops.COEFFICIENTS), torch.nan)
        stats = torch.full((ops.STATS, rows), torch.nan)
        self._call(
            "combine", keys.dtype, numbers, keys, target, shards, rows, top_k, beta, lambda_head, lambda_tail,
            *_ignoring(ignore_index), loss, coefficients, stats,
        )  # fmt: skip
        return loss, coefficients, stats

    def grad(self, logits, target, grad_loss, coefficients, vocab_start, ranked):
        grad = torch.empty_like(logits).fill_(torch.nan)
        self._grad(logits, grad, target, grad_loss, coefficients, vocab_start, ranked)
        return grad

    def grad_(self, logits, target, grad_loss, coefficients, vocab_start, ranked):
        self._grad(logits, logits, target, grad_loss, coefficients, vocab_start, ranked)

    def one_pass_(
        self, logits, target, grad_loss, ranked, top_k, entropy, beta, lambda_head, lambda_tail, ignore_index
    ):
        assert self.blocks(logits.dtype, logits.shape[-1], top_k) > 0
        loss, stats = torch.full(target.shape, torch.nan), torch.full((ops.STATS, target.numel()), torch.nan)
        self._call(
            "one_pass", logits.dtype, logits, *_layout(logits), logits.dim(), target, grad_loss, ranked, top_k, entropy,
            beta, lambda_head, lambda_tail, *_ignoring(ignore_index), loss, stats,
        )  # fmt: skip
        return loss, stats

    def _grad(self, logits, grad, target, grad_loss, coefficients, vocab_start, ranked):
        sizes, strides = _layout(logits)
        self._call(
            "grad", logits.dtype, logits, grad, sizes, strides, _layout(grad)[1], logits.dim(), target, grad_loss,
            coefficients, vocab_start, ranked,
        )  # fmt: skip

    def _call(self, name: str, dtype: torch.dtype, *arguments: object) -> None:
        failure = getattr(self._library, name)(DTYPES.index(dtype), *map(_as_c, arguments))
        if failure is not None:
            raise RuntimeError(f"{name}: {failure.decode()}")


def _layout(x: Tensor) -> tuple[ctypes.Array, ctypes.Array]:
    kind = ctypes.c_int64 * x.dim()
    return kind(*x.shape), kind(*x.stride())


def _ignoring(ignore_index: int | None) -> tuple[bool, int]:
    return ignore_index is not None, ignore_index or 0


def _as_c(value: object) -> object:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, bool):
        return ctypes.c_int(value)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    return ctypes.c_double(value) if isinstance(value, float) else value
