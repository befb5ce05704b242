#!/bin/sh
# What else moves Generative Gradient Leakage: a classifier trained on public data against an untrained one, and the units
# of its generator's last layer, tanh about mid-grey against the data's mean and deviation. Each ends with a table and a plot.
# sh experiments/grad/ggl_choices.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
set -- --dataset "$DATASET" --base-datadir "$BASE_DATADIR" --model cnn --trials 16 --comparison-iterations 0 "$@"
"$PYTHON" "$ROOT/main_grad.py" ggl "$@" --sweep pretrain-epochs=0,5,20 || exit
exec "$PYTHON" "$ROOT/main_grad.py" ggl "$@" --generator vae --sweep output-normalization=half,dataset
