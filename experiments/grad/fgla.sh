#!/bin/sh
# FGLA (Xue et al., 2023) on the gradient of four images: features from the head, images from a trained generator.
# sh experiments/grad/fgla.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
exec "$PYTHON" "$ROOT/main_grad.py" fgla --dataset "$DATASET" --base-datadir "$BASE_DATADIR" \
    --model lenet --batch-size 4 "$@"
