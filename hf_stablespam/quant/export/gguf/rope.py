"""The rotary embedding: what a configuration says of it, and what llama.cpp must be told to compute the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_stablespam.quant.export.widths import head_width

KINDS = ("default", "linear", "llama3", "yarn")
_FAST, _SLOW = 32, 1  # YaRN's own turns, and llama.cpp's


class Yarn(NamedTuple):
    """What llama.cpp is told of YaRN.

    Attributes:
        factor: how much longer the context is made.
        trained: length of the context of the pretraining.
        attention: what the embedding is multiplied by, over the 0.1·ln(factor) + 1 that llama.cpp takes by itself.
    """

    factor: float
    trained: int
    attention: float


def rope_parameters(config: Any) -> dict[str, Any]:
    """Base, kind and scaling of the rotary embedding: transformers 5 has them in one field, 4 in two.

    ``local_theta`` and ``local_kind`` are those of the layers with a window, None where all layers have the same.
    """
    found = getattr(config, "rope_parameters", None)
    if not found:
        scaling = dict(getattr(config, "rope_scaling", None) or {})
        found = {"rope_theta": getattr(config, "rope_theta", 10000.0), **scaling}
        found["rope_type"] = scaling.get("rope_type", scaling.get("type", "default"))
        if getattr(config, "rope_local_base_freq", None):
            found = {"full_attention": found, "sliding_attention": {"rope_theta": config.rope_local_base_freq}}
    local = found.get("sliding_attention")
    return {
        **found.get("full_attention", found),
        "local_theta": local and local.get("rope_theta"),
        "local_kind": local and local.get("rope_type", "default"),
    }


def check_rope(config: Any, name: str, *, factors: bool, rounded_bounds: bool) -> None:
    """Raise unless llama.cpp computes the rotary embedding of `config`.

    Args:
        config: of the model.
        name: llama.cpp's name of the architecture.
        factors: it reads a factor for each frequency.
        rounded_bounds: it is known to round the bounds of YaRN's ramp where the model does not.

    Raises:
        ValueError: a kind of scaling, or an option of YaRN's, that it does not compute.
    """
    rope = rope_parameters(config)
    kind, local = rope.get("rope_type", "default"), rope["local_kind"]
    if kind not in KINDS:
        known = f"{', '.join(map(repr, KINDS[:-1]))} or {KINDS[-1]!r}"
        raise ValueError(
            f"rope_type must be {known} to be written as GGUF, got {kind!r}; convert with llama.cpp's"
            " convert_hf_to_gguf.py and pack its F16 file: hf-stablespam repack"
        )
    if kind == "llama3" and not factors:
        raise ValueError(
            f"rope_type must not be 'llama3' for llama.cpp's {name!r}, which reads no factors of the frequencies, got"
            f" {kind!r}; {NO_REMEDY}"
        )
    if local not in (None, "default"):
        raise ValueError(
            f"rope_type of 'sliding_attention' must be 'default' in llama.cpp's {name!r}, got {local!r}; {NO_REMEDY}"
        )
    if (yarn := yarn_of(config)) is None:
        return
    if local and not math.isclose(yarn.attention, 1.0, rel_tol=1e-6):
        raise ValueError(
            f"attention_factor, mscale and mscale_all_dim of YaRN must not be set for llama.cpp's {name!r}, which"
            f" multiplies layers with a window by it as well, got {yarn.attention:.6g} times the default; {NO_REMEDY}"
        )
    base, width, truncate = float(rope.get("rope_theta", 10000.0)), head_width(config), rope.get("truncate", True)
    turns = rope.get("beta_fast") or _FAST, rope.get("beta_slow") or _SLOW
    whole = truncate or rounded_bounds or local is not None
    if _ramp(turns, yarn.trained, base, width, whole) != _ramp((_FAST, _SLOW), yarn.trained, base, width, True):
        raise ValueError(
            f"beta_fast, beta_slow and truncate of YaRN must be {_FAST}, {_SLOW} and True in llama.cpp's {name!r},"
            f" which reads none of them, got {turns[0]}, {turns[1]} and {truncate}; {NO_REMEDY}"
        )


def yarn_of(config: Any) -> Yarn | None:
    """The options of YaRN; None for another kind of scaling."""
    rope = rope_parameters(config)
    if rope.get("rope_type", "default") != "yarn":
        return None
    trained = int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
    factor = float(rope.get("factor") or config.max_position_embeddings / trained)
    return Yarn(
        factor,
        trained,
        _attention(rope, factor) / _magnitude(factor),
    )


def rope_factors(config: Any) -> Tensor | None:
    """What Llama 3 divides each frequency of the rotary embedding by, (head / 2); None without that scaling."""
    rope = rope_parameters(config)
    if rope.get("rope_type", "default") != "llama3":
        return None
    width, trained = head_width(config), rope["original_max_position_embeddings"]
    frequency = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    turns = trained * frequency / (2 * torch.pi)  # of a dimension within the context of the pretraining
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0.0, 1.0)  # of the unscaled frequency
    return (1.0 / (share + (1.0 - share) / rope["factor"])).float()


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection (or numbers of its bias) in the order of the interleaved rotary embedding.

    Args:
        rows: (heads · width, …).
        heads: of this projection.

    Example:
        >>> interleave(torch.arange(8), heads=2).tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


NO_REMEDY = "export it for another engine: export_4bit"


def _magnitude(factor: float, scale: float = 1.0) -> float:
    """YaRN's own 0.1·scale·ln(factor) + 1."""
    return 1.0 if factor <= 1.0 else 0.1 * scale * math.log(factor) + 1.0


def _attention(rope: Mapping[str, Any], factor: float) -> float:
    """What transformers multiplies the rotary embedding by."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    scale, of_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if scale and of_all:
        return _magnitude(factor, scale) / _magnitude(factor, of_all)
    return _magnitude(factor)


def _ramp(turns: tuple[float, float], trained: int, base: float, width: int, whole: bool) -> tuple[float, float]:
    """Between which dimensions YaRN goes over from the unscaled frequencies to the scaled ones.

    Args:
        turns: within the trained context, at either bound.
        trained: length of the context of the pretraining.
        base: of the frequencies.
        width: of a head.
        whole: the bounds are rounded outwards.
    """
    low, high = (width * math.log(trained / (count * 2 * math.pi)) / (2 * math.log(base)) for count in turns)
    if whole:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0.0), min(high, width - 1.0)
