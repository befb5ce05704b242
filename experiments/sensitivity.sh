#!/bin/sh
# The unrolled objective at the true images plus noise, over local steps and rates: where can matching succeed?
# sh experiments/sensitivity.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-leaves}        # a name from --help, such as cifar10; leaves needs no download

ROOT=$(dirname "$0")/.. && . "$ROOT/experiments/env.sh"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" "$ROOT/experiments/sensitivity.py" --dataset "$DATASET" --base-datadir "$BASE_DATADIR" "$@"
