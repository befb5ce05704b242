#!/bin/sh
# How fast the attacks are, beside the papers' own loops and breaching 0.1.2 (experiments/bench/requirements.txt).
# sh experiments/bench/speed.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" "$ROOT/experiments/bench/speed.py" --dataset "$DATASET" --base-datadir "$BASE_DATADIR" "$@"
