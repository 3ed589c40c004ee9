"""FourBitLinear: the three products, their gradients, dtypes, autocast, and the kept weight."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from hf_stablespam.quant import FourBitConfig, FourBitLinear
from hf_stablespam.quant import linear as linear_module

PLAIN = {"weight": None, "activation": None}


def make(
    config: FourBitConfig, width: int = 48, dtype: torch.dtype = torch.float32
) -> tuple[FourBitLinear, torch.Tensor]:
    torch.manual_seed(0)
    layer = FourBitLinear(width, 24, config=config, dtype=dtype)
    return layer, torch.randn(2, 5, width, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("name", ["int4", "int4_asym", "fp4_e1m2", "fp4_e1m2_official", "fp4_e2m1", "mxfp4", "nvfp4"])
def test_products_are_those_of_the_quantized_operands(name: str) -> None:
    config = FourBitConfig(weight=name, activation=name, gradient=name, group_size=32, gradient_rounding="nearest")
    if name == "int4_asym":
        config = FourBitConfig(weight=name, activation="int4", gradient=None, group_size=32)
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


def test_without_formats_it_is_an_ordinary_linear_layer() -> None:
    layer, x = make(FourBitConfig(**PLAIN))
    plain = nn.Linear(48, 24)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["int4", "int4_asym", "fp4_e2m1", "mxfp4", "nvfp4"])
def test_no_weight_of_the_product_is_off_the_grid(name: str, dtype: torch.dtype) -> None:
    layer, _ = make(FourBitConfig(weight=name, group_size=32), width=128, dtype=dtype)
    from hf_stablespam.quant.quantizer import quantize

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


class TestKeptWeight:
    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        original = linear_module.quantize_weight

        def counting(weight, *others):
            seen.append(weight)
            return original(weight, *others)

        monkeypatch.setattr(linear_module, "quantize_weight", counting)
        return seen

    def test_the_weight_is_quantized_once_per_optimizer_step(self, calls: list) -> None:
        layer, x = make(FourBitConfig())
        optimizer = torch.optim.AdamW(layer.parameters())
        for step in range(3):
            for _ in range(4):
                layer(x).sum().backward()
            with torch.no_grad():
                layer(x)
            assert len(calls) == step + 1
            optimizer.step()

    def test_an_optimizer_that_writes_to_data_is_noticed(self, calls: list) -> None:
        class Careless(torch.optim.Optimizer):
            def step(self, closure=None):
                for parameter in self.param_groups[0]["params"]:
                    parameter.data.mul_(2)

        layer, x = make(FourBitConfig())
        before = layer(x)
        Careless(layer.parameters(), {}).step()
        assert not torch.equal(layer(x), before)

    @pytest.mark.parametrize("change", ["load", "copy", "swap", "dtype"])
    def test_every_other_change_of_the_weight_is_noticed(self, change: str, calls: list) -> None:
        layer, x = make(FourBitConfig())
        layer(x)
        if change == "load":
            layer.load_state_dict({key: value * 2 for key, value in layer.state_dict().items()})
        elif change == "copy":
            with torch.no_grad():
                layer.weight.copy_(layer.weight * 2)
        elif change == "swap":
            layer.weight.data = layer.weight.data * 2
        else:
            layer, x = layer.double(), x.double()
        result = layer(x)
        assert len(calls) == 2
        layer.forget_weight()
        assert torch.equal(layer(x), result)

    def test_it_can_be_switched_off(self, calls: list) -> None:
        layer, x = make(FourBitConfig(cache_weights=False))
        layer(x).sum().backward()
        layer(x)
        assert layer._kept is None
        assert calls == []  # made inside of the product, forward and backward

    def test_without_it_the_results_are_the_same(self) -> None:
        results = []
        for cache in (True, False):
            layer, x = make(FourBitConfig(cache_weights=cache))
            layer(x).square().sum().backward()
            results.append((x.grad, layer.weight.grad))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])

    def test_memory_is_bounded_by_one_weight(self) -> None:
        layer, x = make(FourBitConfig())
        layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        assert layer._kept[1].dtype == torch.bfloat16

    def test_a_weight_made_in_inference_mode_can_be_trained_with(self) -> None:
        layer, x = make(FourBitConfig())
        with torch.inference_mode():
            layer(x)
        layer(x).sum().backward()
        assert layer.weight.grad is not None

    def test_copies_and_pickles_do_not_carry_it(self) -> None:
        layer, x = make(FourBitConfig())
        expected = layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert twin._kept is None
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
