"""GradientNormCallback: right figures, in every log that the Trainer keeps."""

import itertools
import json
import math

import pytest
import torch
from transformers import TrainerCallback

from hf_stablespam import FourBitCallback, FourBitConfig, FourBitLinear, GradientNormCallback
from tests.processes import run_code
from tests.trainer.callbacks.gradient_helpers import KeepNorms, Spike
from tests.trainer.helpers import tiny_llama, tiny_trainer, training_logs


@pytest.mark.parametrize("optim", ["stable_spam", "spam", "adamw_torch", "sgd"])
def test_norm_is_that_of_the_whole_gradient(tmp_path, optim):
    keep = KeepNorms()
    trainer = tiny_trainer(tmp_path, callbacks=[GradientNormCallback(), keep], optim=optim)
    trainer.train()
    assert [row["gradients/norm"] for row in training_logs(trainer)] == pytest.approx(keep.norms, rel=1e-5)


@pytest.mark.parametrize("optim", ["stable_spam", "adamw_torch"])
def test_norm_is_the_one_before_the_trainers_clipping(tmp_path, optim):
    keep = KeepNorms()
    trainer = tiny_trainer(tmp_path, callbacks=[GradientNormCallback(), keep], optim=optim, max_grad_norm=0.1)
    trainer.train()
    assert max(keep.norms) == pytest.approx(0.1, rel=1e-4)
    for row in training_logs(trainer):
        assert row["gradients/norm"] == pytest.approx(row["grad_norm"])
        assert row["gradients/norm"] > 0.2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_mean_and_maximum_cover_the_steps_between_two_logs(tmp_path, accumulate):
    keep = KeepNorms()
    trainer = tiny_trainer(
        tmp_path,
        callbacks=[GradientNormCallback(), keep],
        logging_steps=3,
        gradient_accumulation_steps=accumulate,
    )
    trainer.train()
    for row, steps in zip(training_logs(trainer), (keep.norms[:3], keep.norms[3:]), strict=True):
        assert row["gradients/norm"] == pytest.approx(steps[-1], rel=1e-5)
        assert row["gradients/norm_mean"] == pytest.approx(sum(steps) / 3, rel=1e-5)
        assert row["gradients/norm_max"] == pytest.approx(max(steps), rel=1e-5)


def test_clipped_entries_and_resets_are_counted(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        callbacks=[GradientNormCallback(), Spike([9], 1e6)],
        max_steps=12,
        logging_steps=2,
        optim_args="reset_interval=4",
    )
    counts = []
    original = trainer.create_optimizer

    def create_optimizer(*args):
        optimizer = original(*args)
        optimizer.register_step_post_hook(lambda opt, *_: counts.append(opt.statistics["clipped"].sum().item()))
        return optimizer

    trainer.create_optimizer = create_optimizer
    trainer.train()
    rows = training_logs(trainer)
    assert [row["gradients/clipped"] for row in rows] == [sum(counts[i : i + 2]) for i in range(0, 12, 2)]
    assert rows[4]["gradients/clipped"] > 0
    assert [row["gradients/resets"] for row in rows] == [0, 1, 0, 1, 0, 1]
    assert rows[4]["gradients/norm_max"] > 1000 * rows[3]["gradients/norm_max"]
    assert rows[4]["gradients/stable_norm_max"] < 10 * rows[3]["gradients/stable_norm_max"]
    assert {row["gradients/nonfinite"] for row in rows} == {0}


def test_a_nonfinite_gradient_is_counted(tmp_path):
    trainer = tiny_trainer(tmp_path, callbacks=[GradientNormCallback(), Spike([3], math.inf)])
    trainer.train()
    assert [row["gradients/nonfinite"] for row in training_logs(trainer)] == [0, 0, 1, 0, 0, 0]
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_evaluation_logs_stay_as_they_are(tmp_path):
    trainer = tiny_trainer(
        tmp_path, callbacks=[GradientNormCallback()], logging_steps=6, eval_strategy="steps", eval_steps=2
    )
    trainer.train()
    evaluations = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert len(evaluations) == 3
    assert not [key for row in evaluations for key in row if key.startswith("gradients/")]
    assert len([row for row in trainer.state.log_history if "gradients/norm_max" in row]) == 1


@pytest.mark.parametrize("options", [{}, {"by": "tensor", "spike_score": "entry"}], ids=["whole", "tensor"])
def test_training_is_not_changed(tmp_path, options):
    weights = []
    for callbacks in ([], [GradientNormCallback(**options)]):
        trainer = tiny_trainer(tmp_path, callbacks=[FourBitCallback(FourBitConfig(group_size=8)), *callbacks])
        trainer.train()
        weights.append(list(trainer.model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


class KeepStatistics(TrainerCallback):
    """What StableSPAM says of each step."""

    def __init__(self):
        self.steps = []

    def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.steps.append(optimizer.optimizer.statistics)


def test_what_stable_spam_did_is_logged(tmp_path):
    keep = KeepStatistics()
    trainer = tiny_trainer(tmp_path, callbacks=[GradientNormCallback(), keep])
    trainer.train()
    entries = sum(p.numel() for p in trainer.model.parameters())
    for row, statistics in zip(training_logs(trainer), keep.steps, strict=True):
        assert row["gradients/largest"] == pytest.approx(statistics["grad_max"].max().item())
        assert row["gradients/clip_threshold"] == pytest.approx(statistics["clip_threshold"].max().item())
        assert row["gradients/clipped_share"] == pytest.approx(statistics["clipped"].sum().item() / entries)
        assert row["gradients/norm_factor"] == pytest.approx(statistics["norm_factor"].mean().item(), rel=1e-5)
        assert row["gradients/stable_norm"] == pytest.approx(statistics["stable_norm"].norm().item(), rel=1e-5)


def test_share_of_clipped_entries_covers_the_steps_between_two_logs(tmp_path):
    trainer = tiny_trainer(tmp_path, callbacks=[GradientNormCallback(by="tensor")], logging_steps=3)
    trainer.train()
    for row in training_logs(trainer):
        sizes = {name: p.numel() for name, p in trainer.model.named_parameters()}
        assert row["gradients/clipped_share"] == pytest.approx(row["gradients/clipped"] / (3 * sum(sizes.values())))
        shares = [row[f"gradients/clipped_share/{name}"] * size * 3 for name, size in sizes.items()]
        assert sum(shares) == pytest.approx(row["gradients/clipped"])


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.1])
def test_norms_by_tensor_are_those_before_the_trainers_clipping(tmp_path, max_grad_norm):
    keep = KeepNorms()
    trainer = tiny_trainer(
        tmp_path,
        callbacks=[GradientNormCallback(by="tensor"), keep],
        optim="adamw_torch",
        max_grad_norm=max_grad_norm,
    )
    trainer.train()
    for row, norms, whole in zip(training_logs(trainer), keep.by_name, keep.norms, strict=True):
        scale = row.get("grad_norm", whole) / whole  # transformers 4 logs it only where it clips
        assert (scale > 2) == (max_grad_norm > 0)
        expected = {f"gradients/norm/{name}": norm * scale for name, norm in norms.items()}
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_norms_by_block_are_those_of_their_tensors(tmp_path):
    keep = KeepNorms()
    trainer = tiny_trainer(tmp_path, callbacks=[GradientNormCallback(by="block"), keep], optim="adamw_torch")
    trainer.train()
    blocks = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]
    for row, norms in zip(training_logs(trainer), keep.by_name, strict=True):
        assert {key.removeprefix("gradients/norm/") for key in row if key.startswith("gradients/norm/")} == set(blocks)
        for block in blocks:
            expected = math.hypot(*(norm for name, norm in norms.items() if name.startswith(block + ".")))
            assert row[f"gradients/norm/{block}"] == pytest.approx(expected, rel=1e-4)


class Unfreeze(TrainerCallback):
    """Train the first block from the fourth step on."""

    def on_step_begin(self, args, state, control, model, optimizer, **kwargs):
        if state.global_step == 3:
            block = model.model.layers[0].requires_grad_(True)
            optimizer.param_groups[0]["params"].extend(block.parameters())


@pytest.mark.parametrize("optim", ["stable_spam", "adamw_torch"])
@pytest.mark.parametrize("by", ["block", "tensor", None])
def test_parameters_that_are_unfrozen_join_the_figures(tmp_path, by, optim):
    model = tiny_llama()
    model.model.layers[0].requires_grad_(False)
    callbacks, saving = [GradientNormCallback(by=by), Unfreeze()], {"save_strategy": "steps", "save_steps": 3}
    trainer = tiny_trainer(tmp_path, model=model, callbacks=callbacks, optim=optim, logging_steps=2, **saving)
    trainer.train()
    logged = [{key for key in row if "layers.0" in key} for row in training_logs(trainer)]
    assert [bool(keys) for keys in logged] == [False, by is not None, by is not None]
    assert all(row["gradients/norm"] > 0 for row in training_logs(trainer))


class KeepWeights(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.steps.append(torch.cat([p.detach().flatten() for p in model.parameters()]).clone())

    on_train_begin = on_step_end


def test_weight_and_update_norms_and_their_ratio(tmp_path):
    keep = KeepWeights()
    trainer = tiny_trainer(tmp_path, callbacks=[GradientNormCallback(), keep], logging_steps=2)
    trainer.train()
    updates = [(after - before).norm().item() for before, after in itertools.pairwise(keep.steps)]
    ratios = [update / after.norm().item() for update, after in zip(updates, keep.steps[1:], strict=True)]
    for index, row in enumerate(training_logs(trainer)):
        here = slice(2 * index, 2 * index + 2)
        assert row["gradients/weight_norm"] == pytest.approx(keep.steps[2 * index + 2].norm().item(), rel=1e-5)
        assert row["gradients/update_norm_max"] == pytest.approx(max(updates[here]), rel=1e-4)
        assert row["gradients/update_ratio"] == pytest.approx(ratios[here][-1], rel=1e-4)
        assert row["gradients/update_ratio_mean"] == pytest.approx(sum(ratios[here]) / 2, rel=1e-4)


def test_figures_that_nobody_asked_for_are_not_there(tmp_path):
    trainer = tiny_trainer(tmp_path, callbacks=[GradientNormCallback(spike_score=None, updates=False)], optim="sgd")
    trainer.train()
    logged = {key for row in training_logs(trainer) for key in row if key.startswith("gradients/")}
    names = {"norm", "norm_mean", "norm_max", "largest", "largest_mean", "largest_max", "nonfinite"}
    assert logged == {f"gradients/{name}" for name in names}


@pytest.mark.parametrize("kind", ["tensor", "entry"])
@pytest.mark.parametrize("optim", ["stable_spam", "adamw_torch"])
def test_a_spike_stands_out_in_the_score(tmp_path, optim, kind):
    trainer = tiny_trainer(
        tmp_path,
        callbacks=[GradientNormCallback(spike_score=kind, by="tensor"), Spike([58], 1e5)],
        optim=optim,
        max_steps=60,
        logging_steps=5,
    )
    trainer.train()
    rows = training_logs(trainer)
    assert [row["gradients/spikes"] for row in rows[1:]] == [0] * 10 + [1]
    assert rows[-1]["gradients/spike_score_max"] > 50
    assert rows[-1]["gradients/spike_score_max/lm_head.weight"] == rows[-1]["gradients/spike_score_max"]
    assert rows[-1]["gradients/spike_score_max/model.norm.weight"] < 10


@pytest.mark.parametrize("by", [None, "block", "tensor"])
def test_quantisation_error_of_4_bit_weights(tmp_path, by):
    callbacks = [FourBitCallback(FourBitConfig(group_size=8)), GradientNormCallback(by=by)]
    trainer = tiny_trainer(tmp_path, callbacks=callbacks, max_steps=2, logging_steps=2)
    trainer.train()
    sums: dict[str, list[float]] = {}
    for name, module in trainer.model.named_modules():
        if isinstance(module, FourBitLinear):
            error = (module.weight - module.quantized_weight()).square().sum().item()
            parts = {None: [""], "block": ["", "/" + ".".join(name.split(".")[:3])], "tensor": ["", f"/{name}.weight"]}
            for part in parts[by]:
                signal, noise = sums.get(part, (0.0, 0.0))
                sums[part] = [signal + module.weight.square().sum().item(), noise + error]
    expected = {f"gradients/weight_sqnr_db{p}": 10 * math.log10(s / n) for p, (s, n) in sums.items()}
    (row,) = training_logs(trainer)
    assert {key: value for key, value in row.items() if "sqnr" in key} == pytest.approx(expected, rel=1e-4)
    assert 10 < row["gradients/weight_sqnr_db"] < 30


@pytest.mark.parametrize("optim", ["stable_spam", "adamw_torch"])
def test_logs_with_nonfinite_gradients_are_still_json(tmp_path, optim):
    """Under AdamW one infinite gradient makes every later weight and gradient nan."""
    trainer = tiny_trainer(tmp_path, callbacks=[GradientNormCallback(by="block"), Spike([3])], optim=optim)
    trainer.train()
    rows = [{k: v for k, v in row.items() if k.startswith("gradients/")} for row in training_logs(trainer)]
    json.dumps(rows, allow_nan=False)
    assert rows[2]["gradients/nonfinite"] == 1
    assert "gradients/norm" not in rows[2]
    assert "gradients/norm/model.layers.0" in rows[2]


def test_a_nonfinite_step_does_not_hide_the_others_since_the_last_log(tmp_path):
    keep = KeepNorms()
    trainer = tiny_trainer(tmp_path, callbacks=[GradientNormCallback(), keep, Spike([2])], logging_steps=3)
    trainer.train()
    row = training_logs(trainer)[0]
    assert row["gradients/norm_max"] == pytest.approx(max(keep.norms[0], keep.norms[2]), rel=1e-5)
    assert row["gradients/norm_mean"] == pytest.approx((keep.norms[0] + keep.norms[2]) / 2, rel=1e-5)
    assert row["gradients/nonfinite"] == 1


def test_one_transfer_for_each_log(tmp_path, monkeypatch):
    transfers = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: transfers.append(self.shape) or original(self))
    callback = GradientNormCallback(by="tensor")
    trainer = tiny_trainer(
        tmp_path, callbacks=[FourBitCallback(FourBitConfig(group_size=8)), callback], logging_steps=3
    )
    for event in ("on_pre_optimizer_step", "on_optimizer_step"):
        monkeypatch.setattr(callback, event, _without_reading(getattr(callback, event)))
    real = callback.on_log
    counts = []

    def on_log(*args, **kwargs):
        before = len(transfers)
        with ForbidReading():
            real(*args, **kwargs)
        counts.append(len(transfers) - before)

    monkeypatch.setattr(callback, "on_log", on_log)
    trainer.train()
    assert counts == [1, 1, 0]


class ForbidReading(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails on what copies a number from the device to the host, except for `tolist`, which does not dispatch it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


def _without_reading(event):
    def guarded(*args, **kwargs):
        with ForbidReading():
            return event(*args, **kwargs)

    return guarded


def test_a_callback_given_as_a_class_reports_as_well(tmp_path):
    trainer = tiny_trainer(tmp_path, callbacks=[GradientNormCallback], max_steps=2, report_to=["tensorboard"])
    trainer.train()
    assert "gradients/norm" in training_logs(trainer)[0]
    first = trainer.callback_handler.callbacks[0]
    assert isinstance(first, GradientNormCallback)


def test_importing_changes_nothing_but_the_registration():
    """In a new process: here other tests have made callbacks."""
    run_code("""
        import accelerate, transformers.trainer_callback as t

        def now():
            return [accelerate.Accelerator.clip_grad_norm_, accelerate.Accelerator.backward, t.CallbackHandler.on_log]

        before = now()
        import hf_stablespam
        from hf_stablespam.trainer.callbacks import gradient_norm, momentum_reset
        assert now() == before
        hf_stablespam.GradientNormCallback()
        once = now()
        assert not any(a == b for a, b in zip(once, before))
        hf_stablespam.GradientNormCallback(); hf_stablespam.MomentumResetCallback(every=5)
        hf_stablespam.SpikeRecorder()
        assert now() == once
    """)
