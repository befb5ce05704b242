#!/bin/sh
# FGLA (Xue et al., 2023) on the weight updates of federated clients with four images, one attacked client a round.
# sh experiments/fed/fgla.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
exec "$PYTHON" "$ROOT/main_fed.py" fgla --dataset "$DATASET" --base-datadir "$BASE_DATADIR" \
    --model lenet --client-images 4 "$@"
