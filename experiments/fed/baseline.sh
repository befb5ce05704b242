#!/bin/sh
# FedAvg without an attack: test accuracy over the rounds, and what the mean public image scores on the clients.
# sh experiments/fed/baseline.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
exec "$PYTHON" "$ROOT/main_fed.py" baseline --dataset "$DATASET" --base-datadir "$BASE_DATADIR" \
    --model cnn --normalize dataset --client-images 200 --batch-size 20 --local-lr 0.02 --momentum 0.9 --lr-decay 0.95 \
    --rounds 30 --trials 1 --eval-every 1 --threads 2 "$@"
