#!/bin/sh
# Fishing (Wen et al., 2022) on clients with 32 images each, who train for one step on all of them.
# sh experiments/fed/fishing.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
exec "$PYTHON" "$ROOT/main_fed.py" fishing --dataset "$DATASET" --base-datadir "$BASE_DATADIR" \
    --model lenet --clients 4 --client-images 32 "$@"
