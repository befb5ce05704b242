#!/bin/sh
# ig_multi on the gradient of one batch, where there are no local steps to unroll: the same as ig_single.
# sh experiments/grad/ig_multi.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
exec "$PYTHON" "$ROOT/main_grad.py" ig_multi --dataset "$DATASET" --base-datadir "$BASE_DATADIR" \
    --model convnet64 --trials 4 "$@"
