#!/bin/sh
# Measures the tables of README.md and docs/results.md anew and writes them there.
# sh experiments/results.sh [--quick] [--tables NAME ...]      --quick: fewer victims, for two cores and half an hour
# Runs that have finished are not run again, so that an interrupted measurement goes on where it stopped.

ROOT=$(dirname "$0")/.. && . "$ROOT/experiments/env.sh"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m experiments.results "$@"
