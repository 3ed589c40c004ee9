#!/usr/bin/env bash
# The first run on a GPU: what nobody could check on a CPU, in at most eight minutes of one H100, in order of value.
#
#   benchmarks/gpu_check.sh RESULTS_FOLDER
#   benchmarks/gpu_check.sh RESULTS_FOLDER --rehearse    # on a CPU: tiny sizes, kernels in Triton's interpreter
#
# Five parts (`python -m benchmarks.gpu_check --help` names them), each a process of its own with a share of the time. What
# a part has measured is in its CSV file at once; one that fails or runs over its share does not take the others along.
# The last thing on the screen is a table. Needs torch, triton, transformers, pytest, hypothesis; no network.
set -uo pipefail
results=${1:?"usage: benchmarks/gpu_check.sh RESULTS_FOLDER [--rehearse]"}
rehearse=${2:-}
mkdir -p "$results"
results=$(realpath "$results")
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
[ -n "$rehearse" ] && export TRITON_INTERPRET=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
began=$SECONDS
budget=${SECONDS_IN_ALL:-470}

# PART SECONDS: the last part gets what is left.
run() {
    local left=$((budget - SECONDS + began))
    local share=$(($2 < left ? $2 : left))
    echo "== $1: at most $share s"
    [ "$share" -gt 10 ] || { echo "$1,not run: no time left," >>"$results/parts.csv"; return; }
    local start=$SECONDS state=done
    timeout --kill-after=5 "$share" "$python" -m benchmarks.gpu_check "$1" --results "$results" --seconds "$share" $rehearse \
        >"$results/$1.log" 2>&1 || state="failed or ran over (exit $?); see $1.log"
    echo "$1,$state,$((SECONDS - start))" >>"$results/parts.csv"
    tail -n 3 "$results/$1.log"
}

[ -f "$results/parts.csv" ] || echo "part,state,seconds" >"$results/parts.csv"
run correctness 150
run step 90
run linear 70
run training 80
run loss 470
"$python" -m benchmarks.gpu_check table --results "$results"
