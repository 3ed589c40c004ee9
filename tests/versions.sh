#!/usr/bin/env bash
# The Trainer's tests under each supported transformers, each in a virtual environment of its own, with what is too
# large or too new for `make test` beside the newest. Usage: tests/versions.sh [FOLDER of the environments]
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv-versions}
python=${PYTHON:-python3}

# VERSION [further packages]; what transformers itself pins tightly must not come from our constraints.
run() {
    local version=$1 env="$folder/transformers-$1"
    shift
    [ -x "$env/bin/python" ] || "$python" -m venv "$env"
    mkdir -p "$folder"
    grep -vE '^(transformers|huggingface[-_]hub|tokenizers|hf[-_]xet)\b' constraints.txt >"$folder/constraints-$version.txt"
    "$env/bin/python" -m pip --disable-pip-version-check install --quiet -c "$folder/constraints-$version.txt" \
        "transformers==$version" -e '.[lowbit]' pytest tensorboard "$@"
    echo "== transformers $version"
    OMP_NUM_THREADS=1 PATH="$PWD/$env/bin:$PATH" "$env/bin/python" -m pytest tests/trainer tests/monitor
}

run 4.57.6
run 5.0.0
run "$(sed -n 's/^transformers==\([0-9.]*\).*/\1/p' constraints.txt)" trl optuna bitsandbytes
