#!/usr/bin/env bash
# One node's part of a stage with ranks:  launch/torchrun.sh STAGE [--field value ...]
#
#   one node         nothing to set: a rank for each GPU that torch sees (without any: one), or NPROC_PER_NODE
#   several nodes    the same command on each, with NNODES, NODE_RANK from 0, and RDZV_ENDPOINT=host:port of node 0
#   under Slurm      srun launch/torchrun.sh ... knows all of that; launch/slurm/stage.sbatch does it
#
#   MAX_RESTARTS     how often all ranks are started again after one failed, other than for bad input (exit code 2); they
#                    go on from the last checkpoint (3)
#   LOG_DIR          a log for each rank, by restart (logs)      PYTHON    the interpreter (python)
#
# SIGUSR1, SIGTERM, SIGINT and SIGHUP have all ranks save and end, all but the first with exit code 143; the same command
# goes on later. (score and evaluate have nothing to save: they are ended, and go on from what is done.) A second SIGINT
# ends them at once.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/env.sh"
command -v pkill >/dev/null || { echo "torchrun.sh: there is no pkill (package procps), which tells the ranks to save" >&2; exit 2; }
python="${PYTHON:-python}"

if [[ -n "${SLURM_STEP_ID:-}" ]]; then # what the submitter's shell had under these names is not this step's
  NNODES="$SLURM_STEP_NUM_NODES" NODE_RANK="$SLURM_NODEID" RUN_ID="$SLURM_JOB_ID"
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_STEP_NODELIST")
  # The address that Slurm itself uses: a node's name need not be known to the others.
  address="$(scontrol --oneliner show node "${nodes[0]}" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')"
  RDZV_ENDPOINT="$address:$((20000 + SLURM_JOB_ID % 20000))"
fi
NNODES="${NNODES:-1}" NODE_RANK="${NODE_RANK:-0}" RUN_ID="${RUN_ID:-ptrl}"
if ((NNODES > 1)) && [[ -z "${RDZV_ENDPOINT:-}" ]]; then
  echo "torchrun.sh: NNODES is $NNODES, so RDZV_ENDPOINT must be host:port of node 0, the same on all nodes" >&2
  exit 2
fi
if [[ -z "${NPROC_PER_NODE:-}" ]]; then
  NPROC_PER_NODE="$("$python" -c 'import torch; print(max(torch.cuda.device_count(), 1))')"
fi

flags=(--nnodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE" --max-restarts "${MAX_RESTARTS:-3}" --rdzv-backend c10d)
if ((NNODES > 1)); then
  # This node's address on the network that leads to node 0; a host's name may stand for another network's, or none.
  local_address="$("$python" "$here/local_address.py" "$RDZV_ENDPOINT")"
  flags+=(--rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "$RUN_ID" --local-addr "$local_address")
  # Nodes may be minutes apart, as where each reads torch from a slow file system first.
  if ((NODE_RANK == 0)); then host=true; else host=false; fi
  flags+=(--rdzv-conf "is_host=$host,read_timeout=900,join_timeout=1800")
else
  flags+=(--rdzv-endpoint localhost:0)
fi
# All that a rank prints goes to its own file; the first rank of each node is shown as well.
mkdir -p "${LOG_DIR:=logs}"
flags+=(--log-dir "$LOG_DIR" --redirects 3 --tee 0:3)

told=0 terminated=0 agent=
tell() {
  if ((told && $1 == 2)) && [[ -n "$agent" ]]; then kill -KILL -- "-$agent" $(pgrep -P "$agent") 2>/dev/null || true; fi
  told=1
  if (($1)); then terminated=1; fi
}
trap 'tell 0' USR1
trap 'tell 1' TERM HUP
trap 'tell 2' INT
# In a session of its own, which the signals that Slurm sends to a task do not reach. The ranks are told by this script:
# torchrun, told instead, would kill them after 30 s, in the middle of a long save.
setsid "$python" "$here/agent.py" "${flags[@]}" -m megatron_ptrl "$@" &
agent=$!
code=0
wait "$agent" || code=$? # ends for a signal, too
while kill -0 "$agent" 2>/dev/null; do
  if ((told)); then
    case "${1:-}" in
      score | evaluate) kill -TERM "$agent" 2>/dev/null || true ;;
      *) pkill -TERM -P "$agent" || true ;; # said again: ranks that are still starting do not listen yet
    esac
  fi
  timeout 5 tail --pid "$agent" -f /dev/null || true
done
if ((told)); then wait "$agent" && code=0 || code=$?; fi
if ((code == 0 && terminated)); then code=143; fi
exit "$code"
