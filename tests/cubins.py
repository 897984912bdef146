"""The CUDA sources of csrc/ as nvcc compiles them for one generation of GPUs, and as nvdisasm reads the result."""

import importlib.metadata
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

from filelock import FileLock
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path.stem for path in (ROOT / "csrc").glob("*.cu"))
NVCC = shutil.which("/usr/local/cuda/bin/nvcc") or shutil.which("nvcc")


class Cubins:
    """Each is compiled once into the folder, which the workers of a session share."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.compiled = cache(self._compile)
        self.instructions = cache(self._disassemble)

    def _compile(self, source: str, architecture: int) -> tuple[Path, str]:
        """The binary, and what ptxas tells of it."""
        flags = ["-std=c++17", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Xptxas=-v"]
        include = [f"-I{path}" for path in include_paths()]
        cubin = self._folder / f"{source}.{architecture}.cubin"
        told = cubin.with_suffix(".txt")
        with FileLock(cubin.with_suffix(".lock")):
            if not told.exists():
                done = subprocess.run(
                    [str(NVCC), "-cubin", f"-arch=sm_{architecture}", *flags, *include,
                     str(ROOT / "csrc" / f"{source}.cu"), "-o", str(cubin)],
                    capture_output=True, text=True,
                )  # fmt: skip
                assert done.returncode == 0, done.stderr
                told.write_text(done.stderr)
        return cubin, told.read_text()

    def _disassemble(self, source: str, architecture: int) -> dict[str, list[list[str]]]:
        """Opcodes of each kernel, by mangled name, in the stretches that no jump enters or leaves."""
        cubin, _ = self.compiled(source, architecture)
        listing = subprocess.run([str(nvdisasm()), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
        found = re.findall(r"\n\.text\.(\w+):\n(.*?)(?=\n//-----|\Z)", listing, flags=re.S)
        return {name: _stretches(body) for name, body in found}


def _stretches(body: str) -> list[list[str]]:
    stretches: list[list[str]] = [[]]
    for line in body.splitlines():
        if line.startswith(".L_"):
            stretches.append([])
        if opcode := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            stretches[-1].append(opcode[1])
            if opcode[1].startswith(("BRA", "BRX", "CALL", "EXIT", "RET")):
                stretches.append([])
    return stretches


@cache
def nvdisasm() -> Path | None:
    """Of its package, else beside nvcc or on PATH."""
    try:
        for file in importlib.metadata.files("nvidia-cuda-nvdisasm") or []:
            if file.name == "nvdisasm":
                return Path(str(file.locate()))
    except importlib.metadata.PackageNotFoundError:
        pass
    beside = shutil.which("nvdisasm", path=str(Path(NVCC).parent)) if NVCC else None
    found = beside or shutil.which("nvdisasm")
    return Path(found) if found else None
