"""A frozen backbone with two experts and a growing classifier, as one model for the Trainer."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from transformers import PretrainedConfig
from transformers.utils import ModelOutput

from hf_stablespam.recipes.lae import checkpoint
from hf_stablespam.recipes.lae.classifier import IncrementalClassifier
from hf_stablespam.recipes.lae.loss import local_cross_entropy
from hf_stablespam.recipes.lae.methods.calibrated_prefix import CalibratedPrefixLayer
from hf_stablespam.recipes.lae.methods.parallel_adapter import ParallelAdapterLayer
from hf_stablespam.recipes.lae.pooling import POOLS, pooled

Pool = str | Callable[[Any], torch.Tensor]


@dataclass
class LAEOutput(ModelOutput):
    """What `LAEModel` returns: `loss` where labels were given, `logits` (batch, columns), `classes` (columns,)."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    classes: torch.Tensor | None = None


class LAEModel(nn.Module):
    """Backbone, experts and heads behind the `forward` that the Trainer calls.

    In training the logits are those of the newest task and the loss is `local_cross_entropy` over them; in evaluation
    they are those of all tasks so far, of the active expert alone. `lae_predict` asks both experts.

    `state_dict` holds what the recipe makes (both adapters, heads, the number of finished tasks) and leaves the frozen
    backbone out, so the Trainer's checkpoints are small and hold all that a resumed run needs. Loading one that does
    not fit raises instead of skipping.

    Args:
        peft_model: from `add_lae_adapters`.
        classifier: its `add_task` is called before each task.
        pool: features of a sample from the backbone's output: "cls" (the first token), "mean" (over tokens that are not
            padding), "last" (the last of these, for decoders), or a function of the backbone's output that returns
            (batch, in_features).
        local_loss: False is the baseline that LAE is compared with: logits and loss over all classes seen so far, in
            training as well.

    Raises:
        ValueError: a model without adapters, or an unknown `pool`.

    Example:
        >>> from peft import LoraConfig
        >>> from hf_stablespam.recipes.lae import add_lae_adapters
        >>> from transformers import ViTConfig, ViTModel
        >>> vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        ...                          image_size=8, patch_size=4))
        >>> lora = add_lae_adapters(vit, LoraConfig(r=2, lora_alpha=2, target_modules=["k_proj", "v_proj"]))
        >>> model = LAEModel(lora, IncrementalClassifier(8), "cls")
        >>> model.classifier.add_task(3)
        >>> output = model(pixel_values=torch.rand(2, 3, 8, 8), labels=torch.tensor([0, 2]))
        >>> output.logits.shape, output.loss.ndim
        (torch.Size([2, 3]), 0)
    """

    tasks_trained: torch.Tensor
    accepts_loss_kwargs = True  # the Trainer gives num_items_in_batch

    def __init__(
        self,
        peft_model: PeftModel,
        classifier: IncrementalClassifier,
        pool: Pool = "cls",
        *,
        local_loss: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(peft_model, PeftModel):
            raise ValueError(f"peft_model must come from add_lae_adapters, got {type(peft_model).__name__}")
        if not callable(pool) and pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)} or a function, got {pool!r}")
        self.peft_model = peft_model
        self.classifier = classifier
        self.pool = pool
        self.local_loss = local_loss
        self.task: int | None = None  # set by LAECallback; None: the newest
        self.stop_features_gradient = False  # set by LAECallback under DDP, see there
        self.register_buffer("tasks_trained", torch.zeros((), dtype=torch.long))
        self.config = _config_for_trainer(self.backbone)
        checkpoint.register_hooks(self)

    @property
    def backbone(self) -> nn.Module:
        """The model without a head of its own: what PEFT wraps, or its inner model."""
        wrapped = self.peft_model.get_base_model()
        return getattr(wrapped, "base_model", wrapped)

    @property
    def main_input_name(self) -> str:
        """For the Trainer: which input counts the tokens."""
        return getattr(self.backbone, "main_input_name", "input_ids")

    @property
    def current_task(self) -> int:
        """The task that is learned, or was learned last."""
        return len(self.classifier.heads) - 1 if self.task is None else self.task

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **inputs: Any,
    ) -> LAEOutput:
        """Loss and logits; labels are those of the data set.

        Inputs go to the backbone as they are. Those named here survive the Trainer's `remove_unused_columns`; for
        others set it to False.
        """
        named = {
            "pixel_values": pixel_values,
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "inputs_embeds": inputs_embeds,
        }
        inputs.update({name: value for name, value in named.items() if value is not None})
        features = self.features(**inputs)
        if self.training and self.stop_features_gradient:
            features = features.detach() + 0 * features
        task = self.current_task
        tasks = slice(task if self.training and self.local_loss else 0, task + 1)
        output = LAEOutput(logits=self.classifier(features, tasks), classes=self.classifier.class_labels(tasks))
        if labels is not None:
            output.loss = local_cross_entropy(output, labels, num_items_in_batch)
        return output

    def train(self, mode: bool = True) -> LAEModel:
        """Training mode for all but the backbone's batch norms, whose statistics are frozen as its weights are."""
        super().train(mode)
        for module in self.peft_model.modules():
            if isinstance(module, _NormBase):
                module.eval()
        return self

    def features(self, **inputs: Any) -> torch.Tensor:
        """What the heads see of each sample, by the active expert: (batch, in_features)."""
        inputs.pop("return_loss", None)
        return pooled(self.backbone(**inputs), self.pool, inputs.get("attention_mask"))

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """For `TrainingArguments(gradient_checkpointing=True)`.

        A re-entrant checkpoint passes gradients on only if its input wants one, which a frozen embedding's output does
        not.
        """
        wrapped: Any = self.peft_model.get_base_model()
        wrapped.gradient_checkpointing_enable(**options)
        chosen = options.get("gradient_checkpointing_kwargs") or {}
        if chosen.get("use_reentrant", True) and hasattr(wrapped, "enable_input_require_grads"):
            wrapped.enable_input_require_grads()

    def merge_and_unload(self, expert: str | None = None) -> nn.Module:
        """The backbone with one expert merged into its weights; heads and the other expert stay behind.

        Args:
            expert: "default" (online) or "offline".

        Raises:
            ValueError: two experts and none chosen, an unknown one, or a method that cannot be merged.
        """
        present = list(self.peft_model.peft_config)
        if expert is None and len(present) > 1:
            raise ValueError(f"merging would destroy one of the experts {present}; choose: merge_and_unload('offline')")
        chosen = expert or present[0]
        if chosen not in present:
            raise ValueError(f"the model has no expert {chosen!r}, only {present}")
        for module in self.peft_model.modules():
            if isinstance(module, (ParallelAdapterLayer, CalibratedPrefixLayer)):
                module.merge()  # raises before anything is changed
        return self.peft_model.base_model.merge_and_unload(adapter_names=[chosen])  # type: ignore[operator]

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write both adapters as PEFT does, ``lae_heads.safetensors``, and ``lae.json`` with classes and tasks."""
        checkpoint.save(self, directory)

    @classmethod
    def from_pretrained(cls, model: nn.Module, directory: str | os.PathLike[str], pool: Pool | None = None) -> LAEModel:
        """What `save_pretrained` wrote, on the same backbone; a checkpoint folder of the Trainer will do.

        Args:
            model: the backbone without adapters.
            directory: where the rest was saved.
            pool: needed where it was a function.

        Raises:
            ValueError: a folder without ``lae.json``, or a function as `pool` that is not given again.
        """
        return checkpoint.load(cls, model, directory, pool)


def _config_for_trainer(backbone: nn.Module) -> PretrainedConfig:
    """A copy of the backbone's configuration that tells `Trainer.predict` to leave `classes` out of the predictions."""
    own = getattr(backbone, "config", None)
    config = copy.copy(own) if isinstance(own, PretrainedConfig) else PretrainedConfig()
    ignored = getattr(config, "keys_to_ignore_at_inference", None) or []
    config.keys_to_ignore_at_inference = [*ignored, "classes"]
    return config
