#!/bin/sh
# What local steps protect: the same victims of DLG after 1, 2, 5 and 10 local steps, at two learning rates. Ends with a table.
# sh experiments/fed/steps.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
exec "$PYTHON" "$ROOT/main_fed.py" dlg --dataset "$DATASET" --base-datadir "$BASE_DATADIR" \
    --trials 4 --rounds 1 --sweep local-lr=0.01,0.1 local-epochs=1,2,5,10 "$@"
