"""Mixtures of experts in 4 bits: transformers' implementations with rounded operands, against explicit products."""

import copy
import gc
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_stablespam import FourBitConfig, StableSPAM, convert_to_4bit, restore_linear
from hf_stablespam.quant.formats.number_formats import FORMATS as WEIGHT_FORMATS
from hf_stablespam.quant.layers.expert_weights import quantize_experts, used_experts
from hf_stablespam.quant.layers.experts import FourBitExperts, weight_names
from hf_stablespam.quant.layers.linear import fixed_weights
from hf_stablespam.quant.layers.matmul import Recipe
from hf_stablespam.quant.parameter_counts import parameter_counts
from tests.quant.layers.mixtures import (
    FAMILIES,
    FORMATS,
    IMPLEMENTATIONS,
    TOKENS,
    experts_of,
    mixture,
    need_shared_form,
)

need_shared_form()


class Rounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rounded):
        return rounded.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def reference(experts: nn.Module, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, config: FourBitConfig):
    """Token by token, expert by expert, with rounded operands and the gradient straight through; no gradient format."""

    def rounded(tensor: torch.Tensor, operand: str, *amax: torch.Tensor) -> torch.Tensor:
        quantizer = config.quantizer(operand)
        return tensor if quantizer is None else Rounding.apply(tensor, quantizer(tensor.detach(), *amax))

    matrices = {}
    for name in weight_names(experts):
        master = getattr(experts, name)
        rows = master.transpose(1, 2) if experts.is_transposed else master
        matrices[name] = [rounded(rows[e], "weight") for e in range(experts.num_experts)]
    biases = {name: getattr(experts, f"{name}_bias", None) for name in matrices}
    x = rounded(x, "activation")
    first, second = matrices
    pairs = [(token, place) for token in range(len(x)) for place in range(index.shape[1])]
    gated = []
    for token, place in pairs:
        e = int(index[token, place])
        up = matrices[first][e] @ x[token] + (0 if biases[first] is None else biases[first][e])
        gated.append(experts._apply_gate(up))
    gated = rounded(torch.stack(gated), "activation")
    y = [torch.zeros_like(row) for row in x]
    for (token, place), row in zip(pairs, gated, strict=True):
        e = int(index[token, place])
        down = matrices[second][e] @ row + (0 if biases[second] is None else biases[second][e])
        y[token] = y[token] + down * weights[token, place]
    return torch.stack(y)


def routed(experts: nn.Module, tokens: int = 10) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs of which expert 3 gets no token."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, 32, generator=generator)
    index = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(tokens)])
    return x.requires_grad_(), index, torch.rand(tokens, 2, generator=generator)


def gradients(experts: nn.Module, y: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x, *(getattr(experts, name) for name in weight_names(experts))]
    return list(torch.autograd.grad(y.square().sum(), leaves))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", [name for name in FORMATS if "gradients" not in name])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_rounded_operands(family: str, name: str, implementation: str) -> None:
    config = FORMATS[name]
    model = mixture(family, implementation)
    experts = experts_of(model)
    x, index, weights = routed(experts)
    expected = reference(experts, x, index, weights, config)
    expected_gradients = gradients(experts, expected, x)
    convert_to_4bit(model, config)
    y = experts(x, index, weights)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients(experts, y, x), expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert gradients(experts, experts(x, index, weights), x)[1][3].count_nonzero() == 0  # it got no token


@pytest.mark.parametrize("family", FAMILIES)
def test_rounded_gradients_are_those_of_a_linear_layer(family: str) -> None:
    """All tokens to one expert: two `FourBitLinear`s around the gate give the same, but for the bias."""
    config = FourBitConfig(weight="mxfp4", activation="mxfp4", gradient="mxfp4", gradient_rounding="nearest")
    model = mixture(family)
    experts = experts_of(model)
    masters = [getattr(experts, name).detach()[1] for name in weight_names(experts)]
    layers = []
    for name, master in zip(weight_names(experts), masters, strict=True):
        matrix = master.t() if experts.is_transposed else master
        layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=experts.has_bias)
        layer.weight.data.copy_(matrix)
        if experts.has_bias:
            layer.bias.data.copy_(getattr(experts, f"{name}_bias")[1])
        layers.append(convert_to_4bit(layer, config))
    convert_to_4bit(model, config)
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = experts(x, torch.ones(9, 1, dtype=torch.long), torch.ones(9, 1))
    expected = layers[1](experts._apply_gate(layers[0](x)))
    torch.testing.assert_close(y, expected)
    ours, first, second = gradients(experts, y, x)
    theirs = torch.autograd.grad(expected.square().sum(), [x, layers[0].weight, layers[1].weight])
    for one, other in zip((ours, first[1], second[1]), theirs, strict=True):
        turned = one.t() if experts.is_transposed and one is not ours else one
        torch.testing.assert_close(turned, other)


@pytest.mark.parametrize("name", FORMATS)
def test_a_model_trains_and_is_restored(name: str) -> None:
    model = mixture()
    keys, ids = list(model.state_dict()), [id(parameter) for parameter in model.parameters()]
    original = type(experts_of(model))
    convert_to_4bit(model, FORMATS[name])
    experts = experts_of(model)
    assert isinstance(experts, FourBitExperts)
    assert isinstance(experts, original)
    assert (list(model.state_dict()), [id(parameter) for parameter in model.parameters()]) == (keys, ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    restore_linear(model)
    assert type(experts_of(model)) is original
    assert not [name for name in vars(experts_of(model)) if name in ("four_bit", "recipe", "_kept", "_fixed")]


def test_an_expert_that_never_got_a_token_stays_where_it_is() -> None:
    """Without weight decay, under Stable-SPAM: a slice of zeros in a gradient that is scaled and clipped as a whole."""
    experts = experts_of(convert_to_4bit(mixture(), FORMATS["int4"]))
    before = experts.down_proj.detach().clone()
    optimizer = StableSPAM(experts.parameters(), lr=1e-2, weight_decay=0.0, reset_interval=2)
    for step in range(5):
        x, index, weights = routed(experts)
        (experts(x, index, weights).sum() * 100**step).backward()  # spikes
        optimizer.step()
        optimizer.zero_grad()
    moved = (experts.down_proj != before).any(-1).any(-1)
    assert moved.tolist() == [True, True, True, False]


def test_routers_stay_and_experts_can_be_excluded() -> None:
    model = convert_to_4bit(mixture(), FourBitConfig(group_size=32, modules_to_not_convert=("lm_head", "experts")))
    assert not isinstance(experts_of(model), FourBitExperts)
    inside, _ = parameter_counts(model)
    assert set(inside) == {"Linear"}
    model = convert_to_4bit(mixture(), FourBitConfig(group_size=32))
    inside, outside = parameter_counts(model)
    assert inside == {"Qwen3MoeExperts": 4 * 3 * 32 * 32, "Linear": 4 * 32 * 32}
    assert outside["Qwen3MoeTopKRouter"] == 4 * 32
    assert sum(inside.values()) + sum(outside.values()) == model.num_parameters()


def test_copies_pickles_and_checkpoints(tmp_path) -> None:
    model = convert_to_4bit(mixture(), FourBitConfig(group_size=32)).eval()
    logits = model(TOKENS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(experts_of(other)) is type(experts_of(model))
        assert torch.equal(other(TOKENS).logits, logits)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    again.set_experts_implementation("grouped_mm")
    assert not isinstance(experts_of(again), FourBitExperts)
    assert torch.equal(convert_to_4bit(again, FourBitConfig(group_size=32))(TOKENS).logits, logits)


def test_a_weight_that_changes_is_seen_and_fixed_weights_are_rounded_once() -> None:
    model = convert_to_4bit(mixture(), FourBitConfig(group_size=32)).eval()
    experts = experts_of(model)
    before = model(TOKENS).logits
    with torch.no_grad(), fixed_weights(model):
        assert torch.equal(model(TOKENS).logits, before)
        kept = {name: rounded.data_ptr() for (name, _), (_, rounded) in experts._kept.items()}
        assert set(kept) == {"gate_up_proj", "down_proj"}
        model(TOKENS)
        assert {name: rounded.data_ptr() for (name, _), (_, rounded) in experts._kept.items()} == kept
    assert not experts._kept
    experts.down_proj.data.mul_(2)
    assert not torch.equal(model(TOKENS).logits, before)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_checkpointing_autocast_and_nothing_kept_give_the_same(implementation: str) -> None:
    results = []
    for cache_weights, checkpointing in ((True, False), (False, False), (True, True)):
        model = mixture(implementation=implementation)
        convert_to_4bit(model, FourBitConfig(group_size=32, cache_weights=cache_weights)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in experts_of(model).parameters())])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("cache_weights", [True, False])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_without_a_token_are_not_rounded(monkeypatch, implementation: str, cache_weights: bool) -> None:
    """Nor are they made again for the backward pass."""
    from hf_stablespam.quant.layers import expert_weights, matmul
    from hf_stablespam.quant.layers import experts as layer

    model = convert_to_4bit(mixture(implementation=implementation), FourBitConfig(cache_weights=cache_weights))
    experts, rounded = experts_of(model), set()
    masters = [row.data_ptr() for name in weight_names(experts) for row in getattr(experts, name)]
    original = matmul.quantize_weight
    for module in (layer, expert_weights, matmul):
        monkeypatch.setattr(module, "quantize_weight", lambda *a: rounded.add(a[0].data_ptr()) or original(*a))
    x, index, weights = routed(experts)
    experts(x, index, weights).sum().backward()
    assert rounded == {masters[place] for place in (0, 1, 2, 4, 5, 6)}  # three of four, of two weights


@pytest.mark.parametrize("cache_weights", [True, False])
def test_what_is_saved_for_the_backward_pass(cache_weights: bool) -> None:
    """A rounded copy of the weights, or nothing of their size."""
    model = convert_to_4bit(mixture(), FourBitConfig(group_size=32, activation=None, cache_weights=cache_weights))
    experts, saved = experts_of(model), set()
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        if tensor.numel() >= experts.down_proj.numel() and tensor.untyped_storage().data_ptr() not in known:
            saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    x, index, weights = routed(experts, tokens=2)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = experts(x, index, weights)
    assert len(saved) == (2 if cache_weights else 0)
    y = experts(x, index, weights)
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
    alive = [one for one in tensors if one.shape == experts.down_proj.shape and one.data_ptr() not in known]
    assert bool(alive) is cache_weights, "nor does anything else keep it until then"
    y.sum().backward()


ROUNDINGS = [
    *({"weight": name, "group_size": 32} for name in WEIGHT_FORMATS),
    *({"weight": name, "group_size": 32, "weight_outliers": 2} for name in ("int4", "mxfp4", "nvfp4")),
    {"weight": "nvfp4", "four_over_six": True},
    {"weight": "nvfp4", "weight_block": "2d"},
    {"weight": "nvfp4", "hadamard": "all"},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", ROUNDINGS, ids=str)
def test_all_at_once_are_what_each_expert_is_by_itself(monkeypatch, options: dict, dtype: torch.dtype) -> None:
    """As a GPU and a compiled graph round them; exports, and a CPU, go expert by expert."""
    recipe = Recipe.of(FourBitConfig(activation=None, **options))
    for seed in range(20):
        weight = torch.randn(16, 8, 64, generator=torch.Generator().manual_seed(seed)).mul_(0.02).to(dtype)
        if seed == 0:
            weight[3, 2, 1] = torch.inf
        monkeypatch.setattr("torch.compiler.is_compiling", lambda: False)
        alone = quantize_experts(weight, recipe, torch.float32, transposed=False)
        monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
        at_once = quantize_experts(weight, recipe, torch.float32, transposed=False)
        assert torch.equal(at_once.nan_to_num(-7.0), alone.nan_to_num(-7.0)), seed


def test_compiled_without_a_graph_break() -> None:
    experts = experts_of(convert_to_4bit(mixture(), FORMATS["nvfp4"]))
    x, index, weights = routed(experts)
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, index, weights), experts(x, index, weights))


def test_an_implementation_that_would_leave_activations_unrounded_is_refused() -> None:
    model = mixture()
    model.config._experts_implementation = "sonicmoe"
    experts = experts_of(convert_to_4bit(model, FourBitConfig(group_size=32)))
    experts.config._experts_implementation = "sonicmoe"
    with pytest.raises(ValueError, match=r"'eager', 'batched_mm' or 'grouped_mm' .*'sonicmoe'"):
        experts(*routed(experts))


def test_weights_that_are_quantized_already_are_refused() -> None:
    model = mixture()
    experts = experts_of(model)
    experts.down_proj = nn.Parameter(torch.zeros(4, 32, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"down_proj of Qwen3MoeExperts must be floating-point .*torch.int8"):
        convert_to_4bit(model, FourBitConfig(group_size=32))


@pytest.mark.parametrize("name", ["int4", "nvfp4 with gradients"])
@pytest.mark.parametrize("removed", [False, True])
def test_experts_under_hooks_of_accelerate_are_in_4_bits(removed: bool, name: str) -> None:
    """Hooks leave a forward on the module itself, even when they are taken away again."""
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    config = replace(FORMATS[name], target_modules=("experts",))
    plain, expected = mixture().eval(), convert_to_4bit(mixture(), config).eval()(TOKENS).logits
    before = plain(TOKENS).logits
    model = mixture().eval()
    hooks.attach_execution_device_hook(model, "cpu")
    if removed:
        hooks.remove_hook_from_submodules(model)
    convert_to_4bit(model, config)
    assert torch.equal(model(TOKENS).logits, expected)
    assert not torch.equal(expected, before)
    restore_linear(model)
    assert torch.equal(model(TOKENS).logits, before)
    hooks.remove_hook_from_submodules(model)
    assert torch.equal(model(TOKENS).logits, before)


def test_experts_whose_forward_was_replaced_are_refused() -> None:
    model = mixture()
    original = type(experts_of(model)).forward
    experts_of(model).forward = lambda *args: original(experts_of(model), *args)
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.experts' has a forward of its own, which does not call"):
        convert_to_4bit(model, FourBitConfig(group_size=32))


@pytest.mark.parametrize("convert_first", [True, False])
def test_lora_on_the_experts_parameters_is_rounded_with_them(convert_first: bool) -> None:
    """PEFT's `target_parameters`: the forward pass uses Q(W + ΔW), so that merging changes nothing."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = FourBitConfig(group_size=32)
    lora = peft.LoraConfig(r=4, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    model = mixture()
    if convert_first:
        convert_to_4bit(model, config)
    adapted = peft.get_peft_model(model, lora)
    if not convert_first:
        convert_to_4bit(adapted, config)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    adapted.eval()
    logits = adapted(TOKENS).logits
    loss = adapted(TOKENS, labels=TOKENS).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in adapted.named_parameters() if "lora_B" in n)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(TOKENS).logits, logits, rtol=0, atol=1e-5)


def test_for_places_of_experts_on_other_devices_the_last_one_is_rounded():
    """`batched_mm` reads it for them: memory that nobody wrote, times a weight of zero, may be nan."""
    assert used_experts(torch.tensor([[0, 4], [1, 4]]), 4) == [0, 1, 3]
    assert used_experts(torch.tensor([[2, 0]]), 4) == [0, 2]


def test_an_implementation_of_somebody_else_finds_every_expert(monkeypatch):
    experts = experts_of(convert_to_4bit(mixture("qwen3_moe"), FORMATS["int4 weights"]))
    seen = {}
    monkeypatch.setattr(experts.config, "_experts_implementation_internal", "theirs", raising=False)
    monkeypatch.setattr(
        experts.original_class,
        "forward",
        lambda stand_in, x, index, weights: seen.update(down=stand_in.down_proj.detach().clone()) or x,
    )
    experts(torch.randn(6, 32), torch.zeros(6, 2, dtype=torch.long), torch.ones(6, 2))
    assert torch.equal(seen["down"], experts.quantized("down_proj"))
