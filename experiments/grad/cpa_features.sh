#!/bin/sh
# The Cocktail Party Attack behind convolutions: embeddings are unmixed, then images sought that have them, with features
# untrained and trained on public data. Ends with a table.
# sh experiments/grad/cpa_features.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
exec "$PYTHON" "$ROOT/main_grad.py" cpa --dataset "$DATASET" --base-datadir "$BASE_DATADIR" \
    --model cnn --batch-size 8 --trials 4 --sweep pretrain-epochs=0,1,3 unmixing=differences,adam,random "$@"
