#!/bin/sh
# Exact attacks on tables: SPEAR and the Cocktail Party Attack on weight updates of federated clients that train on records.
# sh experiments/fed/tables.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}      # for DATASET=csv, your CSV file; empty: datasets/ of this repository
DATASET=${DATASET:-photostats}     # photostats needs no download; cancer needs scikit-learn; csv reads your own

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
exec "$PYTHON" "$ROOT/main_fed.py" spear --dataset "$DATASET" --base-datadir "$BASE_DATADIR" \
    --model fc2 --client-images 8 --trials 5 --sweep attack=spear,cpa "$@"
