"""Both experts' answers, and the larger one for each class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from hf_stablespam._evaluating import evaluating
from hf_stablespam.recipes.lae.adapters import OFFLINE, ONLINE, active_expert
from hf_stablespam.recipes.lae.loss import columns_of
from hf_stablespam.recipes.lae.model import LAEModel


def ensemble_probabilities(*logits: torch.Tensor) -> torch.Tensor:
    r"""$\max_e \mathrm{softmax}(z_e)$, elementwise over the experts' logits $z_e$; rows need not sum to 1.

    Args:
        logits: (batch, classes) of each expert.

    Raises:
        ValueError: no logits.

    Example:
        >>> ensemble_probabilities(torch.tensor([[0.0, 0.0]]), torch.tensor([[9.0, 0.0]]))
        tensor([[0.9999, 0.5000]])
    """
    if not logits:
        raise ValueError("ensemble_probabilities needs the logits of at least one expert")
    result = _probabilities(logits[0])
    for other in logits[1:]:
        result = torch.maximum(result, _probabilities(other))
    return result


def lae_predict(
    model: LAEModel, inputs: Mapping[str, torch.Tensor], experts: Sequence[str] = (ONLINE, OFFLINE)
) -> torch.Tensor:
    """The larger of the experts' probabilities for each class seen so far.

    The model is put into evaluation mode meanwhile; afterwards its mode, its active expert and what is trainable are
    as before, also after an error.

    Args:
        model: an `LAEModel`.
        inputs: a batch for the backbone, on its device; `labels` are ignored.
        experts: names of adapters. Before the second task there is no offline expert: then online answers alone.

    Returns:
        (batch, seen), unnormalised: for one expert rows sum to 1, for several they are maxima. Column c stands for the
        label `model.classifier.labels[c]`.

    Raises:
        ValueError: no expert, or one that the model does not have.

    Example:
        >>> from peft import LoraConfig
        >>> from transformers import ViTConfig, ViTModel
        >>> from hf_stablespam.recipes.lae import IncrementalClassifier, add_lae_adapters
        >>> vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        ...                          image_size=8, patch_size=4))
        >>> lora = add_lae_adapters(vit, LoraConfig(r=2, lora_alpha=2, target_modules=["k_proj", "v_proj"]))
        >>> model = LAEModel(lora, IncrementalClassifier(8))
        >>> model.classifier.add_task(3)
        >>> lae_predict(model, {"pixel_values": torch.rand(2, 3, 8, 8)}).shape
        torch.Size([2, 3])
    """
    return ensemble_probabilities(*expert_logits(model, inputs, experts).values())


def expert_logits(
    model: LAEModel, inputs: Mapping[str, torch.Tensor], experts: Sequence[str] = (ONLINE, OFFLINE)
) -> dict[str, torch.Tensor]:
    """Each expert's logits of all classes seen so far; arguments and errors are those of `lae_predict`."""
    present = list(model.peft_model.peft_config)
    chosen = [name for name in experts if name in present]
    if not chosen or (len(chosen) < len(experts) and model.current_task > 0):
        raise ValueError(f"experts must be among the model's adapters {present}, got {tuple(experts)}")
    given = {name: value for name, value in inputs.items() if name != "labels"}
    logits = {}
    with evaluating(model), torch.no_grad():
        for name in chosen:
            with active_expert(model.peft_model, name):
                logits[name] = model(**given).logits
    return logits


def score_dataset(
    model: LAEModel, batches: Iterable[Mapping[str, torch.Tensor]], experts: Sequence[str] = (ONLINE, OFFLINE)
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Probabilities by each expert and by the ensemble for all batches, and the right columns.

    Args:
        model: an `LAEModel`.
        batches: for example a `DataLoader`, each with `labels`; they are moved to the model's device.
        experts: as in `lae_predict`.

    Returns:
        (samples, seen) under each expert's name and under "ensemble"; columns of the labels, (samples,). Both on the
        CPU, as `accuracy_per_task` takes them.
    """
    device = next(model.parameters()).device
    collected: dict[str, list[torch.Tensor]] = {}
    columns = []
    classes = model.classifier.class_labels(slice(0, model.current_task + 1)).cpu()
    for batch in batches:
        logits = expert_logits(model, {name: value.to(device) for name, value in batch.items()}, experts)
        for name, value in logits.items():
            collected.setdefault(name, []).append(_probabilities(value).cpu())
        collected.setdefault("ensemble", []).append(ensemble_probabilities(*logits.values()).cpu())
        columns.append(columns_of(batch["labels"].cpu(), classes))
    return {name: torch.cat(parts) for name, parts in collected.items()}, torch.cat(columns)


def _probabilities(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
