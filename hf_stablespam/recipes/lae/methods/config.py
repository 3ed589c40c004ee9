"""What the two PEFT methods of this recipe can be told."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig, PeftType

from hf_stablespam.trainer.registration.optimizer_names import add_member

Names = list[str] | set[str] | str | None
_ADAPTER = "parallel_adapter"
_PREFIX = "calibrated_prefix"


@dataclass
class _TargetedConfig(PeftConfig):
    """Which modules get the method, as PEFT's own configurations say it."""

    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names, or a regular expression."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "What of these is left out."}
    )
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of the blocks."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "The name of the list of blocks."})
    scale: float | None = field(default=None, metadata={"help": "None: a learnable scalar per place, 1 at the start."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))


@dataclass
class ParallelAdapterConfig(_TargetedConfig):
    r"""A bottleneck beside an attention: $\mathrm{attn}(x) + s\,(W_2\,\mathrm{GELU}(W_1 x + b_1) + b_2)$.

    $x$ is the input of the module that is named in `target_modules`, so of the attention after its norm. $W_1$ starts
    Kaiming-uniform ($a = \sqrt 5$), everything else at 0: the adapted model starts equal to the backbone.

    Args:
        target_modules: names of attention modules, or a regular expression for their whole names; default: those of
            ViT, DINOv2, Llama, Mistral and Qwen models. Other modules that map a width to itself (an MLP, an
            `nn.Linear`, a convolutional block with the channels first) work as well.
        exclude_modules: names that are left out.
        layers_to_transform: indices of the blocks, default all; the paper adapts the first five of twelve.
        layers_pattern: the name of the list of blocks, where PEFT does not find it.
        down_sample: the width of the bottleneck, default 5; a float is a share of the module's width.
        scale: the factor $s$; `None` makes it learnable, one scalar for each module, 1 at the start.

    Raises:
        ValueError: a `down_sample` that gives no bottleneck.

    Example:
        >>> config = ParallelAdapterConfig(target_modules=["attention"], layers_to_transform=[0, 1, 2, 3, 4])
        >>> config.down_sample, str(config.peft_type.value)
        (5, 'PARALLEL_ADAPTER')
    """

    down_sample: int | float = field(default=5, metadata={"help": "Width of the bottleneck; a float is a share."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type(_ADAPTER)
        share = isinstance(self.down_sample, float)
        if not (0 < self.down_sample <= 1 if share else self.down_sample >= 1):
            raise ValueError(
                f"down_sample must be an int from 1 on, or a float in (0, 1] as a share of the width, "
                f"got {self.down_sample!r}; the default is 5"
            )

    def bottleneck(self, width: int) -> int:
        """The bottleneck's width for a module of `width` features, at least 1."""
        return max(1, int(width * self.down_sample)) if isinstance(self.down_sample, float) else self.down_sample


@dataclass
class CalibratedPrefixConfig(_TargetedConfig):
    r"""Learnable tokens among the keys and values of an attention, whose share of it is compensated.

    The tokens $P_k, P_v$ are raw keys and values (no projection), times a scalar each, put after the first token. With
    attention weights $a$ over other and prefix columns,

    $$\mathrm{out} = \sum_{j \notin P} a_j v_j + \sum_{p \in P} \frac{a_p}{\lambda} v_p, \qquad
    \lambda = \sum_{p \in P} a_p$$

    for each query and head. $a_p / \lambda$ is the softmax over the prefix's columns alone; so the sum is computed with
    two calls of the model's own attention function ("sdpa" or "eager"), without ever forming $a$.

    Args:
        target_modules: names of the modules that call transformers' attention interface and own the key projection;
            default: those of ViT, DINOv2, BERT, Llama, Mistral and Qwen models.
        exclude_modules: names that are left out.
        layers_to_transform: indices of the blocks, default all.
        layers_pattern: the name of the list of blocks, where PEFT does not find it.
        num_virtual_tokens: the number of tokens, default 10; they start uniform in [0, 0.01].
        compensate: divide by $\lambda$; False leaves the softmax over all columns as it is.
        scale: the factors of keys and values; `None` makes them learnable, 1 at the start.

    Raises:
        ValueError: fewer than one token.

    Example:
        >>> CalibratedPrefixConfig(target_modules=["attention"]).num_virtual_tokens
        10
    """

    num_virtual_tokens: int = field(default=10, metadata={"help": "Tokens for each of keys and values."})
    compensate: bool = field(default=True, metadata={"help": "Divide the prefix's weights by their sum."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type(_PREFIX)
        if self.num_virtual_tokens < 1:
            raise ValueError(f"num_virtual_tokens must be at least 1, got {self.num_virtual_tokens}")


def peft_type(name: str) -> PeftType:
    """PEFT's enum member for `name`; added where PEFT does not have it yet."""
    value = name.upper()
    if value not in PeftType.__members__:
        add_member(PeftType, value)
    return PeftType[value]
