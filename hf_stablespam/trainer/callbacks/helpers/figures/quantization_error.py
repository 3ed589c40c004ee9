"""How far the 4-bit weights of a model are from the weights that they stand for."""

import torch
from torch import Tensor, nn

from hf_stablespam._sharded import full
from hf_stablespam.quant import FourBitLinear
from hf_stablespam.quant.layers.expert_weights import quantize_experts
from hf_stablespam.quant.layers.experts import FourBitExperts, weight_names
from hf_stablespam.quant.layers.matmul import quantize_weight


@torch.no_grad()
def squared_errors(model: nn.Module) -> tuple[list[str], Tensor]:
    """Names of the 4-bit weights, and Σw² and Σ(w − Q(w))² of each, on the device: (L, 2).

    A sharded weight is gathered, one layer at a time.
    """
    names, rows = [], []
    for name, module in model.named_modules():
        if isinstance(module, FourBitLinear) and module.recipe.weight is not None:
            names.append(f"{name}.weight")
            rows.append(_squared_error(module))
        elif isinstance(module, FourBitExperts) and module.recipe.weight is not None:
            for weight in weight_names(module):
                names.append(f"{name}.{weight}")
                rows.append(_experts_error(module, weight))
    device = rows[0].device if rows else torch.device("cpu")
    return names, torch.stack([row.to(device) for row in rows]) if rows else torch.empty(0, 2)


def _squared_error(module: FourBitLinear) -> Tensor:
    weight = full(module.effective_weight().detach())
    quantized = quantize_weight(weight, module.recipe, weight.dtype, module.shared_amax())
    # With a Hadamard transform both are in its basis.
    exact = quantize_weight(weight, module.recipe._replace(weight=None), weight.dtype)
    return _squares(exact, quantized)


def _experts_error(module: FourBitExperts, name: str) -> Tensor:
    """Of all experts of a block together."""
    weight = full(getattr(module, name).detach())
    transposed = bool(module.is_transposed)
    exact = quantize_experts(weight, module.recipe._replace(weight=None), weight.dtype, transposed)
    return _squares(exact, quantize_experts(weight, module.recipe, weight.dtype, transposed))


def _squares(exact: Tensor, quantized: Tensor) -> Tensor:
    return torch.stack([part.float().square().sum() for part in (exact, exact - quantized)])
