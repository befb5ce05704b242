#!/bin/sh
# Fishing (Wen et al., 2022): one image of a batch of 32 is singled out, and ig_single reads its gradient.
# sh experiments/grad/fishing.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
exec "$PYTHON" "$ROOT/main_grad.py" fishing --dataset "$DATASET" --base-datadir "$BASE_DATADIR" \
    --model lenet --batch-size 32 "$@"
