#!/bin/sh
# Do these attacks work in federated learning? Every gradient-matching attack over local steps, learning rate and
# images of a client, on the same victims. Each attack ends with its table and plot, all together with one more.
# sh experiments/fed/recipe.sh [flags]      all flags: --help
# The whole grid takes many hours. QUICK=1 before it: a third of the grid, on 16x16 images.
# ATTACKS="ig_single sme" STEPS=1,5 RATES=0.01 IMAGES=1,4 before it narrow the grid.

BASE_DATADIR=${BASE_DATADIR:-}    # where the datasets lie, or are downloaded to; empty: datasets/ of this repository
DATASET=${DATASET:-photos}        # a name from --help, such as cifar10; photos needs no download

ROOT=$(dirname "$0")/../.. && . "$ROOT/experiments/env.sh"
OUT=${OUT:-$ROOT/results/recipe}
if [ -n "${QUICK:-}" ]; then
    ATTACKS=${ATTACKS:-dlg ig_single ig_multi sme dlf}
    STEPS=${STEPS:-1,5,20}
    IMAGES=${IMAGES:-1,4}
    set -- --image-size 16 --iterations 150 "$@"
fi
for attack in ${ATTACKS:-dlg idlg ig_single ig_multi sme dlf}; do
    "$PYTHON" "$ROOT/main_fed.py" "$attack" --dataset "$DATASET" --base-datadir "$BASE_DATADIR" --out "$OUT" \
        --model cnn --trials 2 --rounds 1 --sweep "local-epochs=${STEPS:-1,2,5,10,20}" \
        "local-lr=${RATES:-0.001,0.01,0.1}" "client-images=${IMAGES:-1,4,8}" "$@" || exit
done
set --
for run in "$OUT"/fed/*/*/done; do set -- "$@" "${run%/done}"; done
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" -m report --to "$OUT" "$@" && echo "$OUT/table.md, table.csv, plot.png"
