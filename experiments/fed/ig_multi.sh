#!/bin/sh
# Inverting Gradients through two epochs of minibatches: four images, two at a time.
# sh experiments/fed/ig_multi.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
exec "$PYTHON" "$ROOT/main_fed.py" ig_multi --dataset "$DATASET" --base-datadir "$BASE_DATADIR" \
    --model cnn --trials 4 --client-images 4 --batch-size 2 --local-epochs 2 --local-lr 0.05 "$@"
