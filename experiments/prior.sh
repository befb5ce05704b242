#!/bin/sh
# A generator for ggl and gias, trained on the public split: a bar, its samples, and how near it comes to held-out images.
# Kept in checkpoints/, where they find what they would train themselves; what they would not, --generator-file gives them.
# A training that is killed goes on when it is ordered again.
# sh experiments/prior.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # photos (nothing to download) mnist cifar10 cifar100 tiny_imagenet imagenet folder

ROOT=$(dirname "$0")/.. && . "$ROOT/experiments/env.sh"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" "$ROOT/experiments/prior.py" --dataset "$DATASET" --base-datadir "$BASE_DATADIR" "$@"
