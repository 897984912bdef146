"""Functions by Megatron's signatures, and a forward step by Megatron-Bridge's."""

import ast
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate
from sidecars import write_by_token

from megatron_ptrl import RewardShaping
from megatron_ptrl.errors import InputError
from megatron_ptrl.integrations import cross_entropy
from megatron_ptrl.reference import reward_shaped_cross_entropy

SHAPING = RewardShaping(beta=-0.25, lambda_head=0.3, lambda_tail=-0.5, top_k=5)


def signatures(rank: int, world_size: int) -> list[dict[str, Any]]:
    """Megatron's parameters and their defaults, in order."""
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    functions = (fused_vocab_parallel_cross_entropy, vocab_parallel_cross_entropy)
    return [{p.name: p.default for p in inspect.signature(f).parameters.values()} for f in functions]


def test_signatures_are_megatrons(ranks):
    ours = (cross_entropy.fused_vocab_parallel_cross_entropy, cross_entropy.vocab_parallel_cross_entropy)
    for function, theirs in zip(ours, ranks.run(1, signatures)[0], strict=True):
        parameters = list(inspect.signature(function).parameters.values())
        positional = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
        assert list(positional)[: len(theirs)] == list(theirs)
        for name, default in theirs.items():
            assert (positional[name] is inspect.Parameter.empty) == (default is inspect.Parameter.empty)


def sharded(rank: int, world_size: int, logits: torch.Tensor, target: torch.Tensor) -> list[torch.Tensor]:
    """(loss, gradient) of ours and of Megatron's on this rank's columns, the group given or Megatron's own."""
    from megatron_ptrl.training import host

    host.install_if_no_cuda()
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(world_size)
    group, found = parallel_state.get_tensor_model_parallel_group(), []
    for function in (
        partial(cross_entropy.fused_vocab_parallel_cross_entropy, tp_group=group),
        cross_entropy.vocab_parallel_cross_entropy,
        tensor_parallel.vocab_parallel_cross_entropy,
        partial(cross_entropy.vocab_parallel_cross_entropy, shaping=SHAPING, vocab_size=30),
    ):
        # Megatron's writes over fp32 logits.
        shard = logits.chunk(world_size, dim=-1)[rank].clone().requires_grad_()
        loss = function(shard.clone(), target)
        loss.sum().backward()
        found += [loss.detach(), shard.grad]
    return found


@pytest.mark.parametrize("tp", [1, 2])
def test_functions_are_megatrons_and_the_shaped_ones(ranks, tp):
    torch.manual_seed(tp)
    logits, target = 3 * torch.randn(7, 2, 32), torch.randint(30, (7, 2))
    every = ranks.run(tp, sharded, logits, target)
    expected = []
    for shaping in (RewardShaping(), SHAPING):
        leaf = logits.double().requires_grad_()
        loss = reward_shaped_cross_entropy(leaf, target, shaping, 30)
        loss.sum().backward()
        expected.append((loss.detach(), leaf.grad))
    for number, exact in ((0, 0), (1, 0), (3, 1)):
        theirs, loss = every[0][4], every[0][2 * number]
        grad = torch.cat([answer[2 * number + 1] for answer in every], dim=-1)
        assert_as_accurate(loss, theirs if exact == 0 else expected[1][0].float(), expected[exact][0])
        torch.testing.assert_close(grad.double(), expected[exact][1], rtol=1e-5, atol=1e-6)


def test_prompts_and_smoothing():
    logits, target = torch.randn(4, 1, 9, requires_grad=True), torch.tensor([[2], [-100], [8], [-100]])
    loss = cross_entropy.vocab_parallel_cross_entropy(logits, target)
    loss.sum().backward()
    assert loss[1] == 0 == loss[3] and loss[0] > 0 and not logits.grad[1].any() and logits.grad[2].any()
    with pytest.raises(InputError, match="label_smoothing is 0.1; expected 0"):
        cross_entropy.vocab_parallel_cross_entropy(logits, target, 0.1)


def test_documented_block_runs():
    page = (Path(__file__).parents[1] / "docs" / "drop_in.md").read_text()
    block = re.search(r"<!-- run by tests/test_drop_in_functions.py -->\n```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(block[1], names)
    logp = names["logits"].log_softmax(-1).gather(-1, names["target"][..., None])[..., 0]
    expected = -((1 - (-torch.expm1(logp)) ** -0.25) * logp).exp() * logp
    torch.testing.assert_close(names["loss"], expected)


def test_a_job_needs_nothing_that_it_does_not_have():
    """`pip install --no-deps` leaves these out, which the command line wants and the drop-in does not."""
    missing = ("jsonargparse", "tokenizers", "matplotlib", "tensorboard", "tqdm", "psutil", "jinja2")
    parts = ("megatron_lm", "core_loss", "core_remit", "cross_entropy")
    code = f"import sys; sys.modules.update(dict.fromkeys({missing})); from megatron_ptrl.integrations import "
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code + ", ".join(parts)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


BRIDGE = os.environ.get("MEGATRON_BRIDGE")
"""A folder with megatron/bridge in it, where the package is not installed."""


def bridge_folder() -> Path:
    if BRIDGE:
        return Path(BRIDGE) / "megatron" / "bridge"
    if importlib.util.find_spec("megatron.bridge") is None:
        pytest.skip("megatron-bridge is not installed, and MEGATRON_BRIDGE names no folder with its source")
    return Path(importlib.util.find_spec("megatron.bridge").submodule_search_locations[0])


def definition(path: Path, name: str) -> ast.FunctionDef:
    nodes = ast.walk(ast.parse(path.read_text()))
    return next(node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == name)


def test_bridge_has_what_the_provider_uses():
    """Read, not imported: the package needs Transformer Engine, Mamba's kernels and more."""
    training = bridge_folder() / "training"
    step = definition(training / "gpt_step.py", "forward_step")
    assert [argument.arg for argument in step.args.args] == ["state", "data_iterator", "model", "return_schedule_plan"]
    made = ast.unparse(definition(training / "gpt_step.py", "_create_loss_function"))
    assert "return partial(masked_next_token_loss, loss_mask," in made.replace("\n", " ")
    loss = definition(training / "losses.py", "masked_next_token_loss")
    assert [argument.arg for argument in loss.args.args][:2] == ["loss_mask", "output_tensor"]
    assert "return (loss, num_tokens, {'lm loss': reporting_loss})" in ast.unparse(loss)
    assert "[0] in ('state', 'global_state')" in ast.unparse(
        definition(training / "utils" / "train_utils.py", "needs_global_state_injection")
    )
    assert "build_tokenizer(self.cfg.tokenizer)" in ast.unparse(definition(training / "state.py", "tokenizer"))
    pretrain = definition(training / "pretrain.py", "pretrain")
    assert [argument.arg for argument in pretrain.args.args][:2] == ["config", "forward_step_func"]


def bridged(rank: int, world_size: int, sidecar: str) -> Any:
    """The provider around a step of Bridge's shape: its signature, what it hands on, what is active, a refusal."""
    from megatron_ptrl.training import host

    host.install_if_no_cuda()
    from megatron_ptrl.integrations import core_loss, megatron_bridge

    def inner(state: Any, data_iterator: Any, model: Any, return_schedule_plan: bool = False) -> Any:
        return data_iterator, model, return_schedule_plan

    def state(**model: Any) -> Any:
        return SimpleNamespace(
            cfg=SimpleNamespace(model=SimpleNamespace(**model)), tokenizer=SimpleNamespace(vocab_size=77)
        )

    try:
        step = megatron_bridge.forward_step(SHAPING, inner=inner)
        handed_on = partial(step, state())("batches", "model")
        active = core_loss._active
        assert active is not None
        refusals = []
        graph = {"cuda_graph_impl": "local", "cuda_graph_scope": "full_iteration"}
        megatron_bridge.forward_step(SHAPING, inner=inner)(state(**graph), "batches", "model")
        for settings in ({"overlap_moe_expert_parallel_comm": True}, {"cross_entropy_fusion_impl": "linear"}, graph):
            try:
                weighted = megatron_bridge.forward_step(SHAPING, remit_sidecar=[sidecar], inner=inner)
                weighted(state(**settings), "batches", "model")
            except InputError as error:
                refusals.append(str(error))
        return list(inspect.signature(step).parameters), handed_on, active.shaping, active.vocab_size(), refusals
    finally:
        core_loss.stop()


def test_bridge_provider(ranks, prefix, tmp_path):
    sidecar = write_by_token(prefix, str(tmp_path / "scores"))
    parameters, handed_on, shaping, vocab_size, refusals = ranks.run(1, bridged, sidecar)[0]
    assert parameters == ["state", "data_iterator", "model", "return_schedule_plan"]
    assert handed_on == ("batches", "model", False) and shaping == SHAPING and vocab_size == 77
    assert len(refusals) == 3 and "loss mask" in refusals[0] and "no logits" in refusals[1]
    assert "model.cuda_graph_scope full_iteration with remit_sidecar: its batches come from buffers" in refusals[2]
