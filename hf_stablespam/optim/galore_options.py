"""Checks of GaLore's options of `StableSPAM`: every error names the option, the rule, the value and the remedy."""

from typing import Any

from hf_stablespam.optim.options import check_above_zero, check_flag, check_interval
from hf_stablespam.optim.projection import PROJECTION_TYPES


def check_galore(options: dict[str, Any]) -> None:
    """Check the options of one parameter group that belong to the projection.

    Raises:
        ValueError: for the first option out of range.
    """
    rank = options["rank"]
    if rank is not None and not (isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1):
        raise ValueError(f"rank must be a whole number >= 1, got {rank!r}; None switches the projection off")
    check_interval("update_proj_gap", options["update_proj_gap"], "; 200 is GaLore's")
    check_above_zero("scale", options["scale"], "; 0.25 is GaLore's")
    if options["proj_type"] not in PROJECTION_TYPES:
        known = ", ".join(PROJECTION_TYPES)
        raise ValueError(f"proj_type must be one of {known}, got {options['proj_type']!r}; std is GaLore's")
    check_flag("reset_on_switch", options["reset_on_switch"])
    if rank is not None:
        for path in ("fused", "foreach"):
            if options[path]:
                raise ValueError(f"{path} must be None or False with rank={rank}, got True; leave it out")


def check_targets(group: dict[str, Any]) -> None:
    """A group that names a rank has a matrix to project.

    Raises:
        ValueError: if it has none.
    """
    if group.get("rank") is not None and not any(param.dim() == 2 for param in group["params"]):
        raise ValueError(f"rank={group['rank']} needs a 2-dimensional parameter in its group, but there is none")
