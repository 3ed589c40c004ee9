"""A `forward` that stands on a layer itself and not in its class, where accelerate's hooks and others put theirs.

Swapping the layer's class does not change what it calls: the 4-bit layer would go on multiplying in high precision.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

# What accelerate keeps a layer's former forward under.
PLACES = ("forward", "_old_forward")


def rebind_forward(layer: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> None:
    """Let what stands on `layer` call the forward of its new class where it called that of the old one."""
    for place in PLACES:
        if getattr(layer.__dict__.get(place), "__func__", None) is old.forward:
            layer.__dict__[place] = new.forward.__get__(layer)


def check_forward(layer: nn.Linear, name: str) -> None:
    """Raise unless calling a layer, not converted yet, calls the forward of whatever class it has.

    Raises:
        ValueError: it has a forward of its own that does not; the message names the layer.
    """
    own = layer.__dict__
    if "forward" not in own or any(getattr(own.get(place), "__func__", None) is nn.Linear.forward for place in PLACES):
        return
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
    if not called:
        raise ValueError(
            f"the layer {name!r} has a forward of its own, which does not call that of its class: it would not be in"
            " 4 bits; take away what replaced it, or name the layer in modules_to_not_convert"
        )
