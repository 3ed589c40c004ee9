"""What an `LAEModel` keeps: in the Trainer's checkpoints, and in a folder of its own."""

from __future__ import annotations

import json
import os
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict
from torch import nn

from hf_stablespam.recipes.lae.adapters import (
    ONLINE,
    adapter_parameters,
    adapter_places,
    add_expert,
    add_lae_adapters,
    is_calibrated,
)
from hf_stablespam.recipes.lae.classifier import IncrementalClassifier

if TYPE_CHECKING:
    from hf_stablespam.recipes.lae.model import LAEModel

HEADS, DESCRIPTION = "lae_heads.safetensors", "lae.json"


def register_hooks(model: LAEModel) -> None:
    """Leave the frozen backbone out of `state_dict`, and let `load_state_dict` accept that and nothing else."""
    model.register_state_dict_post_hook(_leave_out_backbone)
    model.register_load_state_dict_pre_hook(_check_fits)
    model.register_load_state_dict_post_hook(_accept_without_backbone)


def _backbone_keys(model: LAEModel) -> set[str]:
    """Names in the state dict of what is frozen and no adapter's."""
    adapters = _adapters(model)
    named = model.peft_model.named_parameters(remove_duplicate=False)
    return {f"peft_model.{name}" for name, p in named if id(p) not in adapters and not p.requires_grad}


def _leave_out_backbone(model: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for key in _backbone_keys(model):
        state_dict.pop(prefix + key, None)


def _accept_without_backbone(model: Any, incompatible_keys: Any) -> None:
    backbone = _backbone_keys(model)
    missing = incompatible_keys.missing_keys
    missing[:] = [key for key in missing if key not in backbone]


def _check_fits(model: Any, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    """The Trainer loads with strict=False: an expert or a head that is missing on either side would go unnoticed."""
    adapters = _adapters(model)
    own = {f"peft_model.{name}" for name, p in model.peft_model.named_parameters() if id(p) in adapters}
    own |= {f"classifier.{name}" for name in model.classifier.state_dict()}
    saved = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
    missing = sorted(own - saved)
    places = ("classifier.", *(f"peft_model.{place}." for place in adapter_places(model.peft_model)))
    held = (model.peft_model.named_parameters(remove_duplicate=False), model.peft_model.named_buffers())
    known = own | {f"peft_model.{name}" for name, _ in chain(*held)}  # shared under all their names, and buffers
    extra = sorted(key for key in saved - known if key.startswith(places))
    if missing or extra:
        raise ValueError(
            "the checkpoint is of another task or other adapters: "
            + "; ".join(
                f"{len(keys)} {what}, first {keys[0]}"
                for keys, what in ((missing, "tensors of the model are not in it"), (extra, "of it not in the model"))
                if keys
            )
            + "; build the model with the same adapters, add_task for every task up to the checkpoint's, and "
            "LAECallback(task=...) of that task"
        )
    for name, labels in ((k, v) for k, v in model.classifier.state_dict().items() if k.endswith(".labels")):
        stored = state_dict[f"{prefix}classifier.{name}"]
        if stored.tolist() != labels.tolist():
            raise ValueError(
                f"the checkpoint's classes of {name.removesuffix('.labels')} are {stored.tolist()}, the model's "
                f"{labels.tolist()}; call add_task with the same labels in the same order"
            )


def _adapters(model: Any) -> set[int]:
    """The ids of all adapters' parameters."""
    peft_model = model.peft_model
    return {id(p) for name in peft_model.peft_config for p in adapter_parameters(peft_model, name).values()}


def save(model: LAEModel, directory: str | os.PathLike[str]) -> None:
    """Adapters in PEFT's layout (one called "default" in the folder itself), heads, and a description."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    model.peft_model.save_pretrained(str(folder))
    model.classifier.save(folder / HEADS)
    described = {
        "task": model.current_task,
        "tasks_trained": int(model.tasks_trained),
        "classes_per_task": model.classifier.classes_per_task,
        "labels": model.classifier.labels,
        "experts": list(model.peft_model.peft_config),
        "calibrate": is_calibrated(model.peft_model),
        "local_loss": model.local_loss,
        "pool": None if callable(model.pool) else model.pool,
    }
    (folder / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n")


def load(cls: type[LAEModel], model: nn.Module, directory: str | os.PathLike[str], pool: Any) -> LAEModel:
    """The `LAEModel` that `save` wrote, on the backbone `model`."""
    folder = Path(directory)
    if not (folder / DESCRIPTION).is_file():
        raise ValueError(f"{folder} has no {DESCRIPTION}; name a folder that LAEModel.save_pretrained wrote")
    described = json.loads((folder / DESCRIPTION).read_text())
    pool = described["pool"] if pool is None else pool
    if pool is None:
        raise ValueError("pool was a function when the model was saved; pass it again: from_pretrained(..., pool=...)")
    folders = {name: folder if name == ONLINE else folder / name for name in described["experts"]}  # as PEFT saves
    first = ONLINE if ONLINE in folders else described["experts"][0]
    config = PeftConfig.from_pretrained(str(folders[first]))
    config.inference_mode = False
    peft_model = add_lae_adapters(model, config, calibrate=described["calibrate"], name=first)
    for name in folders:
        if name != first:
            add_expert(peft_model, name, like=first)
        _load_adapter(peft_model, name, folders[name])
    local_loss = described.get("local_loss", True)  # the first folders did not say
    loaded = cls(peft_model, IncrementalClassifier.load(folder / HEADS), pool, local_loss=local_loss)
    loaded.task = described["task"]
    loaded.tasks_trained.fill_(described["tasks_trained"])
    return loaded


def _load_adapter(peft_model: Any, name: str, folder: Path) -> None:
    weights = load_peft_weights(str(folder), device="cpu")
    result: Any = set_peft_model_state_dict(peft_model, weights, adapter_name=name)
    own = {id(parameter) for parameter in adapter_parameters(peft_model, name).values()}
    names = {key for key, parameter in peft_model.named_parameters() if id(parameter) in own}
    missing = sorted(names & set(result.missing_keys))
    if missing or result.unexpected_keys:
        raise ValueError(f"{folder} does not fit the adapter: {[*missing, *result.unexpected_keys][:3]}")
