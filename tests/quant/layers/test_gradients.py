"""Quantized output gradients: stochastic rounding and the random Hadamard transform."""

from __future__ import annotations

import pytest
import torch

from hf_stablespam.quant import FourBitConfig, FourBitLinear, hadamard
from hf_stablespam.quant.formats.hadamard import random_signs


def hadamard_transform(x: torch.Tensor, size: int, seed: int = 0, inverse: bool = False) -> torch.Tensor:
    return hadamard.hadamard_transform(x, random_signs(size, seed), inverse)


RECIPES = {
    "plain": FourBitConfig(weight="int4", activation="int4", gradient="int4", group_size=16, activation_outliers=0),
    "weight_grad": FourBitConfig.nvfp4(gradient=True),
    "all": FourBitConfig(weight="nvfp4", activation="nvfp4", gradient="nvfp4", hadamard="all", hadamard_size=32),
}


@pytest.mark.parametrize("name", ["int4", "fp4_e1m2", "fp4_e2m1"])
def test_stochastic_rounding_is_unbiased(name: str) -> None:
    quantizer = FourBitConfig(gradient=name, group_size=32).quantizer("gradient")
    x = torch.randn(4, 32)
    count = 4000
    mean = quantizer(x.repeat(count, 1)).unflatten(0, (count, 4)).mean(0)
    # The largest step is a third of a group's maximum; its rounding error has at most half of that as deviation.
    sigma = x.abs().amax(-1, keepdim=True) / 3 / 2 / count**0.5
    assert ((mean - x).abs() < 5 * sigma).all()


def test_stochastic_rounding_gives_both_neighbours_and_nothing_else() -> None:
    quantizer = FourBitConfig(gradient="fp4_e2m1", group_size=4).quantizer("gradient")
    x = torch.tensor([[6.0, 2.2, -0.7, 5.0]]).repeat(2000, 1)
    values = quantizer(x)
    for column, expected in enumerate(([6.0], [2.0, 3.0], [-1.0, -0.5], [4.0, 6.0])):
        assert values[:, column].unique().tolist() == pytest.approx(expected)
    assert values[:, 1].mean() == pytest.approx(2.2, abs=0.05)


def test_stochastic_rounding_follows_the_global_seed() -> None:
    quantizer = FourBitConfig(gradient="int4").quantizer("gradient")
    x = torch.randn(8, 128)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(quantizer(x))
    assert torch.equal(*results)
    assert not torch.equal(quantizer(x), results[0])


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_the_transform_is_orthogonal_and_leaves_the_remainder(size: int) -> None:
    x = torch.randn(3, size * 2 + 5, dtype=torch.float64)
    y = hadamard_transform(x, size, seed=1)
    torch.testing.assert_close(y @ y.T, x @ x.T)
    torch.testing.assert_close(hadamard_transform(y, size, seed=1, inverse=True), x)
    assert torch.equal(y[:, size * 2 :], x[:, size * 2 :])
    spike = torch.zeros(1, size)
    spike[0, 3] = 8.0
    assert hadamard_transform(spike, size).abs().max() == pytest.approx(8 / size**0.5)
    assert not torch.equal(y, hadamard_transform(x, size, seed=0))


@pytest.mark.parametrize("where", [None, "weight_grad", "all"])
def test_without_formats_the_transforms_cancel(where: str | None) -> None:
    # A gradient format switches the transform on; the high-precision operands show that it cancels.
    layer = FourBitLinear(40, 24, config=FourBitConfig(None, None, "int4", hadamard=where), dtype=torch.float64)
    layer.recipe = layer.recipe._replace(gradient=lambda x, amax: x)
    x = torch.randn(50, 40, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(50, 24, dtype=torch.float64)
    y = layer(x)
    y.backward(upstream)
    torch.testing.assert_close(y, x @ layer.weight.T + layer.bias)
    torch.testing.assert_close(x.grad, upstream @ layer.weight)
    torch.testing.assert_close(layer.weight.grad, upstream.T @ x)


def test_the_transformed_weight_gradient_is_the_product_of_the_transformed_quantized_operands() -> None:
    config = FourBitConfig("int4", "int4", "int4", hadamard="weight_grad", gradient_rounding="nearest", group_size=32)
    layer = FourBitLinear(40, 24, config=config)
    x, upstream = torch.randn(50, 40), torch.randn(50, 24)
    layer(x).backward(upstream)
    activation, gradient = config.quantizer("activation"), config.quantizer("gradient")
    left = gradient(hadamard_transform(upstream.T, 16))
    right = activation(hadamard_transform(x.T, 16))
    torch.testing.assert_close(layer.weight.grad, left @ right.T)


def test_all_three_products_are_transformed() -> None:
    config = FourBitConfig("int4", "int4", "int4", hadamard="all", gradient_rounding="nearest", group_size=32)
    layer = FourBitLinear(48, 32, bias=False, config=config)
    x, upstream = torch.randn(64, 48, requires_grad=True), torch.randn(64, 32)
    y = layer(x)
    y.backward(upstream)
    weight, activation, gradient = (config.quantizer(name) for name in ("weight", "activation", "gradient"))

    def product(left, left_quantizer, right, right_quantizer):
        left, right = hadamard_transform(left, 16), hadamard_transform(right, 16)
        return left_quantizer(left) @ right_quantizer(right).T

    w = layer.weight.detach()
    torch.testing.assert_close(y, product(x.detach(), activation, w, weight))
    torch.testing.assert_close(x.grad, product(upstream, gradient, w.T, weight))
    torch.testing.assert_close(layer.weight.grad, product(upstream.T, gradient, x.detach().T, activation))


def test_a_transform_without_a_gradient_format_is_that_of_the_forward_operands() -> None:
    layer = FourBitLinear(48, 32, bias=False, config=FourBitConfig("int4", "int4", hadamard="all", group_size=32))
    x, upstream = torch.randn(64, 48, requires_grad=True), torch.randn(64, 32)
    layer(x).backward(upstream)
    w_q = hadamard_transform(layer.quantized_weight(), 16, inverse=True)
    x_q = hadamard_transform(layer.recipe.activation(hadamard_transform(x, 16)), 16, inverse=True)
    torch.testing.assert_close(x.grad, upstream @ w_q)
    torch.testing.assert_close(layer.weight.grad, upstream.T @ x_q.detach())


@pytest.mark.parametrize("recipe", RECIPES)
def test_quantized_gradients_point_where_the_exact_ones_do(recipe: str) -> None:
    torch.manual_seed(1)
    layer = FourBitLinear(128, 96, config=RECIPES[recipe])
    x = torch.randn(4, 64, 128, requires_grad=True)
    upstream = torch.randn(4, 64, 96)
    layer(x).backward(upstream)
    exact_x = (upstream @ layer.weight).detach()
    exact_weight = (upstream.flatten(0, 1).T @ x.flatten(0, 1)).detach()
    for got, exact in ((x.grad, exact_x), (layer.weight.grad, exact_weight)):
        assert torch.nn.functional.cosine_similarity(got.flatten(), exact.flatten(), dim=0) > 0.97
