#!/bin/sh
# SPEAR (Dimitrov et al., 2024) on the weight updates of federated clients, one attacked client a round.
# sh experiments/fed/spear.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
exec "$PYTHON" "$ROOT/main_fed.py" spear --dataset "$DATASET" --base-datadir "$BASE_DATADIR" \
    --model fc2 --width 200 --normalize dataset --client-images 4 "$@"
