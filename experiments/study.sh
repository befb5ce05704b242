#!/bin/sh
# Every claim of the field, measured: all attacks on gradients, batches, FedAvg and sums of clients, and what matters.
# sh experiments/study.sh [--quick] [flags]      all flags: --help; a killed study continues where it stopped

BASE_DATADIR=${BASE_DATADIR:-}          # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos leaves}       # names from --help, such as cifar10; photos and leaves need no download

ROOT=$(dirname "$0")/.. && . "$ROOT/experiments/env.sh"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
# shellcheck disable=SC2086  # several data sets are several words
exec "$PYTHON" "$ROOT/experiments/study/study.py" --datasets $DATASET --base-datadir "$BASE_DATADIR" "$@"
