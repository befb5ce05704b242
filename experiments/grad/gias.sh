#!/bin/sh
# Gradient Inversion with Generative Image Prior (Jeon et al., 2021) on the gradient of one image. The first run trains
# its generator on public images, in two minutes or so.
# sh experiments/grad/gias.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
exec "$PYTHON" "$ROOT/main_grad.py" gias --dataset "$DATASET" --base-datadir "$BASE_DATADIR" \
    --model cnn --trials 16 "$@"
