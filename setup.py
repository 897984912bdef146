"""Builds megatron_ptrl/_C.so from csrc/: a plain shared library for `torch.ops.load_library`, no Python in it.

Without a C++ compiler the installation still succeeds, and megatron_ptrl/ops.py computes in torch operators.
"""

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from torch.utils.cpp_extension import include_paths, library_paths

# The stable ABI of torch 2.11: one build serves that release and every later one.
TORCH_TARGET_VERSION = "-DTORCH_TARGET_VERSION=0x020b000000000000"


class BuildLibrary(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"


kernels = Extension(
    "megatron_ptrl._C",
    sources=[
        "csrc/bindings.cpp",
        "csrc/remit_weights_cpu.cpp",
        "csrc/reward_shaped_ce_cpu.cpp",
        "csrc/reward_shaped_ce_cpu_loops.cpp",
    ],
    depends=["csrc/checks.h", "csrc/reward_shaped_ce.h", "csrc/reward_shaped_ce_cpu.h"],
    include_dirs=include_paths(),
    library_dirs=library_paths(),
    libraries=["torch", "torch_cpu"],
    extra_compile_args=[
        "-std=c++17",
        "-O3",
        "-g0",
        "-fopenmp-simd",
        "-ffp-contract=fast",
        "-Wno-psabi",
        TORCH_TARGET_VERSION,
    ],
    optional=True,
)
setup(ext_modules=[kernels], cmdclass={"build_ext": BuildLibrary})
