#!/usr/bin/env bash
# One node's part of a stage that trains:  launch/torchrun.sh STAGE [--field value ...]
#
#   one node         nothing to set: a rank for each GPU (without any: one), or NPROC_PER_NODE
#   several nodes    the same command on each, with NNODES, NODE_RANK from 0, and RDZV_ENDPOINT=host:port of node 0
#   under Slurm      srun launch/torchrun.sh ... knows all of that; launch/slurm/stage.sbatch does it
#
#   MAX_RESTARTS     how often all ranks are started again after one failed; they go on from the last checkpoint (3)
#   LOG_DIR          a log for each rank, by restart (logs)      PYTHON    the interpreter (python)
#
# SIGUSR1 and SIGTERM have all ranks save and end, the latter with exit code 143: go on later by the same command.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/env.sh"

if [[ -n "${SLURM_STEP_ID:-}" ]]; then
  NNODES="${NNODES:-$SLURM_STEP_NUM_NODES}"
  NODE_RANK="${NODE_RANK:-$SLURM_NODEID}"
  RUN_ID="${RUN_ID:-$SLURM_JOB_ID}"
  if [[ -z "${RDZV_ENDPOINT:-}" ]]; then
    # The address that Slurm itself uses: a node's name need not be known to the others.
    first="$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)"
    address="$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')"
    RDZV_ENDPOINT="$address:$((20000 + SLURM_JOB_ID % 20000))"
  fi
fi
NNODES="${NNODES:-1}" NODE_RANK="${NODE_RANK:-0}" RUN_ID="${RUN_ID:-ptrl}"
if ((NNODES > 1)) && [[ -z "${RDZV_ENDPOINT:-}" ]]; then
  echo "torchrun.sh: NNODES is $NNODES, so RDZV_ENDPOINT must be host:port of node 0, the same on all nodes" >&2
  exit 2
fi
if [[ -z "${NPROC_PER_NODE:-}" ]]; then
  NPROC_PER_NODE=1
  if command -v nvidia-smi >/dev/null; then NPROC_PER_NODE="$(nvidia-smi --list-gpus | wc -l)"; fi
fi

flags=(--nnodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE" --max-restarts "${MAX_RESTARTS:-3}")
if ((NNODES > 1)); then
  # This node's address on the network that leads to node 0; a host's name may stand for another network's, or none.
  local_address="$("${PYTHON:-python}" "$here/local_address.py" "$RDZV_ENDPOINT")"
  flags+=(--rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "$RUN_ID" --local-addr "$local_address")
  if ((NODE_RANK == 0)); then flags+=(--rdzv-conf is_host=true); else flags+=(--rdzv-conf is_host=false); fi
else
  flags+=(--rdzv-backend c10d --rdzv-endpoint localhost:0)
fi
# All that a rank prints goes to its own file; the first rank of each node is shown as well.
mkdir -p "${LOG_DIR:=logs}"
flags+=(--log-dir "$LOG_DIR" --redirects 3 --tee 0:3)

# In a session of its own, which the signals that Slurm sends to a task do not reach. The ranks are told by this script:
# torchrun, told instead, would kill them after 30 s, in the middle of a long save.
setsid "${PYTHON:-python}" -m torch.distributed.run "${flags[@]}" -m megatron_ptrl "$@" &
agent=$!
told=0 terminated=0
trap 'told=1' USR1
trap 'told=1 terminated=1' TERM
code=0
wait "$agent" || code=$? # ends for a signal, too
while kill -0 "$agent" 2>/dev/null; do
  # Said again: ranks that are still starting do not listen yet.
  if ((told)); then pkill -TERM -P "$agent" || true; fi
  timeout 5 tail --pid "$agent" -f /dev/null || true
done
if ((told)); then wait "$agent" && code=0 || code=$?; fi
if ((code == 0 && terminated)); then code=143; fi
exit "$code"
