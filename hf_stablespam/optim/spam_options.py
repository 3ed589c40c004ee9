"""Checks of `SPAM`'s options and gradients: every error names the option, the rule, the value and the remedy."""

from typing import Any

from hf_stablespam.optim.options import check_above_zero, check_adam, check_dense, check_flag, check_interval


def check_spam(options: dict[str, Any]) -> None:
    """Check the options of one parameter group of `SPAM`.

    Raises:
        ValueError: for the first option out of range.
    """
    check_adam(options)
    if options["threshold"] is not None:
        check_above_zero("threshold", options["threshold"], "; None switches clipping off")
    check_count("clip_delay", options["clip_delay"])
    if options["reset_interval"] is not None:
        check_interval("reset_interval", options["reset_interval"], "; None switches resets off")
    check_count("warmup_steps", options["warmup_steps"])
    check_density(options["density"])
    check_count("seed", options["seed"])
    check_flag("maximize", options["maximize"])


def check_count(name: str, value: Any) -> None:
    """A whole number ≥ 0."""
    if not (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        raise ValueError(f"{name} must be a whole number >= 0, got {value!r}")


def check_density(value: Any) -> None:
    """A share of entries: a number in (0, 1]."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and 0 < value <= 1):
        raise ValueError(f"density must be in (0, 1], got {value!r}; 1.0 trains every entry")


def check_gradients(group: dict[str, Any]) -> None:
    """Gradients must be dense and parameters whole.

    Raises:
        ValueError: for the first that is not.
    """
    for param in group["params"]:
        check_dense(param)
        if param.grad is not None and hasattr(param, "device_mesh"):
            raise ValueError(
                f"SPAM needs whole parameters, got a sharded one (DTensor) of shape {tuple(param.shape)}; "
                "train with DDP, or use StableSPAM"
            )
