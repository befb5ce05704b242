#!/bin/sh
# iDLG (Zhao, Mopuri and Bilen, 2020) on the gradient of one image: the label first, then the pixels.
# sh experiments/grad/idlg.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
exec "$PYTHON" "$ROOT/main_grad.py" idlg --dataset "$DATASET" --base-datadir "$BASE_DATADIR" "$@"
