#!/bin/sh
# Inverting Gradients through five local steps of a client on its one image.
# sh experiments/fed/ig_weight.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
exec "$PYTHON" "$ROOT/main_fed.py" ig_weight --dataset "$DATASET" --base-datadir "$BASE_DATADIR" \
    --model cnn --trials 4 --local-epochs 5 "$@"
