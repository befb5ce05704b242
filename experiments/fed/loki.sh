#!/bin/sh
# LOKI (Zhao et al., 2024) on rounds of FedAvg whose ten updates are summed securely.
# sh experiments/fed/loki.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
exec "$PYTHON" "$ROOT/main_fed.py" loki --dataset "$DATASET" --base-datadir "$BASE_DATADIR" \
    --model cnn --client-images 16 --aggregate 10 --trials 1 "$@"
