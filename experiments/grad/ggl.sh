#!/bin/sh
# Generative Gradient Leakage (Li et al., 2022) on the gradient of one image; its generator is fitted to public images.
# sh experiments/grad/ggl.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
exec "$PYTHON" "$ROOT/main_grad.py" ggl --dataset "$DATASET" --base-datadir "$BASE_DATADIR" \
    --model cnn --trials 16 "$@"
