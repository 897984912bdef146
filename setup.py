"""Builds megatron_ptrl/_C.so from csrc/: a plain shared library for `torch.ops.load_library`, no Python in it.

Without a C++ compiler the installation still succeeds, and megatron_ptrl/ops.py computes in torch operators.

MEGATRON_PTRL_CUDA=1 builds the CUDA kernels too and fails where it cannot, 0 leaves them out. The default, auto, builds
them where there is nvcc and they can be of use: torch is a CUDA build, or TORCH_CUDA_ARCH_LIST names GPUs (9.0+PTX).
A visible GPU is not asked for, since build machines have none; beside a CPU build of torch they would only take time.
The library loads in either torch.
"""

import os
import shutil
import subprocess
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from torch.utils.cpp_extension import include_paths, library_paths

# The stable ABI of torch 2.11: one build serves that release and every later one.
TORCH_TARGET_VERSION = "-DTORCH_TARGET_VERSION=0x020b000000000000"
ARCHITECTURES = "8.0 9.0 10.0+PTX"
CUDA_SOURCES = ["csrc/remit_weights_cuda.cu", "csrc/reward_shaped_ce_cuda.cu"]


def find_nvcc() -> str | None:
    # Not torch's CUDA_HOME, which a CPU build of torch keeps empty.
    root = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc", path=f"{root}/bin") or shutil.which("nvcc")


def wants_cuda() -> bool:
    asked = os.environ.get("MEGATRON_PTRL_CUDA", "auto")
    if asked not in ("auto", "0", "1"):
        raise SystemExit(f"MEGATRON_PTRL_CUDA is {asked}; expected auto, 0 or 1")
    if asked == "1" and find_nvcc() is None:
        raise SystemExit("MEGATRON_PTRL_CUDA is 1, but there is no nvcc on PATH or in CUDA_HOME")
    useful = torch.version.cuda is not None or "TORCH_CUDA_ARCH_LIST" in os.environ
    return asked == "1" or (asked == "auto" and useful and find_nvcc() is not None)


def architecture_flags(nvcc: str) -> list[str]:
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    flags, newest = [], ""
    for name in (asked or ARCHITECTURES).replace(";", " ").split():
        number = name.removesuffix("+PTX").replace(".", "")
        if asked is None and f"compute_{number}" not in known:  # an older toolkit: PTX of what it does know will do
            continue
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        newest = number
    if asked is None and not flags[-1].endswith(f"code=compute_{newest}"):
        flags.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    return flags


def cuda_library_folders(nvcc: str) -> list[str]:
    # Asked of nvcc: the one on PATH may be a script that calls another. None: the linker knows the place.
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=True).stderr
    root = next((line.split("=", 1)[1] for line in plan.splitlines() if line.startswith("#$ TOP=")), "/usr/local/cuda")
    return [str(path.parent) for path in Path(root).resolve().glob("lib*/libcudart_static.a")]


class BuildLibrary(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        if wants_cuda():
            try:
                self.add_cuda(ext)
            except (OSError, subprocess.CalledProcessError) as error:
                if os.environ.get("MEGATRON_PTRL_CUDA") == "1":
                    raise SystemExit(f"the CUDA kernels did not build: {error}") from error
                self.warn(f"the CUDA kernels did not build, only those for CPUs: {error}")
        super().build_extension(ext)

    def add_cuda(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        assert nvcc is not None
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        flags = ["-std=c++17", "-O3", "--threads=0", "-Xcompiler=-fPIC", "-DUSE_CUDA", TORCH_TARGET_VERSION]
        include = [f"-I{path}" for path in include_paths()]
        for source in CUDA_SOURCES:
            compiled = Path(self.build_temp) / (Path(source).stem + ".o")
            command = [nvcc, "-c", *flags, *architecture_flags(nvcc), *include, source, "-o", str(compiled)]
            print(" ".join(command), flush=True)
            subprocess.run(command, check=True)
            ext.extra_objects.append(str(compiled))
        ext.library_dirs += cuda_library_folders(nvcc)
        ext.libraries += ["cudart_static", "rt", "pthread", "dl"]


kernels = Extension(
    "megatron_ptrl._C",
    sources=[
        "csrc/bindings.cpp",
        "csrc/decode_attention_cpu.cpp",
        "csrc/draw_cpu.cpp",
        "csrc/few_rows_linear_cpu.cpp",
        "csrc/kept_memory.cpp",
        "csrc/remit_weights_cpu.cpp",
        "csrc/reward_shaped_ce_cpu.cpp",
        "csrc/reward_shaped_ce_cpu_loops.cpp",
    ],
    depends=[str(path) for path in sorted(Path("csrc").glob("*.*"))],
    include_dirs=include_paths(),
    library_dirs=library_paths(),
    libraries=["torch_cpu"],
    extra_compile_args=[
        "-std=c++17",
        "-O3",
        "-g0",
        "-fopenmp-simd",
        "-ffp-contract=fast",
        "-Wno-psabi",
        TORCH_TARGET_VERSION,
    ],
    # Nothing of libtorch is used, but in a CUDA build it brings libtorch_cuda. Were it not among the dependencies, the
    # weak symbol of the CUDA part would not be found, because `import torch` keeps its libraries to itself.
    extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"],
    optional=True,
)
setup(ext_modules=[kernels], cmdclass={"build_ext": BuildLibrary})
