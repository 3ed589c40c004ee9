"""The optimizers and the precisions that the quality benchmark compares."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from stabilize_lion import Lion

from hf_stablespam import FourBitConfig
from tests.reference.official_stable_spam import OfficialStableSPAM

Own = Callable[[torch.nn.Module, float, int], torch.optim.Optimizer]  # from model, learning rate, steps


@dataclass(frozen=True)
class Method:
    """An optimizer as the Trainer's arguments ask for it, and the learning rates at which it is tried."""

    optim: str = "stable_spam"
    optim_args: str | None = None
    targets: str | None = None  # optim_target_modules, for GaLore
    clip: float = 0.0  # the Trainer's own max_grad_norm
    stabilized: bool = False
    own: Own | None = None  # built here: the Trainer has no name for it
    rates: tuple[float, ...] = (5e-4, 1e-3, 3e-3, 1e-2, 2e-2)
    arguments: dict[str, Any] = field(default_factory=dict)  # further TrainingArguments
    stable: bool = False  # the whole learning rate until the last fifth, instead of a cosine
    scales: dict[str, float] = field(default_factory=dict)  # factors on learning rates, of LearningRateScaleCallback

    def optimizer(self, model: torch.nn.Module, learning_rate: float, steps: int) -> torch.optim.Optimizer | None:
        """What is built here, if it is; learning rate and steps are the run's."""
        return None if self.own is None else self.own(model, learning_rate, steps)


def _of_parameters(optimizer: type[torch.optim.Optimizer]) -> Own:
    return lambda model, learning_rate, steps: optimizer(model.parameters(), lr=learning_rate)  # type: ignore[call-arg]


def _official(reset_interval: int) -> Own:
    """The official code's Stable-SPAM."""
    return lambda model, learning_rate, steps: OfficialStableSPAM(
        model.parameters(), lr=learning_rate, reset_interval=reset_interval, decay=steps
    )


class MuonBesideAdamW(torch.optim.Optimizer):
    """Muon for the matrices of the layers, AdamW for the rest, the embedding at ten times the learning rate.

    Muon's step is scaled to the size of AdamW's (Moonshot's rule), so that one learning rate serves both.
    """

    def __init__(self, model: torch.nn.Module, lr: float) -> None:
        kinds: dict[str, list[torch.nn.Parameter]] = {"matrix": [], "embedding": [], "rest": []}
        for name, param in model.named_parameters():
            inside = "layers" in name and param.dim() == 2
            kinds["matrix" if inside else "embedding" if "embed" in name else "rest"].append(param)
        self.parts = (
            torch.optim.Muon(kinds["matrix"], lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(
                [{"params": kinds["embedding"], "lr": 10 * lr}, {"params": kinds["rest"]}], lr=lr, weight_decay=0.0
            ),
        )
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: Any = None) -> Any:
        """Both, at the learning rates that a scheduler has put into the groups, which they share."""
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss


def _muon(model: torch.nn.Module, learning_rate: float, steps: int) -> torch.optim.Optimizer:
    return MuonBesideAdamW(model, learning_rate)


TARGETS = r".*\.(self_attn|mlp)\..*_proj"
GALORE = "rank=32,update_proj_gap=50,scale=0.25"
PLAIN = "clip_beta=none,norm_betas=none,reset_interval=none,decay_steps=none"
GALORE_RATES = (3e-3, 1e-2, 3e-2)
RESET = "reset_interval=200"  # in runs of 500 steps: the proportion of the paper's short runs
FASTER = {"adam_beta2": 0.95}  # the second moment's memory in most language models since GPT-3
SPAM_ARGUMENTS = "reset_interval=200,warmup_steps=60"


def _galore(options: str) -> Method:
    return Method(optim_args=f"{GALORE},{options}", targets=TARGETS, rates=GALORE_RATES)


METHODS = {
    "adamw": Method("adamw_torch"),
    "adamw_clipped": Method("adamw_torch", clip=1.0),
    "adamw_beta95": Method("adamw_torch", arguments=FASTER),
    "adamw_clipped_beta95": Method("adamw_torch", clip=1.0, arguments=FASTER),
    "adamw_stabilized": Method("adamw_torch", stabilized=True),
    "adafactor": Method("adafactor"),
    "spam": Method("spam", SPAM_ARGUMENTS, arguments={"adam_epsilon": 1e-6}),
    "lion": Method("sgd", own=_of_parameters(Lion)),
    "lion_stabilized": Method("sgd", own=_of_parameters(Lion), stabilized=True),
    "galore": _galore(PLAIN),
    "galore_stable_spam": _galore("reset_interval=none"),
    # Stable-SPAM as it comes: no reset falls into 500 steps, the decay runs over them
    "stable_spam": Method(),
    "stable_spam_8bit": Method(optim_args="state_bits=8"),
    "stable_spam_4bit": Method(optim_args="state_bits=4"),
    # its parts: each left out, each alone
    "stable_spam_reset": Method(optim_args=RESET),
    "without_clip": Method(optim_args=f"{RESET},clip_beta=none"),
    "without_norm": Method(optim_args=f"{RESET},norm_betas=none"),
    "without_decay": Method(optim_args=f"{RESET},decay_steps=none"),
    "only_clip": Method(optim_args="norm_betas=none,reset_interval=none,decay_steps=none"),
    "only_norm": Method(optim_args="clip_beta=none,reset_interval=none,decay_steps=none"),
    "only_reset": Method(optim_args=f"{RESET},clip_beta=none,norm_betas=none,decay_steps=none"),
    "only_decay": Method(optim_args="clip_beta=none,norm_betas=none,reset_interval=none"),
    # resets: how often, and as the official code does them
    "stable_spam_reset100": Method(optim_args="reset_interval=100"),
    "official_reset100": Method("sgd", own=_official(100)),
    "official_reset200": Method("sgd", own=_official(200)),
    # candidates for better defaults
    "stable_spam_beta95": Method(arguments=FASTER),
    "stable_spam_slow_norm": Method(optim_args="norm_betas=0.85:0.999"),
    "stable_spam_bfloat16_norm": Method(optim_args="norm_betas=0.85:0.99999"),  # the paper's pair for bfloat16
    "stable_spam_beta95_slow_norm": Method(optim_args="norm_betas=0.85:0.999", arguments=FASTER),
    "stable_spam_floor25": Method(optim_args="decay_floor=0.25"),
    "stable_spam_floor75": Method(optim_args="decay_floor=0.75"),
    "stable_spam_clip99": Method(optim_args="clip_beta=0.99"),
}

APART = ("stable_spam", "adamw_clipped", "adamw_clipped_beta95")  # what is tried with learning rates apart
KINDS, FACTORS = ("embedding", "head", "norm"), (3, 10, 30)


def apart(method: str, kind: str, factor: int) -> str:
    """The name of a method with so many times the learning rate for one kind of parameters."""
    return f"{method}_{kind}{factor}"


METHODS |= {
    apart(method, kind, factor): replace(METHODS[method], scales={kind: float(factor)})
    for method, kind, factor in itertools.product(APART, KINDS, FACTORS)
}
METHODS |= {
    f"{method}_decay": replace(METHODS[method], arguments={**METHODS[method].arguments, "weight_decay": 0.1})
    for method in [apart(method, "embedding", 10) for method in APART]
}

# resets left out where they fall into the run: 2,000 steps of the larger model
WITHOUT_RESETS = f"{apart('stable_spam', 'embedding', 10)}_no_reset"
METHODS[WITHOUT_RESETS] = replace(METHODS[apart("stable_spam", "embedding", 10)], optim_args="reset_interval=none")

# what the field has for fewer steps, beside Stable-SPAM with the embedding's rate apart
_BEST = METHODS[apart("stable_spam", "embedding", 10)]
METHODS |= {
    "shorter_wsd": replace(_BEST, stable=True),
    "shorter_beta95": replace(_BEST, arguments=FASTER),
    "shorter_muon": Method("sgd", own=_muon),
    "shorter_muon_stabilized": Method("sgd", own=_muon, stabilized=True),
}

PRECISIONS: dict[str, FourBitConfig | None] = {
    "full": None,
    "int4": FourBitConfig(weight="int4", activation="int4"),
    "int4_no_outliers": FourBitConfig(weight="int4", activation="int4", activation_outliers=0),
    "int4_asym": FourBitConfig(weight="int4_asym", activation="int4"),
    # without kept weights its 15 levels are those of int4, so this is the paper's FP4 as it was meant
    "fp4_e1m2": FourBitConfig(weight="fp4_e1m2", activation="fp4_e1m2", weight_outliers=2),
    "mxfp4": FourBitConfig(weight="mxfp4", activation="mxfp4"),
    "nvfp4": FourBitConfig.nvfp4(),
    "nvfp4_4or6": FourBitConfig(weight="nvfp4", activation="nvfp4", four_over_six=True),
    "nvfp4_gradient": FourBitConfig.nvfp4(gradient=True),
}
