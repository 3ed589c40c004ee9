"""The official runs: the same units go at every step."""

import numpy as np
import pytest
import torch

from hf_stablespam.recipes.adapt_pruner import (
    adapt_prune,
    group_importance,
    layer_importance,
    split_data,
    stage_targets,
)
from hf_stablespam.recipes.adapt_pruner.training.schedule import schedule_of_run
from tests.recipes.adapt_pruner.models import RUNS, golden, golden_batches, golden_model
from tests.trainer.helpers import arguments

OFFICIAL = golden("official_runs")
SCHEDULE = golden("schedule")


@pytest.mark.parametrize("name", RUNS)
def test_every_step_of_an_official_run(name):
    """The target is what is left at the official end, so that nothing of the last step is trimmed."""
    run = OFFICIAL[name]
    model, batches = golden_model(run), golden_batches(run)
    options = {"steps": run["iterative_steps"], "amplitude": run["amplitude"], "ratio": run["pruning_ratio"]}
    report = adapt_prune(model, run["steps"][-1]["params_after"], batches, show_progress=False, **options)

    assert report.parameters_before == run["params_before"]
    assert len(report.steps) == len(run["steps"])
    kept = [(set(range(run["intermediate_size"])), set(range(run["kv_heads"]))) for _ in range(run["layers"])]
    losses = [step.loss for step in report.steps[1:]] + [loss(model, batches).item()]
    for step, official, loss_after in zip(report.steps, run["steps"], losses, strict=True):
        assert step.parameters == official["params_after"]
        assert loss_after == pytest.approx(official["loss_after"], abs=1e-5)
        raw = official["layer_importance_raw_sum_over_batches"]
        np.testing.assert_allclose(step.importance, raw, atol=1e-5)
        for layer, (removed, (neurons, heads)) in enumerate(zip(step.removed, kept, strict=True)):
            share = official["target_sparsity"][f"model.layers.{layer}.mlp.gate_proj"]
            assert step.sparsity[layer] == pytest.approx(share, abs=1e-8)
            neurons -= set(removed.neurons)
            heads -= set(removed.kv_heads)
            assert sorted(neurons) == official["kept"][f"layers.{layer}.mlp"]
            assert sorted(heads) == official["kept"][f"layers.{layer}.k_proj_heads"]
            queries = run["heads"] // run["kv_heads"]
            own = [head * queries + i for head in sorted(heads) for i in range(queries)]
            assert own == official["kept"][f"layers.{layer}.q_proj_heads"]
    assert [(set(one.neurons), set(one.kv_heads)) for one in report.kept.layers] == kept


@pytest.mark.parametrize("name", RUNS)
def test_the_scores_of_the_first_step(name):
    """Heads by the sum over their own query heads; the official one is another where heads are shared."""
    run = OFFICIAL[name]
    model, batches, first = golden_model(run), golden_batches(run), run["steps"][0]
    for batch in batches:
        loss(model, [batch]).backward()
    for layer, scores in enumerate(group_importance(model)):
        heads = f"model.layers.{layer}.self_attn.k_proj"
        neurons = f"model.layers.{layer}.mlp.gate_proj"
        np.testing.assert_allclose(scores.neurons, first["group_importance"][neurons], rtol=1e-5)
        np.testing.assert_allclose(scores.kv_heads, first["head_importance_own_query_heads"][heads], rtol=1e-5)
        if run["heads"] > run["kv_heads"]:
            assert not np.allclose(scores.kv_heads, first["group_importance"][heads], rtol=1e-3)
    raw = first["layer_importance_raw_sum_over_batches"]
    np.testing.assert_allclose(layer_importance(model, batches), raw, atol=1e-5)


def loss(model, batches):
    ids = torch.cat([batch["input_ids"] for batch in batches])
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("run", SCHEDULE["runs"], ids=lambda run: f"{run['schedule']} {run['total_steps']}")
def test_one_schedule_over_all_stages(run, tmp_path):
    """A new optimizer in each stage goes on where the one before stopped."""
    rates, floor = [], run["min_lr"] / run["learning_rate"]
    name, options = "warmup_stable_decay", {"min_lr_ratio": floor}
    if run["schedule"] == "CustomCosineScheduler":
        name, options = "cosine_with_min_lr", {"min_lr_rate": floor}
    args = arguments(tmp_path, lr_scheduler_type=name, lr_scheduler_kwargs=options, warmup_steps=run["warmup_steps"])
    for steps in run["steps_per_stage"]:
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=run["learning_rate"])
        scheduler = schedule_of_run(args, optimizer, run["total_steps"], len(rates))
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    np.testing.assert_allclose(rates, run["lr_used_at_step"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", SCHEDULE["stage_targets"], ids=lambda case: str(case["stages"]))
def test_targets_of_the_stages(case):
    assert stage_targets(case["original"], case["target"], case["stages"]) == case["targets"]


@pytest.mark.parametrize("case", SCHEDULE["data_split"], ids=lambda case: f"{case['strategy']} {case['total']}")
def test_samples_of_the_stages(case):
    assert split_data(case["total"], case["stages"], case["strategy"]) == case["sizes"]
