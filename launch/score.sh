#!/usr/bin/env bash
# A checkpoint -> what it thinks of every token:  launch/score.sh --checkpoint RUN --data PREFIX [--field value ...]
# One node or several: see torchrun.sh.
exec "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh" score "$@"
