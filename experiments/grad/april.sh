#!/bin/sh
# The tokens of a vision transformer, APRIL (Lu et al., 2022) on the gradient of one batch.
# sh experiments/grad/april.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
exec "$PYTHON" "$ROOT/main_grad.py" april --dataset "$DATASET" --base-datadir "$BASE_DATADIR" \
    --model vit_plain "$@"
