"""The reward-shaped loss and ReMiT's weights in Megatron-LM's own `pretrain_gpt.py`, core_v0.16 and later.

    from megatron_ptrl.integrations import megatron_lm; megatron_lm.enable()        # at the top of the script

    torchrun ... -m megatron_ptrl.integrations.megatron_lm pretrain_gpt.py ARGUMENTS  # or without touching it

Megatron's arguments then know the `--ptrl-*` flags; at their defaults the run is the same as without.
"""

import argparse
import runpy
import sys
from collections.abc import Sequence
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_ptrl.config import RewardShaping
from megatron_ptrl.errors import InputError
from megatron_ptrl.integrations.flags import add_ptrl_args, check_args

__all__ = ["add_ptrl_args", "enable", "main"]

_enabled = False


def enable() -> None:
    """Make the Megatron-LM job of this process use the `--ptrl-*` flags. Before its arguments are parsed; once or more.

    Adds the flags to Megatron's own, so that `add_ptrl_args` need not be given as its `extra_args_provider`, and, as
    soon as Megatron has its arguments, checks them and puts the loss and the averages of the log into its models and
    schedules. Raises InputError where `megatron.training` cannot be imported or has parsed its arguments already, and
    later, from within Megatron, for settings that cannot be exact.
    """
    global _enabled
    if _enabled:
        return
    try:
        arguments: Any = import_module("megatron.training.arguments")
        global_vars: Any = import_module("megatron.training.global_vars")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("megatron"):
            raise
        raise InputError(
            f"{error}; expected Megatron-LM's folder on PYTHONPATH or as that of the script, or a megatron-core of "
            "0.17 or newer, which has megatron.training in it"
        ) from error
    if global_vars._GLOBAL_ARGS is not None:
        raise InputError("megatron_lm.enable() came after Megatron had parsed its arguments; call it before pretrain")
    add_megatron_arguments, set_args = arguments.add_megatron_arguments, global_vars.set_args

    @wraps(add_megatron_arguments)
    def with_ptrl_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return add_ptrl_args(add_megatron_arguments(parser))

    @wraps(set_args)
    def set_and_apply(args: argparse.Namespace) -> None:
        _apply(args)
        set_args(args)

    arguments.add_megatron_arguments, global_vars.set_args = with_ptrl_args, set_and_apply
    _enabled = True


def _apply(args: argparse.Namespace) -> None:
    if not hasattr(args, "ptrl_beta"):
        raise InputError(
            "Megatron parsed its arguments without the --ptrl flags; call megatron_lm.enable() earlier, and use no "
            "--yaml-cfg"
        )
    check_args(args)
    # Megatron-Core, once it is known that there is something to do with it.
    from megatron_ptrl.integrations import core_loss
    from megatron_ptrl.integrations.core_remit import SideCarWeighting

    shaping = RewardShaping(args.ptrl_beta, args.ptrl_lambda_head, args.ptrl_lambda_tail, args.ptrl_top_k)
    weighting = None
    if args.ptrl_remit_sidecar:
        weighting = SideCarWeighting(args.ptrl_remit_sidecar, args.ptrl_remit_epsilon)
    core_loss.use(core_loss.Shaped(shaping, _vocab_size, weighting))


def _vocab_size() -> int:
    """Tokens of Megatron's tokenizer, before it padded them."""
    return import_module("megatron.training.global_vars").get_tokenizer().vocab_size


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m megatron_ptrl.integrations.megatron_lm SCRIPT ARGUMENTS`: SCRIPT as `python SCRIPT`, enabled."""
    script, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if not Path(script).is_file():
        raise SystemExit(f"megatron_lm: {script or 'no script'}: no such file; expected pretrain_gpt.py or its like")
    sys.path.insert(0, str(Path(script).resolve().parent))
    sys.argv = [script, *rest]
    try:
        enable()
        runpy.run_path(script, run_name="__main__")
    except InputError as error:
        raise SystemExit(f"megatron_lm: {error}") from error


if __name__ == "__main__":
    main()
