#!/bin/sh
# TabLeak (Vero et al., 2023) on the weight updates of federated clients with 32 records each.
# sh experiments/fed/tableak.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}      # for DATASET=csv, your CSV file; empty: datasets/ of this repository
DATASET=${DATASET:-photostats}     # photostats needs no download; cancer needs scikit-learn; csv reads your own

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
exec "$PYTHON" "$ROOT/main_fed.py" tableak --dataset "$DATASET" --base-datadir "$BASE_DATADIR" \
    --model mlp --client-images 32 --trials 3 "$@"
