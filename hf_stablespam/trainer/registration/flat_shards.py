"""Ways of sharding that hand the optimizer flat slices are refused before training.

Stable-SPAM's statistics are those of whole weight matrices. FSDP2 and tensor parallelism keep each parameter's identity
(`DTensor`); FSDP1 and DeepSpeed ZeRO concatenate and cut, and the statistics would be wrong without any sign of it.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainingArguments

_INSTEAD = (
    "whose flat slices have no whole-tensor statistics; use FSDP2 (fsdp_version: 2 in accelerate's file, or "
    'fsdp_config={"version": 2}, for which transformers 4 needs FSDP_VERSION=2 in the environment), DDP, '
    "or DeepSpeed stage 0"
)


def refuse_flat_shards(args: "TrainingArguments", who: str | None = None) -> None:
    """Stop a run whose optimizer would see slices of concatenated parameters.

    Args:
        args: of the run; what `accelerate launch` configured is looked up as well.
        who: cannot work with them; default the optimizer.

    Raises:
        ValueError: for FSDP1, FSDP of torch_xla's first kind, and DeepSpeed ZeRO stages 1 to 3.
    """
    who = who or f"optim={getattr(args.optim, 'value', args.optim)}"
    if fsdp_version(args) == 1:
        raise ValueError(f"{who} does not work with FSDP version 1, {_INSTEAD}")
    if (stage := zero_stage(args)) > 0:
        raise ValueError(f"{who} does not work with DeepSpeed ZeRO stage {stage}, {_INSTEAD}")


def fsdp_version(args: "TrainingArguments") -> int | None:
    """1 or 2, or `None` without FSDP. The default of transformers 4 is 1, that of 5 is 2."""
    plugin = _launched_plugin("fsdp_plugin")
    if plugin is not None:
        return int(getattr(plugin, "fsdp_version", 1))
    if not args.fsdp:
        return None
    config: dict[str, Any] = args.fsdp_config or {}  # type: ignore[assignment]
    if config.get("xla"):
        return 2 if config.get("xla_fsdp_v2") else 1
    filled_in = getattr(args, "fsdp_plugin_args", None)
    if filled_in is None:  # transformers 4, which does not read fsdp_config["version"]
        return int(os.environ.get("FSDP_VERSION", 1))
    return int(filled_in.get("fsdp_version", 1))


def zero_stage(args: "TrainingArguments") -> int:
    """DeepSpeed's ZeRO stage; 0 where it is not used, or does not shard."""
    config = getattr(args, "hf_deepspeed_config", None)
    if config is not None:
        return int(config.get_value("zero_optimization.stage", 0))
    plugin = getattr(args, "deepspeed_plugin", None)
    return int(plugin.zero_stage) if plugin is not None else 0


def runs_deepspeed(args: "TrainingArguments") -> bool:
    """Whether DeepSpeed's engine trains, of whatever stage."""
    return any(getattr(args, name, None) is not None for name in ("hf_deepspeed_config", "deepspeed_plugin"))


def _launched_plugin(name: str) -> Any:
    """A plugin that the Trainer's `Accelerator` made from what `accelerate launch` left in the environment."""
    from accelerate.state import AcceleratorState

    return AcceleratorState._shared_state.get(name)
