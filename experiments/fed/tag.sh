#!/bin/sh
# TAG (Deng et al., 2021) on the weight updates of federated clients with two sentences each.
# sh experiments/fed/tag.sh [flags]      all flags: --help

BASE_DATADIR=${BASE_DATADIR:-}    # where textfile finds your text: a file or a folder; empty: datasets/ of this repository
DATASET=${DATASET:-text}          # text needs no download; textfile reads your own

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
exec "$PYTHON" "$ROOT/main_fed.py" tag --dataset "$DATASET" --base-datadir "$BASE_DATADIR" \
    --model gpt --client-images 2 --trials 3 "$@"
