"""Adapt-Pruner (arXiv 2502.03460): a smaller language model of the same class, by adaptive structural pruning that is
interleaved with training.

    report = adapt_prune(model, 0.8, batches)                    # a cut to 80 % of the parameters
    model = prune_and_train(model, make_trainer, 0.5, stages=5)  # cut and train, five times
    Trainer(..., callbacks=[AdaptPruneCallback(0.5, stages=5)])  # the same inside of one run
    save_pruned(model, "small"); model = load_pruned("small")
"""

from typing import TYPE_CHECKING

from hf_stablespam._names import lazy_attributes

if TYPE_CHECKING:
    from hf_stablespam.recipes.adapt_pruner.importance import LayerScores, group_importance, layer_importance
    from hf_stablespam.recipes.adapt_pruner.model.checkpoint import load_pruned, save_pruned
    from hf_stablespam.recipes.adapt_pruner.model.surgery import prune_units
    from hf_stablespam.recipes.adapt_pruner.plan import LayerPlan, PruningPlan, PruningReport, PruningStep
    from hf_stablespam.recipes.adapt_pruner.prune import adapt_prune
    from hf_stablespam.recipes.adapt_pruner.selection import adaptive_sparsity
    from hf_stablespam.recipes.adapt_pruner.training.callback import AdaptPruneCallback
    from hf_stablespam.recipes.adapt_pruner.training.shares import split_data, stage_targets
    from hf_stablespam.recipes.adapt_pruner.training.stages import prune_and_train

_MODULES = {
    "training.callback": ("AdaptPruneCallback",),
    "model.checkpoint": ("load_pruned", "save_pruned"),
    "importance": ("LayerScores", "group_importance", "layer_importance"),
    "plan": ("LayerPlan", "PruningPlan", "PruningReport", "PruningStep"),
    "prune": ("adapt_prune",),
    "selection": ("adaptive_sparsity",),
    "training.shares": ("split_data", "stage_targets"),
    "training.stages": ("prune_and_train",),
    "model.surgery": ("prune_units",),
}

__all__ = [
    "AdaptPruneCallback",
    "LayerPlan",
    "LayerScores",
    "PruningPlan",
    "PruningReport",
    "PruningStep",
    "adapt_prune",
    "adaptive_sparsity",
    "group_importance",
    "layer_importance",
    "load_pruned",
    "prune_and_train",
    "prune_units",
    "save_pruned",
    "split_data",
    "stage_targets",
]

__getattr__, __dir__ = lazy_attributes(
    __name__, {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}
)
