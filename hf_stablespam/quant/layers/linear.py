"""`FourBitLinear`: a fake-quantized `nn.Linear` for quantization-aware training, with the parameters of `nn.Linear`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_stablespam._sharded import full
from hf_stablespam.quant.config import FourBitConfig
from hf_stablespam.quant.layers.checks import check_class, check_weight
from hf_stablespam.quant.layers.instance_forward import rebind_forward
from hf_stablespam.quant.layers.matmul import FourBitMatmul, Recipe, quantize_weight


class FourBitLinear(nn.Linear):
    """A fake-quantized linear layer for quantization-aware training: 4-bit operands, a master weight in high precision.

    ``y = Q_a(x) · Q_w(W)ᵀ + b``; ``∂x = Q_g(∂y) · Q_w(W)``; ``∂W = Q_g(∂y)ᵀ · Q_a(x)``; each ``Q`` as `config` says.
    The arithmetic is simulated: operands are numbers on the 4-bit grid, in the dtype of the layer (or of autocast).

    Args:
        in_features, out_features, bias, device, dtype: as for `nn.Linear`.
        config: formats and groups; default `FourBitConfig()`.

    Raises:
        TypeError: a weight that is not floating-point.

    Example:
        >>> layer = FourBitLinear(8, 4, config=FourBitConfig(weight="int4", activation=None))
        >>> layer(torch.ones(2, 8)).shape
        torch.Size([2, 4])
    """

    four_bit: FourBitConfig

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: FourBitConfig | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.configure(config or FourBitConfig())

    @classmethod
    def adopt(cls, linear: nn.Linear, config: FourBitConfig) -> FourBitLinear:
        """Turn an `nn.Linear` into a `FourBitLinear` in place; parameters, hooks and names stay."""
        linear.__class__ = cls
        adopted: FourBitLinear = linear  # type: ignore[assignment]
        adopted.configure(config)
        rebind_forward(adopted, nn.Linear, cls)
        return adopted

    def configure(self, config: FourBitConfig) -> None:
        """Set what the layer quantizes."""
        check_weight(self.weight)
        self.four_bit = config
        self.recipe = Recipe.of(config)
        # Layers that an inference engine fuses (q, k, v; gate, up) share NVFP4's scale of the whole tensor.
        self.scale_partners: tuple[FourBitLinear, ...] = ()
        # The layer of PEFT whose adapter is added to this weight before it is rounded; in a tuple, so that it does not
        # become a child of its own child.
        self.adapter: tuple[Any, ...] = ()
        self._parameter_id = id(self.weight)
        self._fixed = 0  # how many `fixed_weights` blocks are open
        self._called = False  # since it was converted
        self.forget_weight()

    def release(self) -> nn.Linear:
        """Turn the layer back into a plain `nn.Linear`, in place; its partners share their scale without it.

        Raises:
            ValueError: its class is another than the one that it was converted to.
        """
        check_class(self, FourBitLinear)
        for partner in self.scale_partners:
            others = tuple(layer for layer in partner.scale_partners if layer is not self)
            partner.scale_partners = others if len(others) > 1 else ()
        for name in ("four_bit", "recipe", "scale_partners", "adapter", "_parameter_id", "_fixed", "_called", "_kept"):
            del self.__dict__[name]
        rebind_forward(self, type(self), nn.Linear)
        self.__class__ = nn.Linear  # type: ignore[assignment]
        return self

    def forget_weight(self) -> None:
        """Drop the 4-bit weight that a `fixed_weights` block keeps; outside of one there is none."""
        self._kept: tuple[Any, list[tuple[Tensor, int, int]], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x` (..., in_features)."""
        if self.adapter and self.adapter[0].is_merging():  # LoRA over it does not call it
            raise ValueError(
                "adapters='merged': the layer under LoRA was called by itself, as X-LoRA does, so that nothing would be"
                " merged into its weight before the rounding; use adapters='separate'"
            )
        if not torch.compiler.is_compiling() and not self._called:
            self._called = True
        device = x.device.type
        if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
            return self._product(x, self.weight.dtype, self.bias)
        dtype = torch.get_autocast_dtype(device)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(device, enabled=False):  # the quantizers' arithmetic is not to be cast
            return self._product(x.to(dtype), dtype, bias)

    def quantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight on its 4-bit grid (out_features, in_features), as the forward pass uses it.

        Args:
            dtype: dtype of the product; default: that of the weight.
        """
        # A tensor made in inference mode could not be used by a later training step.
        with torch.inference_mode(False), torch.no_grad():
            return quantize_weight(self.effective_weight(), self.recipe, dtype or self.weight.dtype, self.shared_amax())

    def shared_amax(self) -> Tensor | None:
        """Largest magnitude of this weight and its partners' (NVFP4 only)."""
        if not self.scale_partners:
            return None
        peaks = [partner.effective_weight().detach().abs().amax() for partner in self.scale_partners]
        peaks = [full(peak) for peak in peaks]
        return torch.stack([peak.float().to(self.weight.device) for peak in peaks]).amax()

    def effective_weight(self) -> Tensor:
        """The weight that is rounded: with the adapter that is merged into it, where there is one."""
        return self.adapter[0].merged_weight() if self.adapter and self.adapter[0].is_merging() else self.weight

    def _product(self, x: Tensor, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling() or not (self._fixed or self._saves_weight()):
            return FourBitMatmul.apply(x, self.weight, bias, None, self.shared_amax(), self.recipe)
        weight_q = self.fixed_weight(dtype, self.quantized_weight)
        return FourBitMatmul.apply(x, self.weight, bias, weight_q, None, self.recipe)

    def _saves_weight(self) -> bool:
        """Whether the 4-bit weight is saved for the backward pass, rather than made there again."""
        if not self.four_bit.cache_weights:
            return False
        # FSDP2 frees the weights that it gathered until the backward pass, to save memory. It is known by the
        # parameter not being the one that was converted. (DDP leaves the parameter alone.)
        replaced = id(self.weight) != self._parameter_id
        return not (replaced and torch.distributed.is_available() and torch.distributed.is_initialized())

    def fixed_weight(self, dtype: torch.dtype, make: Callable[[torch.dtype], Tensor]) -> Tensor:
        """``make(dtype)``, the 4-bit weight, kept while a `fixed_weights` block is open."""
        sources, settings = self._made_from()
        if not self._fixed or any(source.is_inference() for source in sources):  # these count no versions
            return make(dtype)
        what = (dtype, settings)
        key = [(source, source._version, source.data_ptr()) for source in sources]
        if self._kept is not None and self._kept[0] == what and _same(self._kept[1], key):
            return self._kept[2]
        self._kept = None  # freed before its successor is made
        self._kept = (what, key, make(dtype))
        return self._kept[2]

    def _made_from(self) -> tuple[list[Tensor], list[Any]]:
        """The tensors that the 4-bit weight is made from, those of the partners too, and what else decides on it."""
        sources: list[Tensor] = []
        settings: list[Any] = []
        for layer in self.scale_partners or (self,):
            sources.append(layer.weight)
            if layer.adapter and layer.adapter[0].is_merging():
                tensors, names = layer.adapter[0].merged_from()
                sources += tensors
                settings += [names]
        return sources, settings

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget_weight()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None, "_fixed": 0, "_called": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"_called": False, **state})  # of an earlier version

    def extra_repr(self) -> str:
        config = self.four_bit
        operands = f"weight={config.weight}, activation={config.activation}, gradient={config.gradient}"
        return f"{super().extra_repr()}, {operands}"


def _same(before: list[tuple[Tensor, int, int]], now: list[tuple[Tensor, int, int]]) -> bool:
    """Whether these are the same tensors, at the same place and in the same version."""
    pairs = zip(before, now, strict=False)
    return len(before) == len(now) and all(old[0] is new[0] and old[1:] == new[1:] for old, new in pairs)


@contextmanager
def fixed_weights(model: nn.Module) -> Iterator[None]:
    """Round each 4-bit weight of `model` once for all forward passes in the block, as for generating text.

    Outside of such a block the weight is rounded in every forward pass, because it may have changed: PEFT's merging,
    some optimizers and averages of weights write to ``weight.data``, of which PyTorch leaves no trace. So do not
    write to ``weight.data`` inside of the block; all other changes are noticed. Costs one more tensor of the weight's
    size for each layer.

    Args:
        model: a module with layers of `convert_to_4bit`.

    Example:
        >>> model = nn.Sequential(FourBitLinear(8, 4))
        >>> with fixed_weights(model):
        ...     outputs = [model(torch.ones(1, 8)) for _ in range(3)]
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "forget_weight")]
    for layer in layers:
        layer._fixed += 1
    try:
        yield
    finally:
        for layer in layers:
            layer._fixed -= 1
            if not layer._fixed:
                layer.forget_weight()


def trained_uncalled(model: nn.Module) -> list[str]:
    """Names of 4-bit layers that were never called although their weight has a gradient.

    Something else multiplied by the weight, in high precision. Nothing is known of compiled layers.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, FourBitLinear) and not module.adapter
    }
    called = {id(layer.weight) for layer in layers.values() if layer._called}
    return [name for name, layer in layers.items() if layer.weight.grad is not None and id(layer.weight) not in called]
