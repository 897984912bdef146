"""torchrun, except that ranks which end for bad input (exit code 2) are not started again.

What torchrun starts again ends the same way every time. Here the node whose ranks told of bad input closes the
rendezvous, so that no other node starts again either, and ends with exit code 2 and the line of the rank that knew.
"""

import sys
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import api

BAD_INPUT = 2


class Agent(LocalElasticAgent):
    """One node's agent."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        told = [failure.local_rank for failure in result.failures.values() if failure.exitcode == BAD_INPUT]
        if told:
            self._remaining_restarts = 0
            lines = {rank: _line_of(self._pcontext.stderrs[rank]) for rank in told}
            if not lines.get(0):  # the first rank's are shown as they come
                nothing = f"a rank ended with exit code {BAD_INPUT}, see {self._pcontext.stderrs[told[0]]}"
                print(next(filter(None, lines.values()), nothing), file=sys.stderr, flush=True)
        return result


def _line_of(log: str) -> str | None:
    """What a stage told of its bad input; some ranks hear only that another knows."""
    lines = Path(log).read_text(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.startswith("ptrl ")), None)


if __name__ == "__main__":
    api.LocalElasticAgent = Agent
    try:
        run.main()
    except ChildFailedError as error:
        if all(failure.exitcode != BAD_INPUT for failure in error.failures.values()):
            raise
        sys.exit(BAD_INPUT)
