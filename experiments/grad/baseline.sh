#!/bin/sh
# No attack: what the mean public image scores, the line every attack has to beat.
# sh experiments/grad/baseline.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
exec "$PYTHON" "$ROOT/main_grad.py" baseline --dataset "$DATASET" --base-datadir "$BASE_DATADIR" "$@"
