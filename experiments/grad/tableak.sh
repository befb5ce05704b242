#!/bin/sh
# TabLeak (Vero et al., 2023) on the gradient of one batch of 32 records.
# sh experiments/grad/tableak.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}      # for DATASET=csv, your CSV file; empty: datasets/ of this repository
DATASET=${DATASET:-photostats}     # photostats needs no download; cancer needs scikit-learn; csv reads your own

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
exec "$PYTHON" "$ROOT/main_grad.py" tableak --dataset "$DATASET" --base-datadir "$BASE_DATADIR" \
    --model mlp --batch-size 32 --trials 3 "$@"
