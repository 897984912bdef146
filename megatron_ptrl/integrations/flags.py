"""The flags that Megatron-LM's arguments get, and the settings that they are refused with."""

import argparse
from typing import Any

from megatron_ptrl.config import RewardShaping
from megatron_ptrl.errors import InputError

PREFIX = "--ptrl-"
EPSILON = 0.2
_DEFAULTS = RewardShaping()


def add_ptrl_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """An `extra_args_provider` of Megatron-LM: adds the `--ptrl-*` flags, where they are not there yet."""
    if any(option.startswith(PREFIX) for option in parser._option_string_actions):
        return parser
    group = parser.add_argument_group(title="megatron_ptrl", description="pre-training data as a reinforcement signal")
    group.add_argument(
        "--ptrl-beta",
        type=float,
        default=_DEFAULTS.beta,
        help="exponent of the positive reward, > -1: below 0 the distribution sharpens, above 0 it flattens",
    )
    group.add_argument(
        "--ptrl-lambda-head",
        type=float,
        default=_DEFAULTS.lambda_head,
        help="reward of the other tokens among the top-k",
    )
    group.add_argument(
        "--ptrl-lambda-tail",
        type=float,
        default=_DEFAULTS.lambda_tail,
        help="reward of the tokens outside of the top-k",
    )
    group.add_argument(
        "--ptrl-top-k",
        type=int,
        default=_DEFAULTS.top_k,
        help="how many of the most probable tokens form the head; ties with the last one are all in",
    )
    group.add_argument(
        "--ptrl-remit-sidecar",
        nargs="+",
        metavar="PREFIX",
        help="what `ptrl score` wrote for each prefix of the training data, in any order: weights the tokens by ReMiT",
    )
    group.add_argument(
        "--ptrl-remit-epsilon",
        type=float,
        default=EPSILON,
        help="ReMiT's weights lie in [1 - epsilon, 1 + epsilon]",
    )
    return parser


# (attribute of Megatron's arguments, values that are refused or None for any that is set, why and what instead)
_REFUSED: tuple[tuple[str, tuple[Any, ...] | None, str], ...] = (
    ("yaml_cfg", None, "a YAML file replaces all flags, those of megatron_ptrl too; use flags"),
    ("use_legacy_models", None, "its models reach their loss in another way; leave it out"),
    ("cross_entropy_fusion_impl", ("linear",), "it computes no logits that could be shaped; use native"),
    ("logits_load_dir", None, "distillation replaces the next-token loss; use one of the two"),
    ("logits_save_dir", None, "the teacher's pass has no next-token loss; run it without megatron_ptrl"),
    ("export_kd_teacher_load", None, "distillation replaces the next-token loss; use one of the two"),
    ("perform_rl_step", None, "its loss is no next-token loss; use one of the two"),
    (
        "overlap_moe_expert_parallel_comm",
        None,
        "its schedule hides the loss mask that the averages in the log are taken with; leave it out",
    ),
)
_REFUSED_WITH_SIDECAR: tuple[tuple[str, tuple[Any, ...] | None, str], ...] = (
    ("mock_data", None, "its tokens are in no data set that could be scored"),
    ("sft", None, "its rows are packed from conversations, not cut from the scored tokens"),
    ("fim_data", None, "it reorders the tokens that were scored"),
    ("hybrid_context_parallel", None, "it cuts the rows in a way that the weights do not know"),
    ("dataloader_inter_document_masking", None, "it packs the rows into one"),
)


NOT_CAPTURED = "its batches come from buffers of the graph, which the weights were not tested with; capture less"


def captured_iteration(settings: Any) -> tuple[str, str] | None:
    """Name and value of the setting that puts the whole iteration into a CUDA graph; None where none does.

    settings: Megatron's arguments, or the config of a model
    From core_v0.18 on it is cuda_graph_impl; before, cuda_graph_scope has it among names or members of an enum.
    """
    impl = getattr(settings, "cuda_graph_impl", None)
    if impl == "full_iteration":
        return "cuda_graph_impl", impl
    scope = getattr(settings, "cuda_graph_scope", None) or []
    scopes = scope.split(",") if isinstance(scope, str) else scope if isinstance(scope, list) else [scope]
    if impl != "none" and "full_iteration" in [getattr(one, "name", one) for one in scopes]:
        return "cuda_graph_scope", "full_iteration"
    return None


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError where Megatron's arguments ask for what the loss or the weights cannot be exact with."""
    RewardShaping(args.ptrl_beta, args.ptrl_lambda_head, args.ptrl_lambda_tail, args.ptrl_top_k)
    if not 0 <= args.ptrl_remit_epsilon < 1:
        raise InputError(f"--ptrl-remit-epsilon is {args.ptrl_remit_epsilon}; expected 0 or more, below 1")
    if args.ptrl_remit_epsilon != EPSILON and not args.ptrl_remit_sidecar:
        raise InputError(f"--ptrl-remit-epsilon is {args.ptrl_remit_epsilon} without --ptrl-remit-sidecar; set both")
    _refuse(args, _REFUSED, "megatron_ptrl")
    if args.ptrl_remit_sidecar:
        _refuse(args, _REFUSED_WITH_SIDECAR, "--ptrl-remit-sidecar")
        if captured := captured_iteration(args):
            raise InputError(f"{_flag(captured[0])} {captured[1]} with --ptrl-remit-sidecar: {NOT_CAPTURED}")


def _refuse(args: argparse.Namespace, refused: tuple[tuple[str, tuple[Any, ...] | None, str], ...], ours: str) -> None:
    for name, values, reason in refused:
        value = getattr(args, name, None)
        if value in values if values is not None else value:
            shown = _flag(name) if value is True else f"{_flag(name)} {value}"
            raise InputError(f"{shown} with {ours}: {reason}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
