"""`pip wheel .` packs the kernels, and what it packs computes a loss away from the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKED = ["setup.py", "pyproject.toml", "README.md", "csrc", "megatron_ptrl"]
PROGRAM = """
import sys, torch, megatron_ptrl
from megatron_ptrl import RewardShaping, ops, reward_shaped_cross_entropy
assert megatron_ptrl.__file__.startswith(sys.argv[1]), megatron_ptrl.__file__
assert ops.load_kernels()
logits, target = torch.randn(5, 40, dtype=torch.bfloat16).requires_grad_(), torch.arange(5)
loss = reward_shaped_cross_entropy(logits, target, RewardShaping(beta=0.0))
expected = torch.nn.functional.cross_entropy(logits.double(), target, reduction="none")
torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
loss.sum().backward()
assert logits.grad.abs().sum() > 0
print("computed")
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_a_wheel_has_the_kernels_and_works_where_it_is_installed(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    leave = shutil.ignore_patterns("*.so", "__pycache__")
    for name in PACKED:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=leave)
        else:
            shutil.copy(path, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    environment = {**os.environ, "MEGATRON_PTRL_CUDA": "0"}
    environment.pop("PYTHONPATH", None)
    run([*pip, "wheel", str(source), *options], tmp_path, environment)

    (wheel,) = tmp_path.glob("*.whl")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.stem.endswith(platform), wheel.name
    packed = zipfile.ZipFile(wheel).namelist()
    assert "megatron_ptrl/_C.so" in packed and "megatron_ptrl/ops.py" in packed
    assert {name.split("/")[0].split("-")[0] for name in packed} == {"megatron_ptrl"}

    target = tmp_path / "installed"
    run([*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)], tmp_path, environment)
    found = run(
        [sys.executable, "-W", "error::UserWarning:megatron_ptrl", "-c", PROGRAM, str(target)],
        tmp_path,
        {**environment, "PYTHONPATH": str(target)},
    )
    assert "computed" in found


def run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
