#!/bin/sh
# DAGER (Petrov et al., 2024) on the weight updates of federated clients that train on sentences, one client a round.
# sh experiments/fed/dager.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where textfile finds your text: a file or a folder; empty: datasets/ of this repository
DATASET=${DATASET:-text}          # text needs no download; textfile reads your own

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
exec "$PYTHON" "$ROOT/main_fed.py" dager --dataset "$DATASET" --base-datadir "$BASE_DATADIR" \
    --model gpt --client-images 4 --local-epochs 5 "$@"
