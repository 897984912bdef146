#!/usr/bin/env bash
# Documents -> prompts for next segments:  launch/segment.sh --input TEXT --output DIR
# One process for each of --executor.workers; over the nodes of a cluster by --executor.kind slurm, which submits its own
# jobs.
exec "${PYTHON:-python}" -m megatron_ptrl segment "$@"
