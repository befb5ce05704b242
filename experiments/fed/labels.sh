#!/bin/sh
# Label inference from an update: accuracy of each rule over classes, images, local steps, learning rate
# and activation. Ends with a table.
# sh experiments/fed/labels.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" "$ROOT/experiments/labels.py" --dataset "$DATASET" --base-datadir "$BASE_DATADIR" "$@"
