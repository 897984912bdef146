"""The flags in Megatron-LM's parser, what is refused with them, and a script that knows nothing of them."""

import argparse
import contextlib
import io
import sys
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from megatron_ptrl.errors import InputError
from megatron_ptrl.integrations.flags import add_ptrl_args, check_args

# The parts of megatron.training that are found by name, as core_v0.16 to core_v0.19 and main have them.
ARGUMENTS = """
import argparse
def add_megatron_arguments(parser):
    parser.add_argument("--mock-data", action="store_true")
    parser.add_argument("--yaml-cfg")
    return parser
def parse_args(extra_args_provider=None):
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    if extra_args_provider is not None:
        parser = extra_args_provider(parser)
    return parser.parse_args()
"""
GLOBAL_VARS = """
from types import SimpleNamespace
_GLOBAL_ARGS = None
def get_args():
    return _GLOBAL_ARGS
def get_tokenizer():
    return SimpleNamespace(vocab_size=500)
def set_args(args):
    global _GLOBAL_ARGS
    _GLOBAL_ARGS = args
def set_global_variables(args):
    set_args(args)
"""
SCRIPT = """
from megatron.training.arguments import parse_args
from megatron.training.global_vars import get_args, set_global_variables
if __name__ == "__main__":
    set_global_variables(parse_args(EXTRA))
    print("trained with", get_args().ptrl_beta)
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    training = tmp_path / "megatron" / "training"
    training.mkdir(parents=True)
    (training / "__init__.py").touch()
    (training / "arguments.py").write_text(ARGUMENTS)
    (training / "global_vars.py").write_text(GLOBAL_VARS)
    (tmp_path / "pretrain.py").write_text(SCRIPT.replace("EXTRA", ""))
    return str(tmp_path / "pretrain.py")


def run_main(rank: int, world_size: int, arguments: list[str]) -> tuple[str, Any]:
    """What the script printed and the loss that the models of the process then have, or how it ended."""
    from megatron_ptrl.training import host

    host.install_if_no_cuda()
    from megatron_ptrl.integrations import core_loss, megatron_lm

    path, argv, printed = list(sys.path), list(sys.argv), io.StringIO()
    megatron_lm._enabled = False
    try:
        with contextlib.redirect_stdout(printed):
            megatron_lm.main(arguments)
        active = core_loss._active
        assert active is not None
        return printed.getvalue(), (active.shaping, active.vocab_size(), active.weighting)
    except SystemExit as end:
        return printed.getvalue(), str(end)
    finally:
        core_loss.stop()
        sys.path[:], sys.argv[:] = path, argv
        for name in [name for name in sys.modules if name.startswith("megatron.training")]:
            del sys.modules[name]


def test_script_runs_with_the_flags(ranks, script):
    flags = ["--ptrl-beta", "-0.25", "--ptrl-lambda-head", "0.5", "--ptrl-top-k", "7"]
    printed, (shaping, vocab_size, weighting) = ranks.run(1, run_main, [script, *flags])[0]
    assert printed == "trained with -0.25\n" and vocab_size == 500 and weighting is None
    assert (shaping.beta, shaping.lambda_head, shaping.lambda_tail, shaping.top_k) == (-0.25, 0.5, 0.0, 7)


def test_flags_that_the_script_adds_itself(ranks, script):
    added = "__import__('megatron_ptrl.integrations.megatron_lm', fromlist=['x']).add_ptrl_args"
    Path(script).write_text(SCRIPT.replace("EXTRA", added))
    assert ranks.run(1, run_main, [script, "--ptrl-beta", "0.5"])[0][0] == "trained with 0.5\n"


def test_refusals_end_the_script_with_a_line(ranks, script):
    answer = ranks.run(1, run_main, [script, "--mock-data", "--ptrl-remit-sidecar", "x"])[0]
    line = "megatron_lm: --mock-data with --ptrl-remit-sidecar: its tokens are in no data set that could be scored"
    assert answer == ("", line)
    answer = ranks.run(1, run_main, [script, "--ptrl-remit-sidecar", "nowhere"])[0]
    assert answer[1].startswith("megatron_lm: nowhere.json: no such file")
    assert "no such file; expected pretrain_gpt.py" in ranks.run(1, run_main, ["nowhere.py"])[0][1]


def test_without_megatron_training(ranks, tmp_path):
    (tmp_path / "lonely.py").touch()
    answer = ranks.run(1, run_main, [str(tmp_path / "lonely.py")])[0][1]
    assert "No module named 'megatron.training'" in answer and "expected Megatron-LM's folder" in answer


def late(rank: int, world_size: int, folder: str) -> str:
    from megatron_ptrl.integrations import megatron_lm

    sys.path.insert(0, folder)
    from megatron.training import global_vars  # type: ignore[import-not-found]

    megatron_lm._enabled = False
    try:
        global_vars.set_args(argparse.Namespace())
        megatron_lm.enable()
    except InputError as error:
        return str(error)
    finally:
        sys.path.remove(folder)
        for name in [name for name in sys.modules if name.startswith("megatron.training")]:
            del sys.modules[name]
    return "nothing was refused"


def test_enabled_too_late(ranks, script):
    assert "call it before pretrain" in ranks.run(1, late, str(Path(script).parent))[0]


def parsed(*flags: str, **megatrons: Any) -> argparse.Namespace:
    args = add_ptrl_args(argparse.ArgumentParser()).parse_args(flags)
    return argparse.Namespace(**vars(args), **megatrons)


class Scope(Enum):
    """Megatron-Core's CudaGraphScope, in which full_iteration_inference is another one than full_iteration."""

    full_iteration = 1
    attn = 2
    full_iteration_inference = 3


SCOPE = "--cuda-graph-scope full_iteration with --ptrl-remit-sidecar: its batches come from buffers"
SIDECAR = ("--ptrl-remit-sidecar", "x")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (parsed("--ptrl-beta", "-1"), "beta is -1.0; expected > -1"),
        (parsed("--ptrl-top-k", "0"), "top_k is 0"),
        (parsed(*SIDECAR, "--ptrl-remit-epsilon", "1"), "--ptrl-remit-epsilon is 1.0; expected 0 or more, below 1"),
        (parsed("--ptrl-remit-epsilon", "0.1"), "without --ptrl-remit-sidecar"),
        (parsed(cross_entropy_fusion_impl="linear"), "--cross-entropy-fusion-impl linear with megatron_ptrl"),
        (parsed(overlap_moe_expert_parallel_comm=True), "--overlap-moe-expert-parallel-comm with megatron_ptrl"),
        (parsed(logits_load_dir="teacher"), "--logits-load-dir teacher with megatron_ptrl: distillation"),
        (parsed(*SIDECAR, sft=True), "--sft with --ptrl-remit-sidecar"),
        (parsed(*SIDECAR, cuda_graph_impl="full_iteration"), "--cuda-graph-impl full_iteration with"),
        (parsed(*SIDECAR, cuda_graph_impl="local", cuda_graph_scope=[Scope.attn, Scope.full_iteration]), SCOPE),
        (parsed(*SIDECAR, cuda_graph_impl="local", cuda_graph_scope=Scope.full_iteration), SCOPE),
        (parsed(*SIDECAR, cuda_graph_impl="local", cuda_graph_scope="attn,full_iteration"), SCOPE),
    ],
)
def test_refused_settings(args, message):
    with pytest.raises(InputError) as error:
        check_args(args)
    assert message in str(error.value)


def test_allowed_settings():
    check_args(parsed(sft=True, cross_entropy_fusion_impl="te", mock_data=True, logits_load_dir=None))
    check_args(parsed(cuda_graph_impl="full_iteration"))
    check_args(parsed(*SIDECAR, cuda_graph_impl="none", cuda_graph_scope=[Scope.full_iteration]))
    for scope in ([], [Scope.attn, Scope.full_iteration_inference], "full"):
        check_args(parsed(*SIDECAR, cuda_graph_impl="local", cuda_graph_scope=scope))
    check_args(parsed(*SIDECAR, cuda_graph_impl="local", sft=False, cross_entropy_fusion_impl="native"))
