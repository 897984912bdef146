"""A real Slurm of two nodes on this machine, in a folder of its own: munged, slurmctld and a slurmd for each node.

Debian: apt-get install --no-install-recommends slurm-wlm munge. Neither systemd nor cgroups are needed, and what the
machine has in /etc/slurm and /etc/munge is not used. The nodes claim CPUs and memory that the machine may not have, so
that what a test submits runs at once wherever it is run; nothing holds a job to its share.
"""

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "setpriv")
# Debian keeps daemons where a user's PATH may not look.
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
PARTITION = "cpu"
NODES = ("one", "two")
SECONDS = 300.0

CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
KillWait=2
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]},{ports[2]} CPUs=4 RealMemory=16000
PartitionName={partition} Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class SlurmCluster:
    """The daemons, idle and ready; a context. Commands find them by `SLURM_CONF`, which is the path `configuration`."""

    def __init__(self, folder: Path, *settings: str) -> None:
        """settings: further lines of its configuration"""
        self._folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.configuration = folder / "slurm.conf"
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        self.configuration.write_text(
            CONFIGURATION.format(
                host=socket.gethostname().partition(".")[0],
                user=getpass.getuser(),
                folder=folder,
                ports=_free_ports(3),
                nodes=",".join(NODES),
                partition=PARTITION,
            )
            + "\n".join(settings)
        )

    def __enter__(self) -> "SlurmCluster":
        files = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
        # Forced: a test's folder is closed to other users, for whom a munge daemon would otherwise want to be there.
        self._start("munged", "--force", *(f"--{flag}={self._folder}/munge.{end}" for flag, end in files.items()), "-F")
        self._start("slurmctld", "-D", "-c")
        for node in NODES:
            self._nodes[node] = self._start("slurmd", "-D", "-N", node)
        self._wait("idle nodes", lambda: self.ask("sinfo", "-h", "-o", "%T %D", patient=True) == f"idle {len(NODES)}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is None:
                self.clear()
        finally:
            for daemon in reversed(self._daemons):
                daemon.terminate()
                try:
                    daemon.wait(SECONDS)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()

    def ask(self, *command: str, patient: bool = False) -> str:
        """What a command of Slurm prints, without the line end; a failure is an error, or "" if `patient`."""
        done = subprocess.run(command, env=self._environment(), capture_output=True, text=True, timeout=SECONDS)
        assert patient or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip() if done.returncode == 0 else ""

    def lose_node(self, node: str, job: str) -> None:
        """As by a power cut: its daemon, and what runs there of the job, end at once and without a word."""
        slurmd = self._nodes.pop(node)
        self._daemons.remove(slurmd)
        slurmd.kill()
        slurmd.wait()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.name() == "slurmstepd" and f"[{job}." in " ".join(process.cmdline()):
                    for lost in [process, *process.children(recursive=True)]:
                        lost.kill()

    def clear(self) -> None:
        """End what an earlier test left in the queue."""
        self.ask("scancel", "--user", getpass.getuser())
        self.wait_until_empty()

    def wait_until_empty(self) -> None:
        """Until no job runs, or waits to."""
        self._wait("an empty queue", lambda: self.ask("squeue", "-h") == "")

    def states(self, job: str) -> dict[str, str]:
        """Its tasks' states by their number, such as {"0": "COMPLETED", "1": "CANCELLED"}, also after it ended."""
        said = self.ask("scontrol", "--oneliner", "show", "job", job)
        tasks = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in said.splitlines()]
        return {task["ArrayTaskId"]: task["JobState"] for task in tasks}

    def _wait(self, wanted: str, is_there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not is_there():
            dead = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            if dead or time.monotonic() > deadline:
                logs = "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in self._folder.glob("*.log"))
                raise AssertionError(f"no {wanted} within {SECONDS:.0f} s, ended: {dead}\n{logs}")
            time.sleep(0.05)

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        with (self._folder / f"{command[0]}-{len(self._daemons)}.log").open("wb") as log:
            # Daemons end with the tests, also if these are killed.
            self._daemons.append(
                subprocess.Popen(
                    ["setpriv", "--pdeathsig", "TERM", *command], env=self._environment(), stdout=log, stderr=log
                )
            )
        return self._daemons[-1]

    def _environment(self) -> dict[str, str]:
        return os.environ | {"SLURM_CONF": str(self.configuration), "PATH": PATH}


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [taken.getsockname()[1] for taken in sockets]


def missing_programs() -> list[str]:
    """What a cluster needs and this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
