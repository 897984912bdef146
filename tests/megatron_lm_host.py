"""A script of Megatron-LM on a machine without CUDA: `python megatron_lm_host.py plain|enabled CHECKOUT SCRIPT ARGS`.

Beyond what the host layer answers for Megatron-Core, `megatron.training` asserts that there is CUDA and compiles
kernels for it, and its newer versions take a name from `typing` that Python has from 3.12 on.

With FUSED_ADAM in the environment it finds an optimizer where Apex's would be.
With CHECK_ALIGNMENT in the environment every training batch must carry -(label + 1) / 1024 as its log-probabilities.
"""

import contextlib
import os
import runpy
import sys
import typing
from multiprocessing import spawn

import fused_adam
import torch
import typing_extensions

from megatron_ptrl.training import host


def stand_in() -> None:
    typing.override = typing_extensions.override  # type: ignore[attr-defined]
    host.install_if_no_cuda()
    torch.cuda.is_available = lambda: True
    with contextlib.suppress(ImportError):
        from megatron.legacy import fused_kernels

        fused_kernels.load = lambda args: None


def spawn_without_script() -> None:
    """Megatron's writer of checkpoints starts a process that would import the script, without what stands in here."""
    prepare = spawn.get_preparation_data

    def prepared(name: str) -> dict[str, typing.Any]:
        return {key: value for key, value in prepare(name).items() if not key.startswith("init_main")}

    spawn.get_preparation_data = prepared


def check_alignment() -> None:
    from megatron_ptrl.integrations import core_remit

    draw = core_remit._Tap.__next__

    def checked(self: core_remit._Tap) -> typing.Any:
        batch = draw(self)
        if torch.is_grad_enabled():
            assert self.drawn is not None and torch.equal(self.drawn, -(batch["labels"] + 1) / 1024)
        assert core_remit.KEY not in batch
        print("aligned", "train" if self.drawn is not None else "held out", flush=True)
        return batch

    core_remit._Tap.__next__ = checked  # type: ignore[method-assign]


if __name__ == "__main__":
    mode, checkout, script, *arguments = sys.argv[1:]
    sys.path.insert(0, checkout)
    if "FUSED_ADAM" in os.environ:
        fused_adam.install()
    stand_in()
    spawn_without_script()
    if "CHECK_ALIGNMENT" in os.environ:
        check_alignment()
    path = os.path.join(checkout, script)
    if mode == "enabled":
        from megatron_ptrl.integrations import megatron_lm

        megatron_lm.main([path, *arguments])
    else:
        sys.argv = [path, *arguments]
        runpy.run_path(path, run_name="__main__")
