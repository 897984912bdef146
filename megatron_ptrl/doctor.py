"""What is installed and built here, what is missing, what that costs and which command brings it.

Every check imports what it reports on, because an installed package with a broken library is as good as missing.
"""

import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from megatron_ptrl.config import DoctorConfig
from megatron_ptrl.errors import InputError

TESTED_MEGATRON_CORE = ("0.16.1",)

# What a package built for another torch, CUDA or numpy raises while it is imported.
_BROKEN_IMPORT = (ImportError, OSError, RuntimeError, AttributeError)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the doctor's report."""

    name: str
    present: bool
    detail: str
    """Version and state, or why it is not there."""
    cost: str = ""
    """What is lost without it."""
    fix: str = ""
    """The command that brings it."""
    required: bool = False


def run(config: DoctorConfig) -> None:
    """Print every finding. Raises InputError when something is missing that no stage can do without."""
    findings = examine()
    if config.json:
        print("\n".join(json.dumps(asdict(finding)) for finding in findings))
    else:
        print(render(findings))
    missing = [finding for finding in findings if finding.required and not finding.present]
    if missing:
        names = ", ".join(finding.name for finding in missing)
        raise InputError(f"required and missing: {names}; each line above names the command that brings it")


def render(findings: list[Finding]) -> str:
    """One aligned line a finding; what is missing says what that costs and how to get it."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        mark = "ok" if finding.present else "MISSING" if finding.required else "-"
        cost = f"; without it: {finding.cost}" if finding.cost else ""
        fix = f"; get it: {finding.fix}" if finding.fix else ""
        lines.append(f"{mark:7}  {finding.name:{width}}  {finding.detail}{cost}{fix}")
    return "\n".join(lines)


def examine() -> list[Finding]:
    """Every finding, in the order they are printed. Takes some seconds: it imports what it reports on."""
    return [*_machine(), *_torch(), *_compilers(), _megatron_core(), _kernels(), *_packages(), *_extras(), _punkt_tab()]


def _machine() -> Iterator[Finding]:
    yield Finding(name="python", present=True, detail=f"{platform.python_version()} ({sys.executable})")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(name="cores", present=True, detail=f"{usable} usable of {os.cpu_count()}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield Finding(name="memory", present=True, detail=f"{memory:.1f} GiB")
    threads = os.environ.get("OMP_NUM_THREADS")
    detail = threads or "not set: torch takes every core, and torchrun sets 1 for each rank when it starts several"
    yield Finding(name="OMP_NUM_THREADS", present=True, detail=detail)


def _torch() -> Iterator[Finding]:
    torch = _import("torch")
    if isinstance(torch, str):
        yield Finding(name="torch", present=False, detail=torch, required=True, fix="pip install torch")
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield Finding(name="torch", present=True, detail=f"{torch.__version__}, {build}", required=True)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if gpus:
        detail = ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus))
        yield Finding(name="GPUs", present=True, detail=detail)
        return
    driver = shutil.which("nvidia-smi") is not None
    yield Finding(
        name="GPUs",
        present=False,
        detail="none that torch sees, although there is an NVIDIA driver" if driver else "none",
        cost="training runs on the CPU over gloo: right for small models and tests, slow for others",
        fix="install a CUDA build of torch" if driver and not torch.version.cuda else "",
    )


def _compilers() -> Iterator[Finding]:
    compiler = os.environ.get("CXX") or "c++"
    yield _program(
        "C++ compiler",
        compiler,
        cost="the kernels cannot be built",
        fix="apt-get install g++, or set CXX",
    )
    yield _program(
        "nvcc",
        _nvcc(),
        cost="the CUDA kernels cannot be built, on a GPU the loss runs in plain torch",
        fix="install the CUDA toolkit of torch's CUDA version and set CUDA_HOME",
    )


def _nvcc() -> str:
    """Where setup.py finds it, if it is there."""
    beside = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    return beside if os.path.exists(beside) else shutil.which("nvcc") or beside


def _program(name: str, command: str, *, cost: str, fix: str) -> Finding:
    path = shutil.which(command)
    if path is None:
        return Finding(name=name, present=False, detail=f"{command} is not there", cost=cost, fix=fix)
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    lines = (answer.stdout or answer.stderr).strip().splitlines()
    stated = next((line for line in lines if "release" in line), lines[0] if lines else "gives no version")
    return Finding(name=name, present=True, detail=f"{stated} ({path})")


def _megatron_core() -> Finding:
    fix = f"pip install megatron-core=={TESTED_MEGATRON_CORE[-1]}"
    megatron = _import("megatron.core")
    if isinstance(megatron, str):
        return Finding(name="megatron-core", present=False, detail=megatron, required=True, fix=fix)
    tested = megatron.__version__ in TESTED_MEGATRON_CORE
    detail = megatron.__version__ + ("" if tested else f", not tested here: {', '.join(TESTED_MEGATRON_CORE)} is")
    return Finding(name="megatron-core", present=True, detail=detail, required=True, fix="" if tested else fix)


def _kernels() -> Finding:
    cost = "the losses run in torch operators, slower and with more memory"
    fix = "pip install --no-build-isolation -e . (in the source tree, with a C++ compiler)"
    ops = _import("megatron_ptrl.ops")
    if isinstance(ops, str):
        return Finding(name="kernels", present=False, detail=ops, cost=cost, fix=fix)
    if os.environ.get("MEGATRON_PTRL_KERNELS") == "0":
        detail, fix = "turned off by MEGATRON_PTRL_KERNELS=0", "unset MEGATRON_PTRL_KERNELS"
        return Finding(name="kernels", present=False, detail=detail, cost=cost, fix=fix)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the line below says the same
        loaded = ops.load_kernels()
    if not loaded:
        detail = f"{ops.LIBRARY} does not load" if ops.LIBRARY.exists() else f"{ops.LIBRARY.name} was not built"
        return Finding(name="kernels", present=False, detail=detail, cost=cost, fix=fix)
    serves = importlib.import_module("torch")._C._dispatch_has_kernel_for_dispatch_key
    if serves("megatron_ptrl::reward_shaped_ce_stats", "CUDA"):
        return Finding(name="kernels", present=True, detail=f"{ops.LIBRARY.name} loads, for CPU and CUDA")
    reason, fix = _why_no_cuda_kernels()
    return Finding(
        name="kernels", present=True, detail=f"{ops.LIBRARY.name} loads, for CPU; not CUDA: {reason}", fix=fix
    )


def _why_no_cuda_kernels() -> tuple[str, str]:
    """What setup.py decides by, and what would change it."""
    if importlib.import_module("torch").version.cuda is None:
        return "torch is a CPU build, which has no use for them", ""
    if shutil.which(_nvcc()) is None:
        return "there is no nvcc", "install the CUDA toolkit, then megatron_ptrl again"
    reason = "they did not build, or MEGATRON_PTRL_CUDA was 0"
    return reason, "MEGATRON_PTRL_CUDA=1 pip install -v --no-build-isolation -e . (in the source tree)"


def _packages() -> Iterator[Finding]:
    yield _package(
        "transformer-engine",
        "transformer_engine.pytorch",
        cost="layers run unfused, no ring of context-parallel ranks, no FP8",
        fix="pip install --no-build-isolation 'transformer-engine[pytorch]' (needs a GPU and nvcc)",
    )
    yield _package(
        "apex",
        "apex",
        cost="the optimizer and gradient clipping are unfused, unless transformer-engine is there",
        fix="build NVIDIA/apex from source, with --cpp_ext --cuda_ext",
    )
    yield _package(
        "flash-attn",
        "flash_attn",
        cost="transformer-engine takes cuDNN's fused attention instead",
        fix="pip install --no-build-isolation flash-attn (needs a GPU and nvcc)",
    )
    for name, cost in (
        ("numpy", "no data set can be read"),
        ("tokenizers", "no training and no reading of a tokenizer"),
        ("jsonargparse", "no command line"),
        ("tqdm", "no progress bars"),
        ("psutil", "Megatron-Core cannot save checkpoints"),
    ):
        yield _package(name, cost=cost, fix=f"pip install {name}", required=True)
    for name, cost, fix in (
        ("matplotlib", "no plots", "pip install matplotlib"),
        ("tensorboard", "no event files, log.tensorboard has no effect", "pip install tensorboard"),
        ("pyarrow", "no Parquet input", "pip install pyarrow"),
        ("zstandard", "no .zst input", "pip install zstandard"),
        ("wandb", "log.wandb_project cannot be used", "pip install wandb"),
    ):
        yield _package(name, cost=cost, fix=fix)


def _extras() -> Iterator[Finding]:
    """The packages that stages need beyond the plain installation, by the extra that brings them."""
    for name, extras, cost in (
        ("datatrove", "tpt,seg", "neither ptrl think nor ptrl segment"),
        (
            "aiohttp",
            "tpt,seg,rl",
            "no ptrl segment, no servers in ptrl think, no judge.kind openai in ptrl rl and evaluate",
        ),
        ("rapidfuzz", "rl", "no judge.kind lexical in ptrl rl and evaluate"),
        ("math-verify", "rl", "verify.math has to be false: answers that are written differently are not the same"),
        ("sentencex", "sentencex", "split.sentences has to be punkt, which is some 20 times slower"),
        ("scipy", "eval", "no ptrl report --scaling"),
        ("lm-eval", "lm_eval", "no harness.tasks in ptrl evaluate"),
    ):
        yield _package(name, name.replace("-", "_"), cost=cost, fix=_install(extras))


def _package(name: str, module: str | None = None, *, cost: str, fix: str, required: bool = False) -> Finding:
    found = _import(module or name)
    if isinstance(found, str):
        return Finding(name=name, present=False, detail=found, cost=cost, fix=fix, required=required)
    return Finding(name=name, present=True, detail=_version(name, found), required=required)


def _punkt_tab() -> Finding:
    name, cost = (
        "nltk punkt_tab",
        "ptrl segment's Punkt learns its abbreviations from a sample of the corpus, in seconds",
    )
    nltk = _import("nltk")
    if isinstance(nltk, str):
        return Finding(
            name=name,
            present=False,
            detail=nltk,
            cost="split.sentences has to be sentencex in ptrl segment",
            fix=_install("seg"),
        )
    try:
        where = nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        detail, fix = f"nltk {nltk.__version__} without its data", "python -m nltk.downloader punkt_tab"
        return Finding(name=name, present=False, detail=detail, cost=cost, fix=fix)
    return Finding(name=name, present=True, detail=f"nltk {nltk.__version__}, data in {where}")


def _install(extras: str) -> str:
    return f"pip install 'megatron-ptrl[{extras}]'"


def _import(name: str) -> ModuleType | str:
    """The module, or in one line why it cannot be had."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        absent = error.name is not None and (name == error.name or name.startswith(error.name + "."))
        return "not installed" if absent else f"broken: {error}"
    except _BROKEN_IMPORT as error:
        return f"broken: {type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _version(distribution: str, module: ModuleType) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return getattr(module, "__version__", "version unknown")
