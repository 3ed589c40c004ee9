"""A reset of any optimizer is whole: it goes on like a new one, or is refused by name before training."""

import copy
from typing import ClassVar

import pytest
import torch
from torch.optim import Adafactor as TorchAdafactor

from benchmarks import momentum_resets
from hf_stablespam import MomentumResetCallback, StableSPAM, stabilize
from hf_stablespam.trainer.callbacks.helpers.moment_resets.restart import Restart
from tests.trainer.helpers import tiny_llama, tiny_trainer

KINDS = {
    "stable_spam": lambda params: StableSPAM(params, lr=1e-2, clip_beta=None, norm_betas=None, reset_interval=None),
    "adamw_foreach": lambda params: torch.optim.AdamW(params, lr=1e-2, foreach=True),
    "adamw_capturable_lr": lambda params: torch.optim.AdamW(params, lr=torch.tensor(1e-2), foreach=False),
    "amsgrad": lambda params: torch.optim.AdamW(params, lr=1e-2, amsgrad=True),
    "nadam": lambda params: torch.optim.NAdam(params, lr=1e-2),
    "radam": lambda params: torch.optim.RAdam(params, lr=1e-2),
    "adamax": lambda params: torch.optim.Adamax(params, lr=1e-2),
    "adadelta": lambda params: torch.optim.Adadelta(params, lr=1e-2),
    "rprop": lambda params: torch.optim.Rprop(params, lr=1e-2),
    "sgd_momentum": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
    "torch_adafactor": lambda params: TorchAdafactor(params, lr=1e-2),
    "muon": lambda params: torch.optim.Muon(params[:1], lr=1e-2),
    "counts_itself": lambda params: CountsItself(params),
}


REFUSED = ("sgd", "galore_adamw_layerwise", "apollo_adamw_layerwise", "pytorch_optimizer asgd")


class CountsItself(torch.optim.SGD):
    """Keeps the number of its steps and an average in attributes, and warms itself up."""

    def __init__(self, params):
        super().__init__(params, lr=1e-2)
        self.taken, self.averages = 0, {}

    def step(self, closure=None):
        self.taken += 1
        for param in self.param_groups[0]["params"]:
            average = self.averages.setdefault(param, torch.zeros_like(param))
            average.lerp_(param.grad, 0.1)
            param.data.sub_(average, alpha=self.param_groups[0]["lr"] * min(1, self.taken / 20))


class NeverForgets(torch.optim.SGD):
    """What it remembers is out of reach."""

    memory: ClassVar[list[int]] = []

    def step(self, closure=None):
        self.memory.append(1)
        with torch.no_grad():
            for param in self.param_groups[0]["params"]:
                param.sub_(param.grad, alpha=1e-2 * len(self.memory))


@pytest.fixture(autouse=True)
def _eager():
    """Some compile their update, which takes longer than all of these tests."""
    with torch.compiler.set_stance("force_eager"):
        yield


def parameters():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(64, 96)), torch.nn.Parameter(torch.randn(64))]


def steps(params, optimizer, seed, count=12):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("name", momentum_resets.names())
def test_the_first_updates_are_of_a_new_optimizers_size(name):
    try:
        found = momentum_resets.trial(momentum_resets.names()[name], steps=30)
    except momentum_resets.DoesNotRun as error:
        pytest.skip(f"{name} does not run here: {error}")
    except ValueError:
        assert name in REFUSED
        return
    assert name not in REFUSED
    assert max(found.new) > 0
    if name == "spam":  # its own warm-up follows a reset
        assert found.after[0] == pytest.approx(0.01 * found.new[0], rel=0.01)
    else:  # trackers of AdaClip and AdaGN stay
        assert found.after == pytest.approx(found.new, rel=0.1 if name == "stable_spam" else 1e-3)


@pytest.mark.parametrize("name", KINDS)
def test_after_a_reset_it_goes_on_like_a_new_one(name):
    params = parameters()
    optimizer = KINDS[name](params)
    restart = Restart(optimizer)
    steps(params, optimizer, seed=1)
    twins = copy.deepcopy(params)
    restart.reset()
    steps(params, optimizer, seed=2)
    steps(twins, KINDS[name](twins), seed=2)
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))


def test_after_a_resume_too():
    """The counters in the groups that were loaded are not those of a new optimizer."""
    schedulefree = pytest.importorskip("schedulefree", reason="schedulefree is not installed: it is in the extra dev")
    params = parameters()
    trained = schedulefree.AdamWScheduleFree(params)
    trained.train()
    steps(params, trained, seed=1)
    twins = copy.deepcopy(params)
    resumed, new = schedulefree.AdamWScheduleFree(params), schedulefree.AdamWScheduleFree(twins)
    restart = Restart(resumed)
    resumed.load_state_dict(trained.state_dict())
    restart.reset()
    new.train()
    steps(params, resumed, seed=2)
    steps(twins, new, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))


def test_a_resumed_run_resets_as_a_whole_one(tmp_path):
    """Through the Trainer, which loads the checkpoint before training begins."""
    pytest.importorskip("schedulefree", reason="schedulefree is not installed: it is in the extra dev")
    options = {"optim": "schedule_free_adamw", "max_steps": 8, "lr_scheduler_type": "constant", "save_steps": 4}
    weights = []
    for resume in (None, str(tmp_path / "checkpoint-4")):
        callback = MomentumResetCallback(at=[6])
        trainer = tiny_trainer(tmp_path, callbacks=[callback], **{**options, "save_strategy": "steps"})
        trainer.train(resume_from_checkpoint=resume)
        weights.append(list(trainer.model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_what_is_no_moment_stays():
    params = parameters()
    optimizer = stabilize(torch.optim.AdamW(params, lr=1e-2))
    restart = Restart(optimizer)
    steps(params, optimizer, seed=1)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)  # the trackers now lie in the state, until the next step
    restart.reset()
    steps(params, optimizer, seed=2, count=1)
    after = optimizer.state_dict()["state"]
    assert {int(state["step"]) for state in after.values()} == {1}
    assert {state["stabilizer_step"] for state in after.values()} == {13}


def test_the_rehearsal_is_noticed_by_nobody():
    params = parameters()
    optimizer = torch.optim.AdamW(params, lr=0.0)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    before, random = copy.deepcopy(params), torch.random.get_rng_state()
    Restart(optimizer)
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(params, before, strict=True))
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not calls
    assert not optimizer.state


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda params: torch.optim.SGD(params, lr=1e-2), "needs an optimizer that keeps moments, got SGD; remove"),
        (
            lambda params: NeverForgets(params, lr=1e-2),
            "and NeverForgets cannot be made to go on like a new one; remove",
        ),
        (
            lambda params: torch.optim.LBFGS(params),
            "LBFGS cannot be made to go on like a new one, and a try of it failed",
        ),
    ],
)
def test_what_cannot_be_reset_is_refused_by_name_before_training(tmp_path, make, said):
    model = tiny_llama()
    before = copy.deepcopy(list(model.parameters()))
    trainer = tiny_trainer(
        tmp_path, model=model, optimizers=(make(model.parameters()), None), callbacks=[MomentumResetCallback(every=2)]
    )
    with pytest.raises(ValueError, match=said):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_counters_whose_beginning_nobody_has_seen():
    schedulefree = pytest.importorskip("schedulefree", reason="schedulefree is not installed: it is in the extra dev")
    params = parameters()
    optimizer = schedulefree.AdamWScheduleFree(params)
    optimizer.train()
    steps(params, optimizer, seed=1)
    with pytest.raises(
        ValueError, match=r"must see AdamWScheduleFree before its first step, because it keeps k, lr_max"
    ):
        Restart(optimizer)


def test_a_checkpoint_right_after_a_spikes_reset_holds_the_state(tmp_path):
    """Without state torch's sharded checkpoints would take a step to make one, and count it."""
    from tests.trainer.callbacks.test_momentum_reset import Spike

    callbacks = [MomentumResetCallback(on_spike=5, spike_window=5), Spike([7])]
    saving = {"save_strategy": "steps", "save_steps": 7, "max_steps": 9, "optim": "adamw_torch"}
    whole = tiny_trainer(tmp_path, callbacks=callbacks, **saving)
    whole.train()
    saved = torch.load(tmp_path / "checkpoint-7" / "optimizer.pt", weights_only=True)
    assert {int(state["step"]) for state in saved["state"].values()} == {7}
    resumed = tiny_trainer(tmp_path, callbacks=[MomentumResetCallback(on_spike=5, spike_window=5)], **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    for trainer in (whole, resumed):
        assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {2}
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
