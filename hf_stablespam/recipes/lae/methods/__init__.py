"""The paper's three PEFT methods, for PEFT: adapter beside the attention, LoRA, and prefix; with learnable scalars."""

import peft
from packaging.version import Version

OLDEST_PEFT = "0.18"  # the first with a base class for tuners that are registered from outside

if Version(peft.__version__) < Version(OLDEST_PEFT):
    raise ImportError(f"LAE needs peft >= {OLDEST_PEFT}, found {peft.__version__}: pip install -U peft")
