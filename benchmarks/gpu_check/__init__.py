"""What is run first on a GPU; `benchmarks/gpu_check.sh` calls it."""
