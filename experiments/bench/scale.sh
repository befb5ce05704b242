#!/bin/sh
# What an attack costs against batch size, image size (32 to 224), local steps, trials and jobs.
# sh experiments/bench/scale.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" "$ROOT/experiments/bench/scale.py" --dataset "$DATASET" --base-datadir "$BASE_DATADIR" "$@"
