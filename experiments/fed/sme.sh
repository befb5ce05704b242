#!/bin/sh
# Surrogate Model Extension (Zhu et al., 2023): twenty local steps of a client at the price of one.
# sh experiments/fed/sme.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
exec "$PYTHON" "$ROOT/main_fed.py" sme --dataset "$DATASET" --base-datadir "$BASE_DATADIR" \
    --model cnn --trials 4 --client-images 4 --batch-size 2 --local-epochs 10 --local-lr 0.01 "$@"
