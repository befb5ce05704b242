#!/bin/sh
# Data Leakage in Federated Averaging on the gradient of one batch: squared distance under its prior.
# sh experiments/grad/dlf.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
exec "$PYTHON" "$ROOT/main_grad.py" dlf --dataset "$DATASET" --base-datadir "$BASE_DATADIR" \
    --model cnn --trials 4 "$@"
