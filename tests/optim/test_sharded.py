"""Sharded parameters: whole-tensor statistics on every kind of mesh, and the price in collectives."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from hf_stablespam import StableSPAM
from tests.processes import run_once, run_processes

STEPS = 20
COUNTED = (1, 7)  # counting collectives makes a step ten times slower
# Over two or four processes: even, uneven, and empty on some; the last has no dimension to shard.
SHAPES = [(8, 6), (7, 5), (3, 4), (1, 9), (5,), (2, 2, 3), ()]
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "reset_interval": 6, "decay_steps": 15, "foreach": True}
BOTH = (Replicate(), Shard(0))
MESHES = {  # name → shape of the mesh, placements of each tensor in turn
    "fsdp": ((4,), [(Shard(0),)]),
    "hsdp": ((2, 2), [BOTH]),
    "tensor parallel": ((2, 2), [(Shard(0), Shard(1)), (Shard(0), Replicate()), (Shard(1), Shard(0))]),
    "replicated": ((4,), [(Replicate(),)]),
}
COLLECTIVES = {"fsdp": 2, "hsdp": 2, "tensor parallel": 4, "replicated": 0}


def parameters() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def gradients(step: int) -> list[torch.Tensor | None]:
    """Ordinary gradients with a spike, a nan, an inf, zeros and a missing gradient along the way."""
    generator = torch.Generator().manual_seed(100 + step)
    grads: list[torch.Tensor | None] = [torch.randn(shape, generator=generator) for shape in SHAPES]
    if step == 7:
        for grad in grads:
            grad.view(-1)[-1] *= 1e4
    if step == 9:
        grads[0][-1, -1], grads[1][0, 0] = torch.nan, torch.inf
    if step == 11:
        grads[2] = None
        grads[3].zero_()
    return grads


def placed(tensor: torch.Tensor, mesh, placements) -> DTensor:
    """Distribute a tensor, replicated where it has no such dimension."""
    fitting = [p if isinstance(p, Replicate) or p.dim < tensor.dim() else Replicate() for p in placements]
    return distribute_tensor(tensor, mesh, fitting, src_data_rank=None)


def optimizer_for(params: list[torch.Tensor]) -> StableSPAM:
    """Two groups, the second without clipping and climbing."""
    return StableSPAM([{"params": params[:4]}, {"params": params[4:], "clip_beta": None, "maximize": True}], **OPTIONS)


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def train(
    params: list[torch.Tensor], place=lambda tensor: tensor, *, optimizer: StableSPAM | None = None, first: int = 1
) -> dict:
    """Weights, states and statistics of a run, as whole tensors; and how many collectives each step took."""
    optimizer = optimizer or optimizer_for(params)
    history, collectives = [], []
    for step in range(first, STEPS + 1):
        for param, grad in zip(params, gradients(step), strict=True):
            param.grad = None if grad is None else place(grad)
        with CommDebugMode() if step in COUNTED else nullcontext() as communication:
            optimizer.step()
        if communication is not None:
            collectives.append(communication.get_total_counts())
        history.append(optimizer.statistics)
    states = [{name: whole(value) for name, value in optimizer.state[param].items()} for param in params]
    return {
        "params": [whole(param.detach()) for param in params],
        "states": states,
        "statistics": history,
        "collectives": collectives,
    }


class Weights(torch.nn.Module):
    """A model of nothing but parameters, since `torch.distributed.checkpoint` asks for a model."""

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        super().__init__()
        for index, param in enumerate(params):
            self.register_parameter(f"weight_{index}", param)


def save(params: list[torch.nn.Parameter], optimizer: StableSPAM, folder) -> None:
    model_state, optimizer_state = get_state_dict(Weights(params), optimizer)
    checkpoint.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)


def resume(params: list[torch.nn.Parameter], folder) -> StableSPAM:
    model, optimizer = Weights(params), optimizer_for(params)
    names = ("model", "optimizer")
    states = dict(zip(names, get_state_dict(model, optimizer), strict=True))
    checkpoint.load(states, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    return optimizer


def half_a_run(params: list[torch.nn.Parameter], folder, place=lambda tensor: tensor) -> None:
    optimizer = optimizer_for(params)
    for step in range(1, STEPS // 2 + 1):
        for param, grad in zip(params, gradients(step), strict=True):
            param.grad = place(grad)
        optimizer.step()
    save(params, optimizer, folder)


def sharded_parameters(mesh) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(placed(param, mesh, (Shard(0),))) for param in parameters()]


def train_from_and_to_checkpoints(folder) -> None:
    """What a single process saved is continued on four; what four save, the single process continues."""
    mesh = init_device_mesh("cpu", (4,))

    def place(grad):
        return placed(grad, mesh, (Shard(0),))

    params = sharded_parameters(mesh)
    optimizer = resume(params, folder / "of one")
    torch.save(
        train(params, place, optimizer=optimizer, first=STEPS // 2 + 1), folder / f"resumed {dist.get_rank()}.pt"
    )
    half_a_run(sharded_parameters(mesh), folder / "of four", place)


def train_on_meshes(folder) -> None:
    for name, (shape, placements) in MESHES.items():
        mesh = init_device_mesh("cpu", shape)
        of_tensor = [placements[index % len(placements)] for index in range(len(SHAPES))]
        params = [torch.nn.Parameter(placed(param, mesh, p)) for param, p in zip(parameters(), of_tensor, strict=True)]
        shapes = dict(zip(SHAPES, of_tensor, strict=True))
        result = train(params, lambda grad, mesh=mesh, shapes=shapes: placed(grad, mesh, shapes[tuple(grad.shape)]))
        torch.save(result, folder / f"{name} {dist.get_rank()}.pt")
    train_from_and_to_checkpoints(folder)
    refuse_partial_sums(folder)
    accept_partial_gradients(folder)


def refuse_partial_sums(folder) -> None:
    mesh = init_device_mesh("cpu", (4,))
    param = torch.nn.Parameter(DTensor.from_local(torch.ones(2, 3), mesh, [Partial()]))
    param.grad = DTensor.from_local(torch.ones(2, 3), mesh, [Partial()])
    with pytest.raises(ValueError, match="parameters must be") as error:
        StableSPAM([param]).step()
    (folder / f"error {dist.get_rank()}.txt").write_text(str(error.value))


def accept_partial_gradients(folder) -> None:
    """A replicated weight (a norm under sequence parallelism) whose gradient is still to be summed."""
    mesh = init_device_mesh("cpu", (4,))
    param = torch.nn.Parameter(distribute_tensor(torch.ones(6), mesh, [Replicate()]))
    optimizer = StableSPAM([param])
    param.grad = DTensor.from_local(torch.arange(6.0) / 4, mesh, [Partial()])
    optimizer.step()
    torch.save(optimizer.statistics, folder / f"partial {dist.get_rank()}.pt")


def all_runs(folder) -> None:
    half_a_run([torch.nn.Parameter(param) for param in parameters()], folder / "of one")
    run_processes(4, train_on_meshes, folder)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_once(tmp_path_factory, "sharded", all_runs)


@pytest.fixture(scope="module")
def expected():
    return train([torch.nn.Parameter(param) for param in parameters()])


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("mesh", MESHES)
def test_every_process_has_the_weights_and_states_of_a_single_one(results, expected, mesh, rank):
    result = torch.load(results / f"{mesh} {rank}.pt")
    torch.testing.assert_close(result["params"], expected["params"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result["states"], expected["states"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("mesh", MESHES)
def test_statistics_are_those_of_the_whole_tensor(results, expected, mesh, rank):
    result = torch.load(results / f"{mesh} {rank}.pt")
    for got, wanted in zip(result["statistics"], expected["statistics"], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)


def assert_same_end(got, expected):
    for part in ("params", "states"):
        torch.testing.assert_close(got[part], expected[part], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got["statistics"], expected["statistics"][STEPS // 2 :], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", range(4))
def test_a_distributed_checkpoint_of_one_process_goes_on_with_four(results, expected, rank):
    assert_same_end(torch.load(results / f"resumed {rank}.pt"), expected)


def test_a_distributed_checkpoint_of_four_processes_goes_on_with_one(results, expected):
    params = [torch.nn.Parameter(param) for param in parameters()]
    optimizer = resume(params, results / "of four")
    assert_same_end(train(params, optimizer=optimizer, first=STEPS // 2 + 1), expected)


def test_the_run_has_a_spike_a_skipped_tensor_and_a_reset(expected):
    """Else the two tests above would compare less than they say."""
    spike, nonfinite, reset = expected["statistics"][6], expected["statistics"][8], expected["statistics"][5]
    assert spike["clipped"][:4].gt(0).all()
    assert nonfinite["nonfinite"].tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert reset["reset"].sum() == len(SHAPES)


@pytest.mark.parametrize("mesh", MESHES)
def test_two_collectives_per_step_and_sharded_dimension(results, mesh):
    result = torch.load(results / f"{mesh} 0.pt")
    assert result["collectives"] == [COLLECTIVES[mesh]] * len(COUNTED)


def test_a_parameter_of_partial_sums_is_refused(results):
    for rank in range(4):
        message = (results / f"error {rank}.txt").read_text()
        assert message.startswith("parameters must be sharded or replicated, got P")
        assert message.endswith("redistribute it with Shard or Replicate")


def test_gradients_of_partial_sums_are_summed_first(results):
    for rank in range(4):
        statistics = torch.load(results / f"partial {rank}.pt")
        assert statistics["grad_max"].item() == 5
        assert statistics["grad_norm"].item() == pytest.approx(torch.arange(6.0).norm().item())
