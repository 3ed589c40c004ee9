"""FourBitLinear: the three products, their gradients, dtypes, autocast, and how often the weight is rounded."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from hf_stablespam.quant import FourBitConfig, FourBitLinear
from hf_stablespam.quant import linear as linear_module
from hf_stablespam.quant import matmul as matmul_module
from hf_stablespam.quant.layers.linear import fixed_weights

PLAIN = {"weight": None, "activation": None}


def make(
    config: FourBitConfig, width: int = 48, dtype: torch.dtype = torch.float32
) -> tuple[FourBitLinear, torch.Tensor]:
    torch.manual_seed(0)
    layer = FourBitLinear(width, 24, config=config, dtype=dtype)
    return layer, torch.randn(2, 5, width, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(
    "name", ["int4", "int4_asym", "int4_signed", "fp4_e1m2", "fp4_e1m2_official", "fp4_e2m1", "mxfp4", "nvfp4"]
)
def test_products_are_those_of_the_quantized_operands(name: str) -> None:
    if name in ("int4_asym", "int4_signed"):
        config = FourBitConfig(weight=name, activation="int4", gradient=None, group_size=32)
    else:
        config = FourBitConfig(weight=name, activation=name, gradient=name, group_size=32, gradient_rounding="nearest")
    layer, x = make(config)
    upstream = torch.randn(2, 5, 24)
    y = layer(x)
    y.backward(upstream)
    w_q = config.quantizer("weight")(layer.weight)
    x_q = config.quantizer("activation")(x)
    g_q = upstream if config.gradient is None else config.quantizer("gradient")(upstream)
    torch.testing.assert_close(y, (x_q @ w_q.T + layer.bias).detach())
    torch.testing.assert_close(x.grad, g_q @ w_q.detach())
    torch.testing.assert_close(layer.weight.grad, g_q.reshape(-1, 24).T @ x_q.detach().reshape(-1, 48))
    torch.testing.assert_close(layer.bias.grad, upstream.sum((0, 1)))


def test_gradcheck_with_the_identity_quantizer() -> None:
    layer, x = make(FourBitConfig(**PLAIN), width=6, dtype=torch.float64)

    def product(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(product, (x, layer.weight, layer.bias))


@pytest.mark.parametrize("bias", [False, True])
def test_what_it_returns_may_be_written_to(bias: bool) -> None:
    """As AdaLoRA, GraLoRA, C3A and others of PEFT do with the output of the layer under them."""
    layer, x = FourBitLinear(48, 24, bias, FourBitConfig("int4", "int4", group_size=16)), torch.randn(2, 5, 48)

    def written_to(x: torch.Tensor) -> torch.Tensor:
        y = layer(x)
        y += 1
        return y

    torch.testing.assert_close(written_to(x), layer(x) + 1)
    written_to(x).square().sum().backward()
    ours, layer.weight.grad = layer.weight.grad, None
    (layer(x) + 1).square().sum().backward()
    torch.testing.assert_close(ours, layer.weight.grad)


def test_without_formats_it_is_an_ordinary_linear_layer() -> None:
    layer, x = make(FourBitConfig(**PLAIN))
    plain = nn.Linear(48, 24)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["int4", "int4_asym", "fp4_e2m1", "mxfp4", "nvfp4"])
def test_no_weight_of_the_product_is_off_the_grid(name: str, dtype: torch.dtype) -> None:
    layer, _ = make(FourBitConfig(weight=name, group_size=32), width=128, dtype=dtype)
    from hf_stablespam.quant.formats.quantizer import quantize

    parts = quantize(layer.weight, layer.recipe.weight)
    zero = 0 if parts.zero is None else parts.zero
    grid = ((parts.codes - zero) * parts.scale).to(dtype).flatten(-2)
    assert int((layer.quantized_weight() != grid).sum()) == 0
    assert layer.quantized_weight().dtype == dtype


@pytest.mark.parametrize("config", [FourBitConfig(), FourBitConfig.nvfp4(gradient=True)], ids=["int4", "nvfp4"])
def test_autocast_quantizes_the_master_weight_and_returns_its_gradient_in_float32(config: FourBitConfig) -> None:
    layer, x = make(config, width=128)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == x.grad.dtype == layer.bias.grad.dtype == torch.float32
    reference = copy.deepcopy(layer).to(torch.bfloat16)
    with torch.no_grad():
        reference.weight.copy_(layer.quantized_weight(torch.bfloat16))
    assert torch.isfinite(layer.weight.grad).all()


def test_a_frozen_weight_gets_no_gradient_and_keeps_no_input() -> None:
    layer, x = make(FourBitConfig())
    layer.weight.requires_grad_(False)
    y = layer(x)
    assert y.grad_fn.saved_tensors[0] is None
    y.sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None


def through_data(layer: FourBitLinear) -> None:
    layer.weight.data.mul_(-1)


def through_numpy(layer: FourBitLinear) -> None:
    layer.weight.detach().numpy()[:] *= 2


def rows_in_another_order(layer: FourBitLinear) -> None:
    layer.weight.data.copy_(layer.weight.data.flip(0))


def one_number(layer: FourBitLinear) -> None:
    layer.weight.data.view(-1)[5] += 1


def under_no_grad(layer: FourBitLinear) -> None:
    with torch.no_grad():
        layer.weight.copy_(layer.weight * 2)


def new_storage(layer: FourBitLinear) -> None:
    layer.weight.data = layer.weight.data * 2


def new_parameter(layer: FourBitLinear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() * 2)


def state_dict(layer: FourBitLinear) -> None:
    layer.load_state_dict({key: value * 2 for key, value in layer.state_dict().items()})


def optimizer_without_a_trace(layer: FourBitLinear) -> None:
    class Careless(torch.optim.Optimizer):
        def step(self, closure=None):
            for parameter in self.param_groups[0]["params"]:
                parameter.data.mul_(2)

    Careless(layer.parameters(), {}).step()


TRACED = [under_no_grad, new_storage, new_parameter, state_dict]
WITHOUT_TRACE = [through_data, through_numpy, rows_in_another_order, one_number, optimizer_without_a_trace]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("write", [*TRACED, *WITHOUT_TRACE], ids=lambda write: write.__name__)
def test_the_weight_used_is_that_of_the_present_parameter(write, frozen: bool) -> None:
    layer, x = make(FourBitConfig())
    layer.requires_grad_(not frozen)
    before = layer(x)
    write(layer)
    fresh = FourBitLinear(48, 24)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), fresh(x))
    assert not torch.equal(layer(x), before)


def test_functional_calls_with_other_weights_use_them() -> None:
    """Their temporary tensors get each other's address."""
    layer, x = make(FourBitConfig())
    with torch.no_grad():
        for factor in range(1, 30):
            got = torch.func.functional_call(layer, {"weight": layer.weight * factor, "bias": layer.bias}, (x,))
            expected = torch.nn.functional.linear(
                layer.recipe.activation(x), layer.recipe.weight(layer.weight * factor), layer.bias
            )
            assert torch.equal(got, expected)


def test_a_partner_that_is_written_to_changes_the_shared_scale() -> None:
    first, x = make(FourBitConfig.nvfp4())
    second, _ = make(FourBitConfig.nvfp4())
    first.scale_partners = second.scale_partners = (first, second)
    before = first(x)
    second.weight.data[0, 0] = 30.0
    assert not torch.equal(first(x), before)
    assert torch.equal(first.quantized_weight(), first.recipe.weight(first.weight, torch.tensor(30.0)))


class TestRoundings:
    """How often the weight is rounded."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        original = linear_module.quantize_weight

        def counting(weight, *others):
            seen.append(weight)
            return original(weight, *others)

        monkeypatch.setattr(linear_module, "quantize_weight", counting)
        monkeypatch.setattr(matmul_module, "quantize_weight", counting)
        return seen

    def test_once_for_forward_and_backward_pass(self, calls: list) -> None:
        layer, x = make(FourBitConfig())
        for passes in range(1, 4):
            layer(x).sum().backward()
            assert len(calls) == passes

    def test_twice_where_nothing_of_its_size_is_to_be_kept(self, calls: list) -> None:
        layer, x = make(FourBitConfig(cache_weights=False))
        layer(x).sum().backward()
        assert len(calls) == 2

    def test_the_results_are_the_same(self) -> None:
        results = []
        for cache in (True, False):
            layer, x = make(FourBitConfig(cache_weights=cache))
            layer(x).square().sum().backward()
            results.append((x.grad, layer.weight.grad))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])

    def test_once_while_weights_are_said_to_be_fixed(self, calls: list) -> None:
        layer, x = make(FourBitConfig())
        expected = layer(x)
        with fixed_weights(layer):
            with fixed_weights(layer):
                assert torch.equal(layer(x), expected)
            with torch.no_grad():
                assert torch.equal(layer(x), expected)
            layer(x).sum().backward()
            assert len(calls) == 2
        assert layer._kept is None
        layer.weight.data.mul_(2)
        layer(x)
        assert len(calls) == 3

    @pytest.mark.parametrize("write", TRACED, ids=lambda write: write.__name__)
    def test_a_change_that_leaves_a_trace_is_noticed_even_then(self, write) -> None:
        layer, x = make(FourBitConfig())
        with fixed_weights(layer):
            layer(x)
            write(layer)
            result = layer(x)
        assert torch.equal(layer(x), result)

    def test_a_changed_partner_is_noticed_even_then(self) -> None:
        first, x = make(FourBitConfig.nvfp4())
        second, _ = make(FourBitConfig.nvfp4())
        first.scale_partners = second.scale_partners = (first, second)
        with fixed_weights(first):
            first(x)
            with torch.no_grad():
                second.weight[0, 0] = 20.0
            result = first(x)
        assert torch.equal(first(x), result)

    def test_an_error_ends_it(self) -> None:
        layer, x = make(FourBitConfig())
        layer(x)
        with pytest.raises(RuntimeError), fixed_weights(layer):
            layer(x[..., :-1])
        assert (layer._fixed, layer._kept) == (0, None)

    def test_one_weight_is_kept_at_most(self) -> None:
        layer, x = make(FourBitConfig())
        with fixed_weights(layer):
            layer(x)
            with torch.autocast("cpu", torch.bfloat16):
                layer(x)
            assert layer._kept[2].dtype == torch.bfloat16

    def test_a_weight_made_in_inference_mode_can_be_trained_with(self) -> None:
        layer, x = make(FourBitConfig())
        with fixed_weights(layer):
            with torch.inference_mode():
                layer(x)
            layer(x).sum().backward()
        assert layer.weight.grad is not None

    def test_copies_and_pickles_do_not_carry_it(self) -> None:
        layer, x = make(FourBitConfig())
        with fixed_weights(layer):
            expected = layer(x)
            twins = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
        for twin in twins:
            assert (twin._kept, twin._fixed) == (None, 0)
            assert torch.equal(twin(x), expected)


def test_integer_and_flat_weights_are_refused() -> None:
    plain = nn.Linear(8, 8)
    plain.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"weight must be floating-point to be trained in 4 bits, got torch.int8"):
        FourBitLinear.adopt(plain, FourBitConfig())
    flat = nn.Linear(8, 8)
    flat.weight = nn.Parameter(torch.zeros(64))
    with pytest.raises(ValueError, match=r"weight must be a matrix .* got shape \(64,\); flattened weights"):
        FourBitLinear.adopt(flat, FourBitConfig())


def test_it_says_what_it_is() -> None:
    layer, _ = make(FourBitConfig())
    assert "weight=int4, activation=int4, gradient=None" in repr(layer)
