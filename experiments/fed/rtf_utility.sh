#!/bin/sh
# What Robbing the Fed's block costs the model: FedAvg accuracy with and without it, and the difference of their means.
# sh experiments/fed/rtf_utility.sh [flags]      all flags: --help
# SEEDS=0,1,2,3,4 before it: other seeds than three.

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
OUT=${OUT:-$ROOT/results/utility}
for attack in baseline rtf; do
    "$PYTHON" "$ROOT/main_fed.py" "$attack" --dataset "$DATASET" --base-datadir "$BASE_DATADIR" --out "$OUT" \
        --model cnn --clients 4 --client-images 64 --batch-size 8 --local-lr 0.1 --rounds 20 --trials 20 --eval-every 1 \
        --sweep "seed=${SEEDS:-0,1,2}" "$@" || exit
done
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" "$ROOT/experiments/utility.py" --out "$OUT"
