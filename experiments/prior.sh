#!/bin/sh
# Trains a generator for ggl and gias on the public split. Shows a progress bar, then prints where the samples are and how
# close the generator comes to held-out images. An interrupted training continues when the same command is run again.
# ggl and gias find generators in checkpoints/ that have the settings they would train with; for any other generator, give
# them its folder with --generator-file.
# sh experiments/prior.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/.. && . "$ROOT/experiments/env.sh"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" "$ROOT/experiments/prior.py" --dataset "$DATASET" --base-datadir "$BASE_DATADIR" "$@"
