#!/bin/sh
# Attacks on plain sums: analytic, spear and cpa where the server sees the mean gradient of 1, 4 or 16 clients.
# sh experiments/grad/aggregate.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
exec "$PYTHON" "$ROOT/main_grad.py" analytic --dataset "$DATASET" --base-datadir "$BASE_DATADIR" \
    --model fc2 --trials 4 --sweep attack=analytic,spear,cpa aggregate=1,4,16 "$@"
