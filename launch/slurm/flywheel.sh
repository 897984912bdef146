#!/usr/bin/env bash
# The whole way as jobs that wait for one another:  launch/slurm/flywheel.sh FOLDER [flag of sbatch ...]
#
#   segment -> sft -> rl -> score (the policy, and the base model it came from) -> pretrain, weighted by what they think
#
# FOLDER holds segment.yaml, sft.yaml, rl.yaml, score-base.yaml, score-policy.yaml and pretrain.yaml, which name one
# another's results. A job starts when those before it have succeeded; one that puts itself into the queue again keeps
# its number, so the others go on waiting. SERVER (see stage.sbatch) is rl's judge, and for it alone. FLAGS_SFT, FLAGS_RL, ... are flags of
# sbatch for one stage, such as FLAGS_RL='--nodes 5'. Let segment use its local executor: with that of Slurm it ends when
# its own jobs are submitted.
set -euo pipefail
if (($# == 0)) || [[ ! -d "$1" ]]; then
  echo "usage: launch/slurm/flywheel.sh FOLDER [flag of sbatch ...]; FOLDER holds the YAML file of each stage" >&2
  exit 2
fi
folder="$1" here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
shift
flags=("$@")
for stage in segment sft rl score-base score-policy pretrain; do
  if [[ ! -f "$folder/$stage.yaml" ]]; then
    echo "flywheel.sh: there is no $folder/$stage.yaml" >&2
    exit 2
  fi
done
export PTRL_HOME="${PTRL_HOME:-$(dirname "$(dirname "$here")")}"
with_server="${SERVER:-}"
unset SERVER

submit() { # AFTER NAME STAGE [argument of the stage ...]: prints the job's number
  local after="$1" name="$2" stage="$3" own="FLAGS_${3^^}" job
  shift 3
  # shellcheck disable=SC2086  # several flags in one variable
  job="$(sbatch --parsable --job-name "ptrl-$name" ${after:+--dependency "afterok:$after"} --kill-on-invalid-dep yes \
    "${flags[@]}" ${!own:-} "$here/stage.sbatch" "$stage" --config "$folder/$name.yaml" "$@")"
  echo "${job%%;*}" # a federated cluster's name stands behind it
}

segment="$(submit "" segment segment)"
sft="$(submit "$segment" sft sft)"
judge=()
if [[ -n "$with_server" ]]; then
  export SERVER="$with_server"
  judge=(--judge.kind openai --judge.servers "{servers}")
fi
rl="$(submit "$sft" rl rl "${judge[@]}")"
unset SERVER
base="$(submit "" score-base score)"
policy="$(submit "$rl" score-policy score)"
pretrain="$(submit "$base:$policy" pretrain pretrain)"
echo "segment $segment, sft $sft, rl $rl, score $base $policy, pretrain $pretrain"
