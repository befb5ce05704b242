#!/bin/sh
# False alarms and detections of the check that a client runs on a received model.
# sh experiments/detection.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/.. && . "$ROOT/experiments/env.sh"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" "$ROOT/experiments/detection.py" --dataset "$DATASET" --base-datadir "$BASE_DATADIR" "$@"
