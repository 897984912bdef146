#!/usr/bin/env bash
# Conversations, a checkpoint -> a model that answers:  launch/sft.sh --config run.yaml [--field value ...]
# One node or several: see torchrun.sh.
exec "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh" sft "$@"
