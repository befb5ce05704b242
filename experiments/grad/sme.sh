#!/bin/sh
# Surrogate Model Extension on the gradient of one batch, where there is nothing to extend: Inverting Gradients.
# sh experiments/grad/sme.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
exec "$PYTHON" "$ROOT/main_grad.py" sme --dataset "$DATASET" --base-datadir "$BASE_DATADIR" \
    --model convnet64 --trials 4 "$@"
