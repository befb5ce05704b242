#!/bin/sh
# Attacks x defences x strengths, with the attacker who knows the defence, its cost in accuracy, and what is proven.
# sh experiments/defenses/frontier.sh [flags]      all flags: --help; a killed run continues where it stopped

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" "$ROOT/experiments/defenses/frontier.py" --dataset "$DATASET" --base-datadir "$BASE_DATADIR" "$@"
