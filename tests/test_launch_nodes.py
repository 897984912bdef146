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
SECONDS = 600.0
# A stage whose rank `STUB_RANK` ends with `STUB_CODE`, and the others two seconds after its agent has seen it, as when
# a connection is lost.
STUB = """
import os, sys, time
is_first = os.environ["RANK"] == os.environ["STUB_RANK"]
if is_first:
    with open(os.environ["STARTS"] + ".first", "w") as first:
        first.write(str(os.getpid()))
with open(os.environ["STARTS"], "a") as starts:
    starts.write(os.environ["RANK"])
all_of_them = int(os.environ["WORLD_SIZE"]) * (1 + int(os.environ["TORCHELASTIC_RESTART_COUNT"]))
while os.path.getsize(os.environ["STARTS"]) < all_of_them:
    time.sleep(0.05)
if is_first:
    print("ptrl stub: what is wrong", "and a warning", sep="\\n", file=sys.stderr)
    sys.exit(int(os.environ["STUB_CODE"]))
with open(os.environ["STARTS"] + ".first") as first:
    process = "/proc/" + first.read()
while os.path.exists(process):
    time.sleep(0.05)
time.sleep(2)
sys.exit(1)
"""


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


def run_stub(tmp_path: Path, rank: int, code: int, hosts: list[list[str]]) -> tuple[list[int], str, str]:
    """(each node's exit code, all that they showed, the ranks in the order of their starts) of two ranks on each."""
    (tmp_path / "megatron_ptrl").mkdir()
    (tmp_path / "megatron_ptrl/__init__.py").touch()
    (tmp_path / "megatron_ptrl/__main__.py").write_text(STUB)
    starts = tmp_path / "starts"
    own = {"PYTHONPATH": str(tmp_path), "PYTHON": sys.executable, "LOG_DIR": str(tmp_path / "logs")}
    own |= {"STARTS": str(starts), "STUB_RANK": str(rank), "STUB_CODE": str(code)}
    own |= {"NPROC_PER_NODE": "2", "MAX_RESTARTS": "1"}
    if len(hosts) > 1:
        own |= {"NNODES": str(len(hosts)), "RDZV_ENDPOINT": "10.77.0.1:29500"}
    output = run_nodes([[*host, str(ROOT / "launch/torchrun.sh"), "stub"] for host in hosts], own, tmp_path)
    return output[0], "".join(output[1]), starts.read_text()


def run_nodes(commands: list[list[str]], environment: dict[str, str], folder: Path) -> tuple[list[int], list[str]]:
    """(exit code, stdout with stderr) of one command on each node, in `folder`."""
    agents = [
        subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | environment | {"NODE_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]
    try:
        output = [agent.communicate(timeout=SECONDS)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()
    return [agent.returncode for agent in agents], output


def test_bad_input_is_told_in_one_line_and_not_tried_again(tmp_path):
    codes, shown, starts = run_stub(tmp_path, 1, 2, [[]])
    assert (codes, sorted(starts)) == ([2], ["0", "1"])
    assert shown.splitlines().count("ptrl stub: what is wrong") == 1 and "Traceback" not in shown, shown


def test_what_fails_otherwise_is_tried_again(tmp_path):
    codes, _, starts = run_stub(tmp_path, 1, 3, [[]])
    assert (codes, sorted(starts)) == ([1], ["0", "0", "1", "1"])


def test_bad_input_on_one_node_ends_the_others(nodes, tmp_path):
    """The second node's second rank knows, while the first node sees nothing but a connection that is lost."""
    codes, shown, starts = run_stub(tmp_path, 3, 2, list(nodes))
    assert (codes, sorted(starts)) == ([1, 2], ["0", "1", "2", "3"])
    assert shown.splitlines().count("ptrl stub: what is wrong") == 1, shown


def test_two_nodes_give_the_numbers_of_one(ranks, nodes, prefix, tmp_path):
    """Tensor parallel within a node, data parallel across them."""
    settings = tiny_config(prefix, tmp_path / "two", parallel__tp=2, train__steps=6)
    base = {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    environment = base | {"LOG_DIR": str(tmp_path / "logs")}
    pretrain = str(ROOT / "launch/pretrain.sh")
    several = {"NPROC_PER_NODE": "2", "NNODES": "2", "RDZV_ENDPOINT": "10.77.0.1:29500", "GLOO_SOCKET_IFNAME": "cable"}
    commands = [[*node, pretrain, *flags(settings)] for node in nodes]
    codes, output = run_nodes(commands, environment | several, tmp_path)
    assert codes == [0, 0], "\n".join(output)
    assert read_metrics(tmp_path / "two") == run_tiny(ranks, 4, settings | {"run_dir": str(tmp_path / "one")})
    assert len(read_metrics(tmp_path / "two")) == 6
