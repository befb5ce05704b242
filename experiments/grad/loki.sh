#!/bin/sh
# LOKI (Zhao et al., 2024) on the sum of ten clients with 16 images each: every client has channels of its own.
# sh experiments/grad/loki.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
exec "$PYTHON" "$ROOT/main_grad.py" loki --dataset "$DATASET" --base-datadir "$BASE_DATADIR" \
    --model cnn --batch-size 16 --aggregate 10 --trials 1 "$@"
