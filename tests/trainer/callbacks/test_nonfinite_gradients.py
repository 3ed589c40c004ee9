"""One gradient entry that is not finite, put in where it comes into being, costs its own tensor one update."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import Trainer, TrainerCallback

from hf_stablespam import GradientNormCallback, SpikeRecorder, StabilizeCallback, StableSPAM
from hf_stablespam.monitor.spike_file import read_spikes
from hf_stablespam.trainer.callbacks.helpers.clipping import clip_over_meshes
from tests.processes import run_once, run_processes
from tests.trainer import distributed
from tests.trainer.callbacks.gradient_helpers import KeepNorms
from tests.trainer.helpers import RandomTokens, arguments, optimizer_of, tiny_llama, tiny_trainer, training_logs

STEP, NAME = 3, "lm_head.weight"


class _Damage(torch.autograd.Function):
    """The identity, whose gradient gets one entry of another value."""

    @staticmethod
    def forward(ctx, weight, value):
        ctx.value = value
        return weight.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[0, 1] = ctx.value
        return grad, None


class Damage(TrainerCallback):
    """One entry of the output layer's gradient is not finite in the backward passes of one step.

    Keeps which tensors the step changed, and the gradients that the optimizer saw in it.
    """

    def __init__(self, value=math.inf):
        self.value, self.now = value, False
        self.changed, self.gradients = [], {}

    def on_init_end(self, args, state, control, model, **kwargs):
        head = model.lm_head
        head.forward = lambda x: functional.linear(
            x, _Damage.apply(head.weight, self.value) if self.now else head.weight
        )

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.now = state.global_step + 1 == STEP
        self.before = {name: distributed.whole(p).detach().clone() for name, p in model.named_parameters()}

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        if self.now:
            after = {name: distributed.whole(p).detach() for name, p in model.named_parameters()}
            self.changed = [name for name in after if not torch.equal(after[name], self.before[name])]
            self.gradients = {name: distributed.whole(p.grad).clone() for name, p in model.named_parameters()}


def others(model) -> list[str]:
    return [name for name, _ in model.named_parameters() if name != NAME]


RUNS = {
    "alone": {},
    "spam": {"optim": "spam"},
    "accumulation": {"gradient_accumulation_steps": 2},
    "autocast": {"bf16": True},
    "nan": {"value": math.nan},
    "clipping": {"max_grad_norm": 0.1},
    "clipping nan": {"max_grad_norm": 0.1, "value": math.nan},
    "layer norms apart": {"max_grad_norm": 0.1, "weight_decay": 0.1, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("name", RUNS)
def test_costs_one_tensor_one_update(tmp_path, name):
    """Without any callback of ours."""
    options = dict(RUNS[name])
    damage = Damage(options.pop("value", math.inf))
    trainer = tiny_trainer(tmp_path, callbacks=[damage], max_steps=STEP, **options)
    trainer.train()
    assert damage.changed == others(trainer.model)
    assert optimizer_of(trainer).statistics["nonfinite"].sum() == 1
    finite = torch.stack([damage.gradients[other].norm() for other in others(trainer.model)])
    assert finite.isfinite().all()
    if "max_grad_norm" in options:
        assert finite.norm().item() == pytest.approx(0.1, rel=1e-4)  # as if the damaged one were not there


def test_an_optimizer_that_the_script_made(tmp_path):
    model, damage = tiny_llama(), Damage()
    optimizer = StableSPAM(model.parameters(), lr=1e-3)
    tiny_trainer(tmp_path, callbacks=[damage], model=model, optimizers=(optimizer, None), max_steps=STEP).train()
    assert damage.changed == others(model)


def test_another_optimizer_that_is_stabilised(tmp_path):
    damage = Damage()
    trainer = tiny_trainer(tmp_path, callbacks=[StabilizeCallback(), damage], optim="adamw_torch", max_steps=STEP)
    trainer.train()
    assert damage.changed == others(trainer.model)


@pytest.mark.parametrize("clipping", [0.0, 0.1])
@pytest.mark.parametrize("optim", ["stable_spam", "adamw_torch"])
def test_is_blamed_on_its_tensor_alone(tmp_path, optim, clipping):
    callbacks = [GradientNormCallback(by="tensor"), SpikeRecorder(), Damage(), keep := KeepNorms()]
    trainer = tiny_trainer(tmp_path, callbacks=callbacks, optim=optim, max_grad_norm=clipping, max_steps=STEP)
    trainer.train()
    row = training_logs(trainer)[STEP - 1]
    if clipping or hasattr(Trainer, "_get_grad_norm"):  # transformers 5.0 has it for the log of clipping alone
        assert math.isinf(row["grad_norm"])  # the symptom, as the Trainer logs it
    assert row["gradients/nonfinite"] == 1  # what was skipped
    assert row[f"gradients/nonfinite/{NAME}"] == 1
    assert [spike["tensor"] for spike in read_spikes(tmp_path)] == [NAME]
    assert "gradients/norm" not in row
    plain = {other: row[f"gradients/norm/{other}"] for other in others(trainer.model)}
    if clipping:  # the figures are those before it
        kept = {other: keep.by_name[-1][other] for other in plain}
        assert math.hypot(*kept.values()) == pytest.approx(clipping, rel=1e-4)
        factor = clipping / math.hypot(*plain.values())
        assert kept == pytest.approx({name: norm * factor for name, norm in plain.items()}, rel=1e-3)
    else:
        assert plain == pytest.approx({other: keep.by_name[-1][other] for other in plain}, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_of_finite_gradients_is_torchs(tmp_path, dtype):
    """The callbacks put our clipping in accelerate's place."""
    weights = []
    for callbacks in ([], [GradientNormCallback()]):
        model = tiny_llama().to(dtype)
        tiny_trainer(tmp_path, model=model, callbacks=callbacks, optim="adamw_torch", max_grad_norm=0.1).train()
        weights.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("clipping", [0.0, 0.1])
def test_gradients_on_several_meshes(tmp_path, monkeypatch, clipping):
    """The Trainer clips these past accelerate, each mesh's by itself."""
    if not hasattr(Trainer, "_mixed_mesh_grad_norm"):
        pytest.skip("this transformers has no clipping over several device meshes")
    monkeypatch.setattr(Trainer, "_has_mixed_mesh_grads", lambda self, model: True)
    damage = Damage()
    trainer = tiny_trainer(tmp_path, callbacks=[damage], max_steps=STEP, max_grad_norm=clipping)
    trainer.train()
    assert damage.changed == others(trainer.model)
    finite = torch.stack([damage.gradients[other].norm() for other in others(trainer.model)])
    assert finite.isfinite().all()
    assert not clipping or finite.norm().item() == pytest.approx(clipping, rel=1e-4)
    assert math.isinf(training_logs(trainer)[STEP - 1]["grad_norm"])


@pytest.mark.parametrize("bad", [False, True])
def test_clipping_over_meshes_is_torchs_but_for_what_is_not_finite(bad, tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        meshes = [init_device_mesh("cpu", (1,), mesh_dim_names=(name,)) for name in ("experts", "fsdp")]
        grads = [torch.randn(4, 3, generator=torch.Generator().manual_seed(index)) for index in range(5)]
        placed = [
            grads[0],
            *(DTensor.from_local(grads[i], meshes[i % 2], [[Shard(0)], [Replicate()]][i % 2]) for i in range(1, 5)),
        ]
        parameters = []
        for grad in placed:
            parameters.append(torch.nn.Parameter(torch.zeros_like(grad)))
            parameters[-1].grad = grad.clone()
        if bad:
            parameters[3].grad.to_local()[0, 0] = math.nan
        total, factor = clip_over_meshes(parameters, 0.5)
        plain = [torch.nn.Parameter(torch.zeros(4, 3)) for index in range(5) if not bad or index != 3]
        for parameter, grad in zip(plain, [grads[i] for i in range(5) if not bad or i != 3], strict=True):
            parameter.grad = grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(plain, 0.5)
        assert total.isnan() if bad else torch.allclose(total, norm)
        assert 0 < factor < 1
        got = [distributed.whole(p.grad) for index, p in enumerate(parameters) if not bad or index != 3]
        for ours, expected in zip(got, plain, strict=True):
            assert torch.allclose(ours, expected.grad)
    finally:
        torch.distributed.destroy_process_group()


def train(folder: Path, fsdp: bool, clipping: float) -> None:
    options = distributed.fsdp_options() if fsdp else {}
    args = arguments(folder, max_steps=STEP, max_grad_norm=clipping, gradient_accumulation_steps=2, **options)
    if fsdp:
        distributed.let_fsdp_run_on_the_cpu(args)
    damage = Damage()
    callbacks = [SpikeRecorder(), damage]
    trainer = Trainer(model=tiny_llama(), args=args, train_dataset=RandomTokens(), callbacks=callbacks)
    trainer.train()
    norms = [grad.norm().item() for name, grad in damage.gradients.items() if name != NAME]
    sharded = any(hasattr(p, "device_mesh") for p in trainer.model.parameters())
    found = {"changed": damage.changed, "norm": math.hypot(*norms), "sharded": sharded}
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


def train_on_two(folder: Path) -> None:
    for kind in ("ddp", "fsdp"):
        for clipping in (0.0, 0.1):
            train(folder / f"{kind} {clipping}", kind == "fsdp", clipping)


@pytest.mark.slow
@pytest.mark.parametrize("clipping", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_on_two_processes(tmp_path_factory, kind, clipping):
    folder = run_once(tmp_path_factory, "nonfinite_processes", lambda folder: run_processes(2, train_on_two, folder))
    for rank in range(2):
        found = json.loads((folder / f"{kind} {clipping}" / f"{rank}.json").read_text())
        assert found["sharded"] == (kind == "fsdp")
        assert found["changed"] == others(tiny_llama())
        assert math.isfinite(found["norm"])
        assert found["norm"] == pytest.approx(0.1, rel=1e-4) or not clipping
    assert [spike["tensor"] for spike in read_spikes(folder / f"{kind} {clipping}")] == [NAME]
