# Sets PYTHON to an interpreter that meets $REQUIREMENTS (requirements.txt unless the caller says otherwise), and
# BASE_DATADIR. Every script sources this file after it has set ROOT. The current directory stays the same.
# PYTHON is the given one, else the first that meets them of: active environment (venv, conda), .venv, python3, python.
# If none does, requirements_met.py installs them for the first that runs: into the environment that it belongs to or,
# for a system Python, into a .venv made from it.

ROOT=$(CDPATH='' cd -- "$ROOT" && pwd)
BASE_DATADIR=${BASE_DATADIR:-$ROOT/datasets}
REQUIREMENTS=${REQUIREMENTS:-$ROOT/requirements.txt}
asked=${PYTHON:-} first='' venv=$ROOT/.venv met=$ROOT/experiments/requirements_met.py
stamp=$venv/.satisfies-$(cat "$ROOT/requirements.txt" "$REQUIREMENTS" | cksum | cut -d ' ' -f 1)

refuse() { printf '%s\n' "$*" >&2; exit 2; }

unchanged() {  # .venv met the requirements when the stamp was written, and no package has come or gone since
    [ "$PYTHON" = "$venv/bin/python" ] && [ -x "$PYTHON" ] && [ -e "$stamp" ] &&
        [ -z "$(find "$venv"/lib/python3*/site-packages -prune -newer "$stamp" 2>&1)" ]
}

choose() {
    for PYTHON in "$@"; do
        unchanged && return
        command -v "$PYTHON" >/dev/null && "$PYTHON" -B "$met" "$REQUIREMENTS" && return  # -B: writes no bytecode
        [ $? -ne 3 ] || first=${first:-$PYTHON}  # 3: it runs and lacks something; another code: it does not run
    done
    [ -n "$first" ] || return
    PYTHON=$("$first" -B "$met" --install "$REQUIREMENTS" "$venv") || exit 2
    [ -z "$asked" ] || [ "$asked" = "$PYTHON" ] || echo "PYTHON=$asked did not meet the requirements: using $PYTHON." >&2
}

if [ -n "$asked" ]; then
    choose "$asked" || refuse "PYTHON=$asked does not run as a Python interpreter."
else
    choose ${VIRTUAL_ENV:+"$VIRTUAL_ENV/bin/python"} ${CONDA_PREFIX:+"$CONDA_PREFIX/bin/python"} "$venv/bin/python" \
        python3 python || refuse "No python3 on the PATH: install Python 3.10 or newer, or run with PYTHON=/path/to/python."
fi
[ "$PYTHON" != "$venv/bin/python" ] || unchanged || touch "$stamp" 2>/dev/null || :
