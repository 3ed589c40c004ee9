"""A `forward` that stands on a layer itself and not in its class, where accelerate's hooks and others put theirs.

Swapping the layer's class does not change what it calls: the 4-bit layer would go on multiplying in high precision.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

# What accelerate keeps a layer's former forward under.
PLACES = ("forward", "_old_forward")


def rebind_forward(layer: nn.Module, old: Any, new: Any) -> None:
    """Let what stands on `layer` call the forward of its new class where it called that of the old one."""
    for place in PLACES:
        if getattr(layer.__dict__.get(place), "__func__", None) is old.forward:
            layer.__dict__[place] = new.forward.__get__(layer)


def check_forward(layer: nn.Module, name: str) -> None:
    """Raise unless calling a layer, or a block of experts, not converted yet, calls the forward of its class.

    Raises:
        ValueError: it has a forward of its own that does not; the message names the layer.
    """
    own, usual = layer.__dict__, type(layer).forward
    if "forward" not in own or any(getattr(own.get(place), "__func__", None) is usual for place in PLACES):
        return
    if type(layer) is not nn.Linear or not _calls_its_class(layer):  # what experts are called with differs
        raise ValueError(
            f"the layer {name!r} has a forward of its own, which does not call that of its class: it would not be in"
            " 4 bits; take away what replaced it, or name the layer in modules_to_not_convert"
        )


def _calls_its_class(layer: nn.Linear) -> bool:
    """Whether a forward that stands on a linear layer asks for the class's forward only when it is called."""
    called: list[object] = []

    class Probe(nn.Linear):
        def forward(self, input: Tensor, *_: Any, **__: Any) -> Tensor:
            called.append(self)
            return input.new_zeros(*input.shape[:-1], self.out_features)

    layer.__class__ = Probe
    try:
        layer.forward(layer.weight.new_zeros(1, layer.in_features))
    except Exception:
        called.clear()
    finally:
        layer.__class__ = nn.Linear
    return bool(called)
