#!/bin/sh
# What noise and clipping leave to a generative prior and to Inverting Gradients, on the same sixteen updates; and to GIAS,
# which leaves its generator's range. Each ends with a table and a plot.
# sh experiments/grad/ggl_defenses.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
set -- --dataset "$DATASET" --base-datadir "$BASE_DATADIR" --model cnn --trials 16 "$@"
"$PYTHON" "$ROOT/main_grad.py" ggl "$@" --sweep defense=none,gauss=0.01,gauss=0.03,gauss=0.1,clip=0.3 || exit
exec "$PYTHON" "$ROOT/main_grad.py" gias "$@" --comparison-iterations 0 --sweep defense=none,gauss=0.01,gauss=0.1
