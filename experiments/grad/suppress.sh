#!/bin/sh
# Gradient suppression (Pasquini et al., 2022): ig_single on one client, of whom the server sees only a sum of four.
# sh experiments/grad/suppress.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
exec "$PYTHON" "$ROOT/main_grad.py" suppress --dataset "$DATASET" --base-datadir "$BASE_DATADIR" \
    --aggregate 4 "$@"
