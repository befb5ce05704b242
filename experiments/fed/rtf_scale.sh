#!/bin/sh
# Robbing the Fed after 8 and 40 local steps: as published, with its bins and with calibrated ones; then over scale
# (threshold drift per step; 0 is the published one), connection and decoder. Each ends with a table and a plot.
# sh experiments/fed/rtf_scale.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
set -- --dataset "$DATASET" --base-datadir "$BASE_DATADIR" --model cnn --client-images 64 --batch-size 8 --clients 3 \
    --rounds 1 --trials 3 "$@"
"$PYTHON" "$ROOT/main_fed.py" rtf "$@" --threshold-drift 0 --connection linear \
    --sweep quantiles=official,smooth local-epochs=1,5 decoder=bias,rows || exit
exec "$PYTHON" "$ROOT/main_fed.py" rtf "$@" \
    --sweep threshold-drift=0,1e-7,1e-6,1e-5,1e-4,1e-3 local-epochs=1,5 connection=addition,linear decoder=rows,bias
