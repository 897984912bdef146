#!/usr/bin/env bash
# Tokens -> a model:  launch/pretrain.sh --config run.yaml [--field value ...]
# One node or several: see torchrun.sh.
exec "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh" pretrain "$@"
