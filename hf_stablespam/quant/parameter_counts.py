"""How many parameters of a model are trained in 4 bits, and how many are not, by kind."""

from collections import Counter

from torch import nn

from hf_stablespam.quant.layers.experts import FourBitExperts, weight_names
from hf_stablespam.quant.layers.linear import FourBitLinear


def parameter_counts(model: nn.Module) -> tuple[Counter[str], Counter[str]]:
    """Numbers of parameters in 4 bits and in high precision, each by the kind of module that holds them.

    Tied parameters count once, where they are met first. Biases are never in 4 bits.
    """
    four_bit: Counter[str] = Counter()
    high_precision: Counter[str] = Counter()
    seen: set[int] = set()
    for module in model.modules():
        kind = type(module).__name__
        converted: set[str] = set()
        if isinstance(module, FourBitLinear):
            kind, converted = "Linear", {"weight"}
        elif isinstance(module, FourBitExperts):
            kind, converted = module.original_class.__name__, set(weight_names(module))
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                (four_bit if name in converted else high_precision)[kind] += parameter.numel()
    return four_bit, high_precision


def in_words(model: nn.Module) -> str:
    """The same as a phrase: ``106M of 135M parameters in 4 bits (Linear 106M), 28.3M not (Embedding 28.3M)``."""
    four_bit, rest = parameter_counts(model)
    inside, outside = sum(four_bit.values()), sum(rest.values())
    parts = [f"{_short(inside)} of {_short(inside + outside)} parameters in 4 bits ({_listed(four_bit)})"]
    if outside:
        parts.append(f"{_short(outside)} not ({_listed(rest)})")
    return ", ".join(parts)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{kind} {_short(count)}" for kind, count in counts.most_common())


def _short(count: int) -> str:
    for size, letter in ((1_000_000_000, "B"), (1_000_000, "M"), (1_000, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)
