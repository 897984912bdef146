"""launch/torchrun.sh on two nodes without a cluster: two network namespaces of this machine, joined by a cable."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import flags, read_metrics, run_tiny, tiny_config

ROOT = Path(__file__).parents[1]
SECONDS = 180.0


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def nodes() -> Iterator[tuple[list[str], list[str]]]:
    """Two hosts with nothing in common but the cable: the words before a command that runs there, of each."""
    names = [f"ptrl{os.getpid()}{end}" for end in "ab"]
    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "del", name)
            ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
            for number, name in enumerate(names, start=1):
                ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "cable")
                for device in ("cable", "lo"):
                    ip("-n", name, "link", "set", device, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces can be made here: {getattr(error, 'stderr', None) or error}")
        yield tuple(["ip", "netns", "exec", name] for name in names)  # type: ignore[misc]


def test_two_nodes_give_the_numbers_of_one(ranks, nodes, prefix, tmp_path):
    """Tensor parallel within a node, data parallel across them."""
    settings = tiny_config(prefix, tmp_path / "two", parallel__tp=2, train__steps=6)
    base = {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    environment = os.environ | base | {"LOG_DIR": str(tmp_path / "logs")}
    pretrain = str(ROOT / "launch/pretrain.sh")
    several = {"NPROC_PER_NODE": "2", "NNODES": "2", "RDZV_ENDPOINT": "10.77.0.1:29500", "GLOO_SOCKET_IFNAME": "cable"}
    agents = [
        subprocess.Popen(
            [*node, pretrain, *flags(settings)],
            env=environment | several | {"NODE_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, node in enumerate(nodes)
    ]
    try:
        output = [agent.communicate(timeout=SECONDS)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(output)
    assert read_metrics(tmp_path / "two") == run_tiny(ranks, 4, settings | {"run_dir": str(tmp_path / "one")})
    assert len(read_metrics(tmp_path / "two")) == 6
