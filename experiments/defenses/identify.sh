#!/bin/sh
# Which of N candidates caused an update under DP-SGD? Measured, beside the bound that differential privacy proves.
# sh experiments/defenses/identify.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" "$ROOT/experiments/defenses/identify.py" --dataset "$DATASET" --base-datadir "$BASE_DATADIR" "$@"
