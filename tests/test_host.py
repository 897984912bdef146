"""The layer that answers CUDA calls on a CPU: what it redirects, and that a machine with CUDA never sees it."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

WITH_CUDA = """
import torch
from megatron_ptrl.training import host

torch.cuda.is_available = lambda: True
before = {name: getattr(torch.cuda, name) for name in dir(torch.cuda)}
assert host.install_if_no_cuda() is False
try:
    host.install()
except RuntimeError as error:
    assert "without CUDA" in str(error)
else:
    raise SystemExit("install() accepted a machine with CUDA")
assert not host.active()
assert {name: getattr(torch.cuda, name) for name in dir(torch.cuda)} == before
assert torch.overrides._get_current_function_mode_stack() == []
assert torch.zeros(1).type() == "torch.FloatTensor"
"""


def test_a_machine_with_cuda_is_left_alone():
    result = subprocess.run([sys.executable, "-c", WITH_CUDA], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def redirected(rank: int, world_size: int) -> dict[str, object]:
    from megatron_ptrl.training import host

    first, again = host.install_if_no_cuda(), host.install_if_no_cuda()
    x = torch.arange(4.0)
    event, later = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    event.record()
    later.record()
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    drawn = torch.rand(5)
    torch.cuda.set_rng_state(state)
    drawn_again = torch.rand(5)
    made = {
        "zeros": torch.zeros(2, device="cuda"),
        "tensor": torch.tensor([1, 2], device=torch.device("cuda", 0)),
        "current": torch.empty(2, device=torch.cuda.current_device()),
        "cuda": x.cuda(),
        "cuda 0": x.cuda(0, non_blocking=True),
        "to": x.to("cuda"),
        "to device=": x.to(device="cuda:0", dtype=torch.float64),
        "like": torch.zeros_like(x, device="cuda"),
        "module": torch.nn.Linear(2, 2, device="cuda").weight,
    }
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    return {
        "active": (first, again, host.active(), len(host._installed)),
        "available": torch.cuda.is_available(),
        "devices": {name: tensor.device.type for name, tensor in made.items()},
        "dtype": made["to device="].dtype,
        "same": made["cuda"] is x,
        "types": (x.type(), x.bfloat16().type(), x.type(torch.float64).dtype),
        "milliseconds": event.elapsed_time(later),
        "random": torch.equal(drawn_again, drawn),
        "memory": torch.cuda.max_memory_allocated(),
    }


def test_what_names_a_cuda_device_stays_on_the_cpu(ranks):
    if torch.cuda.is_available():
        pytest.skip("the layer refuses a machine with CUDA")
    answer = ranks.run(1, redirected)[0]
    assert answer["active"] == (True, True, True, 1)
    assert answer["available"] is False
    assert set(answer["devices"].values()) == {"cpu"}
    assert answer["dtype"] == torch.float64 and answer["same"]
    assert answer["types"] == ("torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor", torch.float64)
    assert 0 <= answer["milliseconds"] < 1000
    assert answer["random"] and answer["memory"] == 0


def waiting_threads(rank: int, world_size: int) -> tuple[list[int], list[float], str]:
    """Waiting threads after each of many groups; their sums; a group's timeout."""
    from megatron_ptrl.training import host

    host.install_if_no_cuda()
    x, threads, sums = torch.ones(2), [], []
    for number in range(40):
        # A group of one rank, then those of all.
        group = dist.new_group(list(range(world_size if number else 1)), timeout=timedelta(seconds=77))
        if number == 0:
            continue
        y = x.clone()
        dist.all_reduce(y, group=group)
        sums.append(float(y[0]))
        names = [Path(f"/proc/self/task/{task}/comm").read_text() for task in os.listdir("/proc/self/task")]
        threads.append(sum("gloo_tcp_loop" in name for name in names))
    return threads, sums, str(group._get_backend(torch.device("cpu")).options._timeout)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the layer is for machines without CUDA")
def test_process_groups_share_the_threads_that_wait(ranks):
    for threads, sums, timeout in ranks.run(2, waiting_threads):
        assert 15 < threads[-1] < 22 and sums == [2.0] * 39 and timeout == "0:01:17"


def fused_gelu(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    from megatron_ptrl.training import host

    host.install_if_no_cuda()
    from megatron.core.fusions.fused_bias_gelu import bias_gelu_impl

    x, bias = torch.linspace(-4, 4, 64).reshape(2, 32).requires_grad_(), torch.linspace(-1, 1, 32)
    value = bias_gelu_impl(x, bias)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def test_functions_that_megatron_core_compiles_run_as_they_are_written(ranks):
    x, bias = torch.linspace(-4, 4, 64).reshape(2, 32).requires_grad_(), torch.linspace(-1, 1, 32)
    expected = torch.nn.functional.gelu(x + bias, approximate="tanh")
    value, gradient = ranks.run(1, fused_gelu)[0]
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), x)[0], atol=1e-5, rtol=1e-5)
