#!/usr/bin/env bash
# Prompts, a checkpoint -> a policy:  launch/rl.sh --config run.yaml [--field value ...]
# One node or several: see torchrun.sh.
exec "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh" rl "$@"
