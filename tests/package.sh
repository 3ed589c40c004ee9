#!/usr/bin/env bash
# The package as users get it: builds sdist and wheel, installs the wheel without constraints into a new environment, and
# runs the quick start, the launcher and a report there, from outside the checkout.
# Usage: tests/package.sh [FOLDER for the environment and the distributions]
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
mkdir -p "${1:-.venv-package}"
folder=$(realpath "${1:-.venv-package}")
python=${PYTHON:-python3}
torch=${TORCH:-$(grep -E '^torch==' constraints.txt)} # what lies at hand: the newest one would bring CUDA along

echo "== build"
rm -rf "$folder"/dist "$folder"/env "$folder"/elsewhere
"$python" -m venv "$folder/env"
pip() { "$folder/env/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install --quiet build
"$folder/env/bin/python" -m build --outdir "$folder/dist" . >"$folder/build.log" 2>&1 || { cat "$folder/build.log"; exit 1; }
ls "$folder/dist"

echo "== install"
pip install --quiet "$torch"
pip install --quiet "$(ls "$folder"/dist/*.whl)[report]"
pip check

mkdir "$folder/elsewhere"
cd "$folder/elsewhere"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
bin=$folder/env/bin

echo "== quick start"
"$bin/python" "$root/tests/docs/python_blocks.py" "$root/docs/quick_start.md" --until "Write a packed" >quick_start.py
"$bin/python" quick_start.py
"$bin/python" - <<'CODE'
import hf_stablespam
from pathlib import Path
assert "site-packages" in hf_stablespam.__file__, hf_stablespam.__file__
assert (Path(hf_stablespam.__file__).parent / "py.typed").exists()
CODE

echo "== launcher"
cp "$root/examples/plain_trainer.py" train.py
"$bin/hf-stablespam" --four-bit int4 --gradient-norms train.py --output_dir runs/launched --optim stable_spam \
    --max_grad_norm 0 --max_steps 4 --logging_steps 2 --use_cpu True --report_to none
grep -q '"gradients/norm_max"' runs/launched/trainer_state.json

echo "== report"
"$bin/hf-stablespam" report runs/launched -o report.html
"$bin/hf-stablespam" --version
test -s report.html
echo "package: all passed"
