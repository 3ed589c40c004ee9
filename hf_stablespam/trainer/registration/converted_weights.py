"""Weights that transformers saves under other names and shapes than the model has, such as mixtures' experts.

From version 5 on a mixture's experts are one tensor in memory and many in a checkpoint. `from_pretrained` puts them
together; the Trainer's own resume, and its `load_best_model_at_end`, load what has a name in the model and go on with
whatever the rest happens to be: a resumed run has freshly initialised experts. (transformers #48805, in 5.23.)
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)


def load_the_rest(trainer: "Trainer", checkpoint: str | None) -> None:
    """Load weights that the Trainer has passed over, for runs with one of our optimizers or callbacks.

    Args:
        trainer: its model has just been loaded from the checkpoint.
        checkpoint: a folder.

    Raises:
        ValueError: `from_pretrained` does not find them either.
    """
    from transformers import PreTrainedModel

    model: Any = trainer.model
    whole = isinstance(model, PreTrainedModel) and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
    if not whole or checkpoint is None or not _is_ours(trainer):
        return
    saved, wanted = _names(Path(checkpoint)), set(model.state_dict())
    if not saved - wanted or not wanted - saved:
        return  # names that only one side has are tied weights, or extra ones
    loaded, info = type(model).from_pretrained(checkpoint, dtype=model.dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(
            f"the checkpoint {checkpoint} must hold all weights of the model, and lacks "
            f"{', '.join(sorted(info['missing_keys'])[:6])}; resume from another one"
        )
    model.load_state_dict(loaded.state_dict())
    logger.warning(
        "the Trainer had passed over %d weights of %s that transformers saves in another form; they are loaded now",
        len(wanted - saved),
        checkpoint,
    )


def _is_ours(trainer: "Trainer") -> bool:
    from hf_stablespam.trainer.registration.factory import BUILDERS

    of_ours = (
        type(callback).__module__.startswith("hf_stablespam.") for callback in trainer.callback_handler.callbacks
    )
    return getattr(trainer.args.optim, "value", trainer.args.optim) in BUILDERS or any(of_ours)


def _names(checkpoint: Path) -> set[str]:
    """Names of the tensors in the model's safetensors files; none where it has other files."""
    from safetensors import safe_open

    names: set[str] = set()
    for file in checkpoint.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            names |= set(opened.keys())
    return names
