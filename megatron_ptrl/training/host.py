"""Megatron-Core on a machine without CUDA: the places where it names the device are answered by the CPU.

`install()` is called once, before Megatron-Core is imported, and only where torch sees no CUDA device; with one it
refuses. What it changes, all of it in this file:
  - torch calls that name a CUDA device (`device="cuda"`, `.cuda()`, `.to("cuda")`) or pinned memory stay on the CPU,
    and `Tensor.type()` gives the "torch.cuda.*" name that Megatron's optimizer compares with;
  - `torch.cuda`'s queries, streams, events, memory counters and random-number calls get a CPU answer;
    `torch.cuda.is_available()` stays False;
  - Megatron's random-number tracker keeps the CPU generator's state, its inference communication takes CPU tensors,
    and its norm of the gradient is summed in fp64;
  - gloo's process groups share devices, so that fewer threads look for messages.
The redirection is per thread: a thread that Megatron starts by itself does not have it.
"""

import contextlib
import importlib
import itertools
import os
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

SHARED_DEVICES = 16
_CPU = torch.device("cpu")
_installed: list[TorchFunctionMode] = []


def install_if_no_cuda() -> bool:
    """Install the host layer where torch sees no CUDA device. Returns whether it is active. Call again at will."""
    if torch.cuda.is_available():
        return False
    if not _installed:
        install()
    return True


def install() -> None:
    """Patch torch.cuda and Megatron-Core for this process and redirect this thread's CUDA calls; there is no undo.

    Raises RuntimeError where torch has a CUDA device: there the real one must be used.
    """
    if torch.cuda.is_available():
        raise RuntimeError("the host layer is for machines without CUDA, and torch sees a CUDA device here")
    _patch_torch_cuda()
    _patch_megatron()
    _patch_gloo()
    # Megatron-Core's fused functions run as they are written: inductor would ask the device for what it is made of.
    torch.compiler.set_stance("force_eager")
    mode = _OnHost()
    mode.__enter__()
    _installed.append(mode)


def active() -> bool:
    """Whether CUDA calls of this process are answered by the CPU."""
    return bool(_installed)


def undirected() -> Any:
    """A context whose torch calls are not looked at for a CUDA device: for many small ones that name none."""
    return torch._C.DisableTorchFunction() if active() else contextlib.nullcontext()


class _OnHost(TorchFunctionMode):
    """Sends every torch call that names a CUDA device to the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        if "device" in kwargs:
            kwargs = {**kwargs, "device": _host_device(kwargs["device"])}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to:
            args = tuple(_host_device(argument) for argument in args)
        return func(*args, **kwargs)


def _host_device(device: Any) -> Any:
    names_cuda = isinstance(device, (str, torch.device)) and str(device).startswith("cuda")
    return _CPU if names_cuda else device


class _Event:
    """torch.cuda.Event by the wall clock."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = 0.0

    def record(self, *args: Any) -> None:
        self._seconds = time.perf_counter()

    def elapsed_time(self, later: "_Event") -> float:
        return (later._seconds - self._seconds) * 1e3

    def synchronize(self) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def query(self) -> bool:
        return True


class _Stream:
    """torch.cuda.Stream where every call has finished when it returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *exception: Any) -> None: ...

    def wait_stream(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, *args: Any) -> _Event:
        event = _Event()
        event.record()
        return event


class _Properties:
    """A device that claims no special hardware."""

    name, major, minor, total_memory, multi_processor_count = "cpu", 9, 0, 1 << 34, 1


def _always(answer: Any) -> Callable[..., Any]:
    # One function per name: torch.compile keeps tables by function and refuses one under two names.
    return lambda *args, **kwargs: answer


def _patch_torch_cuda() -> None:
    cuda: Any = torch.cuda
    answers = {
        "current_device": _CPU,
        "device_count": 1,
        "get_device_name": "cpu",
        "get_device_capability": (9, 0),
        "get_device_properties": _Properties(),
        "is_current_stream_capturing": False,
        "current_stream": _Stream(),
        "default_stream": _Stream(),
    }
    answers |= dict.fromkeys(("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"))
    answers |= dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), 0)
    for name, answer in answers.items():
        setattr(cuda, name, _always(answer))
    cuda.memory_stats = lambda *args, **kwargs: defaultdict(int)
    cuda.nvtx.range_push, cuda.nvtx.range_pop = _always(None), _always(None)
    cuda.Event, cuda.Stream = _Event, _Stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    for name in ("IntTensor", "LongTensor", "FloatTensor", "DoubleTensor", "ByteTensor"):
        setattr(cuda, name, getattr(torch, name))


def _l2_norm(
    chunk_size: int, overflow: torch.Tensor, tensors: list[list[torch.Tensor]], per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """Norm of all tensors, fp32 (1,). torch's fp32 norm on a CPU is 1e-5 off for an embedding's few large rows."""
    norms = torch.stack([torch.linalg.vector_norm(x, dtype=torch.float64) for group in tensors for x in group])
    return torch.linalg.vector_norm(norms).float().view(1), None


def _patch_megatron() -> None:
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    clip_grads: Any = importlib.import_module("megatron.core.optimizer.clip_grads")
    clip_grads.l2_norm_impl = _l2_norm
    communication: Any = importlib.import_module("megatron.core.inference.communication_utils")
    communication._is_cuda = communication._is_cuda_contiguous = lambda tensor: None


def _patch_gloo() -> None:
    """Let gloo's process groups that are made from now on share devices: those of one rank one, the others 16.

    Each would have its own, with a thread that wakes a hundred times a second: Megatron's 80 groups keep 6 % of a core
    busy in every rank that waits. One device for all of them would make their collectives wait for one another.
    """
    from torch._C._distributed_c10d import ProcessGroupGloo

    group: Any = ProcessGroupGloo
    make = group.__init__
    devices: list[list[Any]] = []
    turn = itertools.count()

    def new_devices() -> list[Any]:
        interfaces = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
        return [group.create_device(interface=name) for name in interfaces] or [group.create_default_device()]

    def init(self: Any, store: Any, rank: int, size: int, *args: Any, **kwargs: Any) -> None:
        if args or set(kwargs) != {"timeout"}:
            return make(self, store, rank, size, *args, **kwargs)
        place = 1 + next(turn) % SHARED_DEVICES if size > 1 else 0
        while len(devices) <= place:
            devices.append(new_devices())
        options = group._Options()
        options._devices, options._timeout = devices[place], kwargs["timeout"]
        make(self, store, rank, size, options)

    group.__init__ = init
