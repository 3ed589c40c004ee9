"""`FourBitConfig`: which operands of a linear layer are 4-bit numbers, in which format, and in which layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar

import torch

from hf_stablespam._names import nearest
from hf_stablespam.quant.config_checks import as_patterns, check_choices, check_formats, check_numbers, check_together
from hf_stablespam.quant.formats.number_formats import Format, ScaleKind, get_format
from hf_stablespam.quant.formats.quantizer import Quantizer


@dataclass(frozen=True)
class FourBitConfig:
    """4-bit training of linear layers: ``y = Q_a(x) · Q_w(W)ᵀ + b``, gradients straight through.

    Master weights stay what they are; a format of None leaves its operand in high precision. The formats are
    ``"int4"``, ``"int4_asym"``, ``"fp4_e1m2"``, ``"fp4_e1m2_official"``, ``"fp4_e2m1"``, ``"mxfp4"`` and ``"nvfp4"``,
    and for weights ``"int4_signed"``.

    The defaults can be exported and load plainly. Of the formats that do, none trained measurably better: final loss
    3.954 ± 0.016 with the defaults, 3.947 ± 0.038 with ``nvfp4`` (six seeds each), 3.941 ± 0.027 with ``int4_asym``,
    3.944 ± 0.018 with ``nvfp4`` and `four_over_six`, 3.956 ± 0.017 without outliers, 3.966 ± 0.040 with ``mxfp4``
    (three seeds; ``benchmarks/quality.py --studies formats``), and the block formats' layers cost more
    (``benchmarks/four_bit_linear.py``).

    Args:
        weight: format of the weight.
        activation: format of the layer's input.
        gradient: format of the gradient of the layer's output, so that the two GEMMs of the backward pass see
            4-bit operands too; None as in the paper.
        group_size: numbers along the input dimension that share a scale, at least 1. The paper uses 256; 128 is
            the largest size that packed checkpoints and their kernels know. ``"auto"``: the largest of 128, 64 and 32
            that divides the rows of all layers that are converted. ``mxfp4`` (32) and ``nvfp4`` (16) have their own.
        activation_outliers: largest magnitudes of each group of the input that stay in high precision, 0 to 8;
            default 2 (the paper's), and 0 for ``mxfp4`` and ``nvfp4``.
        weight_outliers: the same for the weight; only to reproduce the paper's FP4: such weights cannot be packed.
        gradient_rounding: ``"stochastic"`` (unbiased) or ``"nearest"``.
        hadamard: random Hadamard transform of both operands, along the dimension that a GEMM sums over, before
            they are quantized: None, ``"weight_grad"`` (only in the GEMM of the weight's gradient, after
            arXiv 2509.25149) or ``"all"``. The first needs a `gradient` format.
        hadamard_size: numbers transformed together, a power of two from 16 to 128.
        hadamard_seed: seed of the transform's random signs.
        weight_block: ``"1d"``: groups within a row; ``"2d"``: square blocks, so that the backward pass may
            transpose the 4-bit weight.
        four_over_six: ``nvfp4``: map each block's maximum to 4 or 6, whichever errs less (arXiv 2512.02010).
        mx_scale_rule: ``mxfp4``: ``"even"`` (least error here), ``"floor"`` (the OCP text) or ``"rceil"``.
        scale_dtype: type that the scales of weights are rounded to, in training already, because a checkpoint
            stores them so: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
        modules_to_not_convert: names of layers to leave alone, or of what holds them (``"model.layers.1"``,
            ``"self_attn"``): a name, the end of a dotted name, or a regular expression for all of a layer's.
        target_modules: convert only layers whose own names these are; None: every `nn.Linear` but
            output heads, poolers, what is tied to an embedding, what is not called because the model reads its weight
            itself, and routers. One of those is converted if it is named here (a regular expression names nothing) and
            not in `modules_to_not_convert`.
        keep_last_blocks: this many of the model's last blocks (of an `nn.ModuleList`) stay in high precision.
        adapters: what PEFT's LoRA on a 4-bit layer is added to: ``"separate"``, the usual formula ``Q(W)·x + s·B·A·x``,
            whose merged weight is off the grid; or ``"merged"``, ``Q(W + s·B·A)·x``, so that merging and any export
            give exactly the weights that were trained. LoRA, rank-stabilised LoRA and DoRA, without dropout.
        cache_weights: keep the 4-bit weight of a forward pass until its backward pass instead of making it again
            there; costs one more tensor of the weight's size for each layer in between. From one forward pass to the
            next it is never kept, because the weight may have been changed in between, except in a `fixed_weights`
            block.
        fused: quantize by one Triton kernel on a GPU. Experimental: tested in Triton's interpreter and compiled for
            a GPU, but not yet run on one. No effect on a CPU.

    Raises:
        ValueError: an option out of its range, or two that exclude each other.

    Example:
        >>> FourBitConfig(weight="int4", activation=None).group_size
        128
        >>> FourBitConfig.nvfp4().activation_outliers
        0
    """

    # By this name transformers finds what converts a model (trainer/registration/quantization_config.py).
    quant_method: ClassVar[str] = "hf_stablespam"

    weight: str | None = "int4"
    activation: str | None = "int4"
    gradient: str | None = None
    group_size: int | str = 128
    activation_outliers: int | None = None
    weight_outliers: int = 0
    gradient_rounding: str = "stochastic"
    hadamard: str | None = None
    hadamard_size: int = 16
    hadamard_seed: int = 0
    weight_block: str = "1d"
    four_over_six: bool = False
    mx_scale_rule: str = "even"
    scale_dtype: str = "bfloat16"
    modules_to_not_convert: tuple[str, ...] = ("lm_head",)
    target_modules: tuple[str, ...] | None = None
    keep_last_blocks: int = 0
    adapters: str = "separate"
    cache_weights: bool = True
    fused: bool = False

    def __post_init__(self) -> None:
        check_formats(self)
        if self.activation_outliers is None:
            free = self.activation is not None and get_format(self.activation).block is None
            object.__setattr__(self, "activation_outliers", 2 if free else 0)
        check_numbers(self)
        check_choices(self)
        check_together(self)
        for field in ("modules_to_not_convert", "target_modules"):
            object.__setattr__(self, field, as_patterns(getattr(self, field), field))

    @classmethod
    def paper(cls, name: str = "int4") -> FourBitConfig:
        """The settings of the paper's official code: groups of 256 along each row, unrounded scales.

        Args:
            name: ``"int4"``: weights with a zero point, symmetric inputs with two outliers kept; ``"fp4"``: the
                official 9-level grid, with two outliers kept of weights and inputs. Weights with kept outliers
                cannot be exported.

        Raises:
            ValueError: another name.

        Example:
            >>> FourBitConfig.paper("int4").weight
            'int4_asym'
        """
        if name == "int4":
            return cls(weight="int4_asym", activation="int4", group_size=256, scale_dtype="float32")
        if name == "fp4":
            grid = "fp4_e1m2_official"
            return cls(weight=grid, activation=grid, group_size=256, weight_outliers=2, scale_dtype="float32")
        raise ValueError(f"paper's name must be 'int4' or 'fp4', got {name!r}; for NVFP4 use FourBitConfig.nvfp4()")

    @classmethod
    def nvfp4(cls, gradient: bool = False) -> FourBitConfig:
        """NVFP4 weights and activations; with `gradient` the recipe of arXiv 2509.25149.

        Args:
            gradient: quantize the output gradient as well, rounded stochastically, with a Hadamard transform of 16
                in the GEMM of the weight's gradient, and square weight blocks.

        Example:
            >>> FourBitConfig.nvfp4(gradient=True).weight_block
            '2d'
        """
        if not gradient:
            return cls(weight="nvfp4", activation="nvfp4")
        return cls(weight="nvfp4", activation="nvfp4", gradient="nvfp4", hadamard="weight_grad", weight_block="2d")

    @classmethod
    def gguf(cls) -> FourBitConfig:
        """The best 4-bit weights that llama.cpp multiplies by: ``int4_signed`` in groups of 32, inputs left alone.

        That is the grid of ggml's Q4_0, so `export_gguf` writes it bit for bit, and even ``llama-quantize`` keeps it.
        llama.cpp rounds inputs to 8 bits; to do the same in torch brought the two no closer on one text, and a little
        on another (``benchmarks/gguf_export.py --kl``).

        Example:
            >>> FourBitConfig.gguf().weight
            'int4_signed'
        """
        return cls(weight="int4_signed", activation=None, group_size=32)

    def quantizer(self, operand: str) -> Quantizer | None:
        """The `Quantizer` of ``"weight"``, ``"activation"`` or ``"gradient"``; None in high precision."""
        return _quantizer(self, operand)

    def group_of(self, operand: str) -> int:
        """Numbers that share a scale in ``"weight"``, ``"activation"`` or ``"gradient"``.

        Raises:
            ValueError: `group_size` is ``"auto"``, and no model has been converted that says which number that is.
        """
        block = get_format(getattr(self, operand), operand).block
        if block is None and self.group_size == "auto":
            raise ValueError(
                "group_size='auto' becomes a number when a model is converted; give a number, or use convert_to_4bit"
            )
        return block or int(self.group_size)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold; `from_dict` takes it back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> FourBitConfig:
        """The configuration that `to_dict` wrote.

        Raises:
            ValueError: an unknown option; the message names the nearest known one.
        """
        known = [field.name for field in fields(cls)]
        for key in options:
            if key not in known:
                raise ValueError(
                    f"unknown option {key!r} of FourBitConfig{nearest(key, known)}; known options: {', '.join(known)}"
                )
        return cls(**options)


@lru_cache(maxsize=256)
def _quantizer(config: FourBitConfig, operand: str) -> Quantizer | None:
    name = getattr(config, operand)
    if name is None:
        return None
    format: Format = get_format(name, operand)
    outliers = {"weight": config.weight_outliers, "activation": config.activation_outliers or 0, "gradient": 0}
    stored = operand == "weight" and format.scale is ScaleKind.REAL
    return Quantizer(
        format,
        group_size=config.group_of(operand),
        outliers=outliers[operand],
        stochastic=operand == "gradient" and config.gradient_rounding == "stochastic",
        scale_dtype=getattr(torch, config.scale_dtype) if stored else None,
        square=operand == "weight" and config.weight_block == "2d",
        scale_rule=config.mx_scale_rule,
        four_over_six=config.four_over_six and format.scale is ScaleKind.E4M3,
        fused=config.fused,
    )
