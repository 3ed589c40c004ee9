#!/usr/bin/env bash
# The Trainer's tests under each supported transformers, each in a virtual environment of its own; the newest also
# with what is too large for `make test`. All run, whatever fails; the exit status is 1 if one did.
# Usage: tests/versions.sh [FOLDER for the environments] [NAME...], of oldest, first-5, middle and newest; default all
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv-versions}
wanted=" ${*:2} "
python=${PYTHON:-python3}
failed=()
mkdir -p "$folder"

# NAME CONSTRAINTS PACKAGE...
run() {
    local name=$1 constraints=$2 env=$folder/$1
    shift 2
    [[ $wanted == *" $name "* || $wanted == "  " ]] || return 0
    [ -x "$env/bin/python" ] || "$python" -m venv "$env"
    "$env/bin/python" -m pip --disable-pip-version-check install --quiet -c "$constraints" \
        -e '.[lowbit]' pytest sybil tensorboard "$@"
    echo "== $name"
    SECONDS=0
    OMP_NUM_THREADS=1 PATH="$(realpath "$env")/bin:$PATH" "$env/bin/python" -m pytest ${PYTEST_ARGS:-} tests/trainer ||
        failed+=("$name")
    echo "== $name: $SECONDS s"
}

# An older transformers brings its own company: of our pins only those hold that it does not care about.
grep -E '^(torch|torchao|accelerate|tensorboard)==' constraints.txt >"$folder/constraints.txt"
run oldest "$folder/constraints.txt" transformers==4.57.6
run first-5 "$folder/constraints.txt" transformers==5.0.0
run middle "$folder/constraints.txt" transformers==5.12.0
run newest constraints.txt transformers trl==1.16.0 optuna==5.0.0 bitsandbytes==0.50.2

[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
