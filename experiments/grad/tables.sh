#!/bin/sh
# Exact attacks on tables: SPEAR and the Cocktail Party Attack on the gradient of one batch of records.
# sh experiments/grad/tables.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}      # for DATASET=csv, your CSV file; empty: datasets/ of this repository
DATASET=${DATASET:-photostats}     # photostats needs no download; cancer needs scikit-learn; csv reads your own

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
exec "$PYTHON" "$ROOT/main_grad.py" spear --dataset "$DATASET" --base-datadir "$BASE_DATADIR" \
    --model fc2 --batch-size 8 --trials 5 --sweep attack=spear,cpa "$@"
