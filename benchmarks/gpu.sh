#!/usr/bin/env bash
# The evidence that needs a GPU, about 100 minutes on one: Llama-60M and 130M in bfloat16 and INT4, AdamW with clipping
# and Stable-SPAM, each for the steps that fit into MINUTES; then the step times of optimizers and 4-bit linears.
#
#   benchmarks/gpu.sh                 # all of it, rows appended to benchmarks/results/
#   MINUTES=2 SIZES=60m benchmarks/gpu.sh
#
# Needs an environment with torch for the GPU and `pip install -e .`; downloads nothing: the data is the source code of
# the standard library and of the installed packages.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python}
MINUTES=${MINUTES:-10}
SIZES=${SIZES:-60m 130m}
BATCH_SIZE=${BATCH_SIZE:-128}
RESULTS=${RESULTS:-benchmarks/results}

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh needs a GPU that torch can use (torch.cuda.is_available() is False); python benchmarks/quality.py runs on a CPU" >&2
    exit 1
fi

for size in $SIZES; do
    "$PYTHON" benchmarks/quality.py --studies at_scale --model_size "$size" --data installed_sources --bf16 \
        --batch_size "$BATCH_SIZE" --block_size 256 --minutes "$MINUTES" --results "$RESULTS"
done
"$PYTHON" benchmarks/optimizer_step.py
"$PYTHON" benchmarks/four_bit_linear.py
