#!/bin/sh
# DLG with train and eval mode, dropout and BatchNorm. The same victims under each; ends with a table.
# sh experiments/grad/ablation_mode.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
exec "$PYTHON" "$ROOT/main_grad.py" dlg --dataset "$DATASET" --base-datadir "$BASE_DATADIR" \
    --trials 4 --sweep norm=none,batch dropout=0,0.5 model-mode=eval,train "$@"
