"""Tensor → the same tensor on a 4-bit grid, for every format, group layout and rounding.

Groups run along the last dimension; the last group of a row may be smaller. A group's numbers share a scale
(and a zero point, if the format has one); the largest few may be kept as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_stablespam.quant.formats.number_formats import Format, ScaleKind
from hf_stablespam.quant.formats.rounding import round_to_codes
from hf_stablespam.quant.formats.scales import e4m3_scale, poison, power_of_two_scale, round_scale, tensor_scale


@dataclass(frozen=True)
class Quantizer:
    """How to put a tensor on a 4-bit grid; call it to do so.

    Args:
        format: the number format.
        group_size: numbers that share a scale, along the last dimension.
        outliers: the largest magnitudes of each group that stay as they are; the scale is taken without them.
        stochastic: stochastic instead of nearest rounding.
        scale_dtype: type that the scales of `ScaleKind.REAL` are rounded to; None leaves them unrounded.
        square: groups span `group_size` rows as well (2-D blocks).
        scale_rule: ``"floor"``, ``"even"`` or ``"rceil"``, for `ScaleKind.E8M0`.
        four_over_six: map a block's maximum to 4 or to 6, whichever errs less, for `ScaleKind.E4M3`.
        fused: use the Triton kernel of `fused.py` on a GPU, where it covers the case.

    Example:
        >>> from hf_stablespam.quant.formats.number_formats import FORMATS
        >>> Quantizer(FORMATS["int4"], group_size=4)(torch.tensor([0.1, -0.26, 0.5, 0.7]))
        tensor([ 0.1000, -0.3000,  0.5000,  0.7000])
    """

    format: Format
    group_size: int = 128
    outliers: int = 0
    stochastic: bool = False
    scale_dtype: torch.dtype | None = None
    square: bool = False
    scale_rule: str = "even"
    four_over_six: bool = False
    fused: bool = False

    def __call__(self, x: Tensor, amax: Tensor | None = None) -> Tensor:
        """`x` on the grid, in its own dtype. For `amax` see `quantize`."""
        if x.numel() == 0:
            return x
        if self.fused and x.is_cuda and not torch.compiler.is_compiling():
            from hf_stablespam.quant.formats import fused  # needs Triton

            if fused.covers(x, self, amax):
                return fused.fake_quantize(x, self, amax)
        return quantize(x, self, amax).consume().to(x.dtype)


class Quantized(NamedTuple):
    """A tensor on a 4-bit grid, taken apart: ``value = (codes - zero) * scale / divisor``.

    Attributes:
        codes: (..., groups, group) codes as floating-point numbers; the last group of a row is padded with zeros.
        scale: (..., groups, 1), or with 2-D blocks repeated for every row of a block.
        divisor: 1, or the anchor when `scale` is the group's unrounded maximum.
        zero: (..., groups, 1) code of zero, or None.
        block_scale, tensor_scale: the two factors of `scale` for NVFP4, else None.
        kept: (index in the group, value) of the outliers, each (..., groups, outliers), or None.
        width: length of a row, without padding.
    """

    codes: Tensor
    scale: Tensor
    divisor: float
    zero: Tensor | None
    block_scale: Tensor | None
    tensor_scale: Tensor | None
    kept: tuple[Tensor, Tensor] | None
    width: int

    def dequantize(self) -> Tensor:
        """The numbers that the codes stand for, (..., width), in the dtype of the arithmetic."""
        return self._replace(codes=self.codes.clone()).consume()

    def consume(self) -> Tensor:
        """The same without a copy: the numbers take the place of `codes`, which nobody must read afterwards."""
        values = self.codes
        if self.zero is not None:
            values = values.sub_(self.zero)
        values = values.mul_(self.scale)
        if self.divisor != 1:
            values = values.div_(self.divisor)
        if self.kept is not None:
            values = values.scatter_(-1, *self.kept)
        return values.flatten(-2)[..., : self.width]


def split_into_groups(x: Tensor, size: int) -> Tensor:
    """(..., width) → (..., groups, size), the last group padded with zeros, which change no group's scale."""
    missing = -x.shape[-1] % size
    if missing:
        x = torch.nn.functional.pad(x, (0, missing))
    return x.unflatten(-1, (-1, size))


def share_between_rows(statistic: Tensor, rows: int, largest: bool = True) -> Tensor:
    """Give every block of `rows` rows of `statistic` (rows, groups, 1) the block's maximum, or minimum."""
    total = statistic.shape[0]
    fill = -math.inf if largest else math.inf
    blocks = torch.nn.functional.pad(statistic, (0, 0, 0, 0, 0, -total % rows), value=fill).unflatten(0, (-1, rows))
    shared = blocks.amax(1) if largest else blocks.amin(1)
    return shared.repeat_interleave(rows, 0)[:total]


def largest_magnitudes(groups: Tensor, quantizer: Quantizer) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The largest magnitude of each group without its outliers, and the outliers (their places and values)."""
    magnitudes = groups.abs()
    count = min(quantizer.outliers, groups.shape[-1] - 1)
    if count == 0:
        return magnitudes.amax(-1, keepdim=True), None
    found = []
    for _ in range(count):  # a few passes of argmax cost less than half of topk on a CPU
        found.append(magnitudes.argmax(-1, keepdim=True))
        magnitudes = magnitudes.scatter_(-1, found[-1], -1.0)
    places = torch.cat(found, dim=-1)
    return magnitudes.amax(-1, keepdim=True), (places, groups.gather(-1, places))


def amax_of_each(matrices: Tensor, quantizer: Quantizer) -> Tensor:
    """The largest magnitude that NVFP4's scale of each matrix is made for, as `quantize` takes it for all of them.

    Args:
        matrices: (count, rows, width) numbers.
        quantizer: what rounds them; its outliers do not count.
    """
    groups = split_into_groups(matrices.detach(), min(quantizer.group_size, matrices.shape[-1]))
    return poison(largest_magnitudes(groups, quantizer)[0]).amax((1, 2, 3), keepdim=True)


def quantize(x: Tensor, quantizer: Quantizer, amax: Tensor | None = None) -> Quantized:
    """Put `x` on a 4-bit grid and return codes and scales.

    The arithmetic is float32, or float64 for float64 input.

    Args:
        x: (..., width) numbers; with 2-D blocks a matrix.
        quantizer: what to do.
        amax: for NVFP4: the largest magnitude that the tensor's scale is made for, when several tensors share
            one; default: that of `x`. Or of each matrix of `x`, see `amax_of_each`.
    """
    work = x.detach()
    if work.dtype not in (torch.float32, torch.float64):
        work = work.float()
    size = min(quantizer.group_size, max(x.shape[-1], 1))
    groups = split_into_groups(work, size)
    if quantizer.format.zero_point:
        return _quantize_range(groups, quantizer, x.shape[-1])
    if quantizer.format.signed:
        return _quantize_signed(groups, quantizer, x.shape[-1])
    peak, kept = largest_magnitudes(groups, quantizer)
    if quantizer.square:
        peak = share_between_rows(peak, quantizer.group_size)
    peak = poison(peak)
    if quantizer.format.scale is ScaleKind.E4M3:
        return _quantize_two_level(groups, quantizer, peak, kept, x.shape[-1], amax)
    return _quantize_symmetric(groups, quantizer, peak, kept, x.shape[-1])


def _quantize_symmetric(groups: Tensor, quantizer: Quantizer, peak: Tensor, kept, width: int) -> Quantized:
    """One floating-point or power-of-two scale per group, zero is code zero."""
    format, divisor = quantizer.format, 1.0
    if format.scale is ScaleKind.E8M0:
        scale = power_of_two_scale(peak, quantizer.scale_rule)
        codes = groups / scale
    elif quantizer.scale_dtype is None:
        # x·7/max rather than x/(max/7): the paper's code rounds in this order.
        scale, divisor = round_scale(peak, None), format.anchor
        codes = (groups * divisor).div_(scale)
    else:
        scale = round_scale(peak / format.anchor, quantizer.scale_dtype)
        codes = groups / scale
    codes = round_to_codes(codes, format, quantizer.stochastic)
    return Quantized(codes, scale, divisor, None, None, None, kept, width)


def _quantize_signed(groups: Tensor, quantizer: Quantizer, width: int) -> Quantized:
    """A scale with the sign that maps the number of largest magnitude to the lowest code."""
    format = quantizer.format
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    if quantizer.square:
        low = share_between_rows(low, quantizer.group_size, largest=False)
        high = share_between_rows(high, quantizer.group_size)
    size = round_scale(poison(torch.maximum(high, -low)) / -format.anchor, quantizer.scale_dtype)
    scale = torch.where(high > -low, -size, size)
    codes = round_to_codes(groups / scale, format, quantizer.stochastic)
    return Quantized(codes, scale, 1.0, None, None, None, None, width)


def _quantize_range(groups: Tensor, quantizer: Quantizer, width: int) -> Quantized:
    """A scale and a zero point per group, for the range that its numbers span."""
    format = quantizer.format
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)  # aminmax is far slower on a CPU
    if quantizer.square:
        low = share_between_rows(low, quantizer.group_size, largest=False)
        high = share_between_rows(high, quantizer.group_size)
    # The range must hold zero: the zero point cannot leave the grid, and a group in [5, 6] would come out near 1.
    low, high = poison(low.clamp_max(0.0)), poison(high.clamp_min(0.0))
    scale = round_scale((high - low) / format.anchor, quantizer.scale_dtype, format.min_scale)
    zero = (low / scale).round_().neg_().clamp_(format.lowest, format.highest)
    codes = round_to_codes(groups / scale, format, quantizer.stochastic)
    codes = codes.add_(zero).clamp_(format.lowest, format.highest)
    return Quantized(codes, scale, 1.0, zero, None, None, None, width)


def _quantize_two_level(
    groups: Tensor, quantizer: Quantizer, peak: Tensor, kept, width: int, amax: Tensor | None
) -> Quantized:
    """An FP8 scale per block and one float32 scale per tensor."""
    whole = tensor_scale(peak.amax() if amax is None else amax, quantizer.four_over_six)

    def with_scale(stored: Tensor) -> Quantized:
        codes = groups * ((1.0 / whole) / stored)
        codes = round_to_codes(codes, quantizer.format, quantizer.stochastic)
        return Quantized(codes, whole * stored, 1.0, None, stored, whole, kept, width)

    stored_six = e4m3_scale(peak, whole, 6.0)
    six = with_scale(stored_six)
    if not quantizer.four_over_six:
        return six
    stored_four = e4m3_scale(peak, whole, 4.0)
    four = with_scale(stored_four)
    better = _block_error(groups, four, quantizer) < _block_error(groups, six, quantizer)
    return six._replace(
        codes=torch.where(better, four.codes, six.codes),
        scale=torch.where(better, four.scale, six.scale),
        block_scale=torch.where(better, stored_four, stored_six),
    )


def _block_error(groups: Tensor, quantized: Quantized, quantizer: Quantizer) -> Tensor:
    """Sum of squared errors of each block, (..., groups, 1); kept outliers count as if they were quantized."""
    error = (quantized.codes * quantized.scale).sub_(groups).square_().sum(-1, keepdim=True)
    if not quantizer.square:
        return error
    rows = quantizer.group_size
    total = error.shape[0]
    blocks = torch.nn.functional.pad(error, (0, 0, 0, 0, 0, -total % rows)).unflatten(0, (-1, rows))
    return blocks.sum(1).repeat_interleave(rows, 0)[:total]
