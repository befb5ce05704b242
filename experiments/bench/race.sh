#!/bin/sh
# PSNR and share identified over seconds: ours against breaching 0.1.2, or its algorithm where it is not installed.
# sh experiments/bench/race.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-leaves}        # a name from --help, such as cifar10; leaves needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" "$ROOT/experiments/bench/race.py" --dataset "$DATASET" --base-datadir "$BASE_DATADIR" "$@"
