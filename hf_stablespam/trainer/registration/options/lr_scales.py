"""Learning rates apart: parameter groups for embeddings, the output head and norms, made of the groups that exist."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

KINDS = ("embedding", "head", "norm")
SCALE = "lr_scale"  # in a group: its learning rate is so many times that of the run
_SUFFIX = "_lr_scale"
OPTIONS = tuple(kind + _SUFFIX for kind in KINDS)


def take_scales(options: dict[str, Any]) -> dict[str, float]:
    """Remove the options of this file from keyword arguments of an optimizer; kind of parameter → scale."""
    return {kind: options.pop(kind + _SUFFIX) for kind in KINDS if kind + _SUFFIX in options}


def check_scale(kind: str, scale: Any) -> None:
    """A factor on a learning rate is a number above 0.

    Raises:
        ValueError: if it is not.
    """
    from hf_stablespam.optim.options import ABOVE_ZERO

    if not ABOVE_ZERO.accepts(scale):
        raise ValueError(
            f"{kind}{_SUFFIX} must be {ABOVE_ZERO.rule}, got {scale!r}; leave it out for the common learning rate"
        )


def asked_scales(args: Any, callbacks: Iterable[Any]) -> dict[str, float]:
    """What `optim_args` and a `LearningRateScaleCallback` ask for.

    Raises:
        ValueError: one kind of parameter by both.
    """
    from hf_stablespam.trainer.callbacks.learning_rate_scale import LearningRateScaleCallback
    from hf_stablespam.trainer.registration.options.optim_args import SPAM, STABLE_SPAM, parse_optim_args

    name = getattr(args.optim, "value", args.optim)
    scales = take_scales(parse_optim_args(args.optim_args, name)) if name in (STABLE_SPAM, SPAM) else {}
    for callback in callbacks:
        if isinstance(callback, LearningRateScaleCallback):
            twice = sorted(scales.keys() & callback.scales.keys())
            if twice:
                raise ValueError(
                    f"{twice[0]}{_SUFFIX} is set twice, in optim_args or by LearningRateScaleCallbacks; leave one out"
                )
            scales |= callback.scales
    return scales


def kinds_of(model: "torch.nn.Module") -> dict[int, str]:
    """`id` of a parameter → its kind. A head that is tied to the embedding is an embedding."""
    from torch.nn import Embedding

    found: dict[int, str] = {}

    def note(module: "torch.nn.Module | None", kind: str) -> None:
        for param in module.parameters() if module is not None else ():
            found.setdefault(id(param), kind)

    for module in model.modules():
        if isinstance(module, Embedding):
            note(module, "embedding")
    output = getattr(model, "get_output_embeddings", lambda: None)
    note(output(), "head")
    for module in model.modules():
        if "norm" in type(module).__name__.lower() and not any(True for _ in module.children()):
            note(module, "norm")
    return found


def scale_learning_rates(optimizer: Any, model: "torch.nn.Module", scales: Mapping[str, float]) -> None:
    """Give kinds of parameters groups of their own, with learning rates of their own.

    The groups that are there keep their place, their options and, as the first one's is what is logged, their learning
    rate; what is taken out of a group follows behind, with the group's options. To be called before there is a
    schedule. A second call for an optimizer that was scaled does nothing.

    Args:
        optimizer: any of torch's kind, that has not yet made a step.
        model: whose parameters it trains.
        scales: kind of parameter → factor on the learning rate.

    Raises:
        ValueError: a kind of which nothing is trained, or an optimizer that has begun.
    """
    if is_scaled(optimizer):
        return
    if optimizer.state:
        raise ValueError("learning rates are set apart before the first step, and this optimizer has made one")
    kinds = kinds_of(model)
    trained = {kinds.get(id(param)) for group in optimizer.param_groups for param in group["params"]}
    for kind in scales:
        if kind not in trained:
            raise ValueError(f"{kind}{_SUFFIX} must be left out, {_why_none(kind, model)}")
    for group in list(optimizer.param_groups):
        parts = {kind: [i for i, p in enumerate(group["params"]) if kinds.get(id(p)) == kind] for kind in scales}
        taken = [_part(group, places) for places in parts.values()]
        kept = set(range(len(group["params"]))).difference(*parts.values())
        group.update(_part(group, sorted(kept)), **{SCALE: 1.0})
        for kind, part in zip(parts, taken, strict=True):
            if part["params"]:  # not by `add_param_group`: these parameters are known to the optimizer already
                rates = {"lr": group["lr"] * scales[kind], SCALE: float(scales[kind])}
                optimizer.param_groups.append({**part, **rates})
    check_scaled(optimizer, scales)


def is_scaled(optimizer: Any) -> bool:
    """Whether `scale_learning_rates` has made the groups."""
    return any(SCALE in group for group in getattr(optimizer, "param_groups", []))


def check_scaled(optimizer: Any, scales: Mapping[str, float]) -> None:
    """At the start of training, the optimizer has the groups that were asked for.

    Raises:
        ValueError: it was built on another way than by `Trainer.create_optimizer`.
    """
    if scales and not is_scaled(optimizer):
        raise ValueError(
            f"{_listed(scales)} would count for nothing: this optimizer was not built by Trainer.create_optimizer; "
            "give it parameter groups with learning rates of their own"
        )


def differing(optimizer: Any, scales: Mapping[str, float]) -> set[float]:
    """Scales that were asked for and that no group has, because a checkpoint with others was loaded."""
    return set(scales.values()) - {group.get(SCALE) for group in optimizer.param_groups}


def _part(group: Mapping[str, Any], places: Iterable[int]) -> dict[str, Any]:
    """A group with some of the parameters of another, and its options."""
    places = list(places)
    lists = {name: [group[name][i] for i in places] for name in ("params", "param_names") if name in group}
    return {**group, **lists}


def _why_none(kind: str, model: "torch.nn.Module") -> str:
    if kind == "head":
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        output = getattr(model, "get_output_embeddings", lambda: None)()
        weights = [getattr(module, "weight", None) for module in (embedding, output)]
        if weights[0] is not None and weights[0] is weights[1]:
            return f"the head is tied to the embedding; use embedding{_SUFFIX}"
        return "the model has no output head that is trained"
    return f"no {kind} is trained"


def _listed(scales: Mapping[str, float]) -> str:
    return ", ".join(f"{kind}{_SUFFIX}={scale:g}" for kind, scale in scales.items())
