"""Run a script as if the CPU were an accelerator: `cpu_as_accelerator.py SCRIPT ARGS...`, without `--use_cpu`.

accelerate looks at its FSDP settings only where it has found an accelerator; on the CPU it trains with DDP, silently.
Here the CPU with gloo passes for one. All else is the script's and the launcher's; at the end it says what it was.
"""

import os
import runpy
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, DistributedType, PartialState

if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.write(f"distributed {AcceleratorState().distributed_type.value}\n")
