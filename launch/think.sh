#!/usr/bin/env bash
# Documents, servers -> documents with thinking, .bin/.idx:  launch/think.sh --input TEXT --output DIR --servers URL ...
# One process for each of --executor.workers; over the nodes of a cluster by --executor.kind slurm, which submits its own
# jobs. The embedded generator (--generator embedded) runs in this process.
exec "${PYTHON:-python}" -m megatron_ptrl think "$@"
