"""Layers whose weight the model reads itself are found in its source, and stay in high precision."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

from hf_stablespam.quant import FourBitConfig, FourBitLinear, convert_to_4bit, restore_linear
from hf_stablespam.quant.convert import left_alone
from hf_stablespam.quant.direct_reads import directly_read
from hf_stablespam.quant.layers.linear import trained_uncalled

CONFIG = FourBitConfig(group_size=8)


class Reader(nn.Module):
    """Reads weights in every way that is a product, and in every way that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.local, self.helped, self.asked, self.started, self.called = (nn.Linear(8, 8) for _ in range(6))
        self.list = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.looped = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.below = nn.ModuleDict({"deep": nn.Linear(8, 8)})

    def start(self) -> None:
        nn.init.zeros_(self.started.weight)

    def help(self, x: Tensor) -> Tensor:
        return F.linear(x, self.helped.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.own.weight
        local = self.local
        x = self.help(x @ local.weight)
        x = x @ self.list[0].weight @ self.below.deep.weight
        for layer in self.looped:
            x = F.linear(x, layer.weight.t())
        if self.asked.weight is not None and isinstance(self.asked.weight, Tensor):
            x = x.to(self.asked.weight.dtype).to(self.asked.weight.device)[:, : self.asked.weight.shape[1]]
        return self.started(self.called(self.asked(x)))


READ = {"own", "local", "helped", "list.0", "list.1", "looped.0", "looped.1", "below.deep"}


def test_what_forward_reads_is_found_and_what_it_asks_or_calls_is_not() -> None:
    assert directly_read(Reader()) == dict.fromkeys(READ, "Reader")
    assert set(directly_read(nn.Sequential(Reader()))) == {f"0.{name}" for name in READ}


def test_a_subclass_is_read_with_its_own_methods() -> None:
    class Calls(Reader):
        def help(self, x: Tensor) -> Tensor:
            return self.helped(x)

    # A class inside of a function is not looked into; what it inherits is.
    assert set(directly_read(Calls())) == READ


@pytest.mark.parametrize(
    ("name", "read", "converted"),
    [
        ("Mamba", {"x_proj", "dt_proj", "out_proj"}, {"in_proj"}),
        ("FalconMamba", {"x_proj", "dt_proj", "out_proj"}, {"in_proj"}),
        ("Mamba2", {"out_proj"}, {"in_proj"}),
        ("Jamba", {"dt_proj"}, {"in_proj", "x_proj", "out_proj"}),
        ("Bamba", {"out_proj"}, {"in_proj"}),
        ("T5", set(), {"wi", "wo"}),
        ("Llama", set(), {"q_proj", "down_proj"}),
    ],
)
def test_families(name: str, read: set[str], converted: set[str]) -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 64}
    sizes |= {"d_model": 64, "d_ff": 64, "num_layers": 1, "num_heads": 4, "d_kv": 16} if name == "T5" else {}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4} if name not in ("T5", "Mamba", "FalconMamba") else {}
    sizes |= {"num_heads": 4, "head_dim": 32, "n_groups": 1, "state_size": 16, "expand": 2} if name == "Mamba2" else {}
    sizes |= {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1} if name == "Bamba" else {}
    sizes |= {"num_experts": 1, "pad_token_id": 0} if name == "Jamba" else {}
    config = getattr(tf, f"{name}Config")(**sizes)
    with torch.device("meta"):
        model = (tf.T5ForConditionalGeneration if name == "T5" else tf.AutoModelForCausalLM.from_config)(config)
    assert {path.split(".")[-1] for path in directly_read(model)} == read
    found = {
        path.split(".")[-1] for path, layer in convert_to_4bit(model).named_modules() if type(layer) is FourBitLinear
    }
    assert found >= converted
    assert not found & read


def test_they_are_left_alone_by_name_and_the_name_of_what_reads_them() -> None:
    model = convert_to_4bit(Reader(), CONFIG)
    four_bit = {name for name, module in model.named_modules() if isinstance(module, FourBitLinear)}
    assert four_bit == {"asked", "started", "called"}
    assert "own (Linear, whose weight Reader reads itself)" in left_alone(model)


def test_a_named_one_is_converted_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_stablespam"):
        convert_to_4bit(Reader(), FourBitConfig(group_size=8, target_modules=("own", "called")))
    (record,) = caplog.records
    assert "own, named in target_modules, is a layer whose weight Reader may read" in record.getMessage()


def test_torchs_encoder_computes_the_same_in_evaluation_as_in_training() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = convert_to_4bit(nn.Sequential(encoder, nn.Linear(8, 8)), CONFIG)
    x = torch.randn(2, 3, 8)
    trained = model.train()(x)
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), trained, atol=1e-6)  # the order of sums of PyTorch's own kernel


def test_layers_that_were_trained_and_never_called_are_known() -> None:
    model = convert_to_4bit(Reader(), FourBitConfig(group_size=8, target_modules=("own", "called", "asked")))
    model(torch.randn(2, 8)).sum().backward()
    assert trained_uncalled(model) == ["own"]
    tied = convert_to_4bit(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), CONFIG)
    tied[1].weight = tied[0].weight
    tied[0](torch.randn(2, 8)).sum().backward()
    assert trained_uncalled(tied) == []


def test_what_shares_its_weight_with_a_layer_that_is_left_alone_is_left_alone() -> None:
    model = Reader()
    model.called.weight = model.own.weight
    convert_to_4bit(model, CONFIG)
    assert type(model.called) is nn.Linear


def test_experts_of_unknown_form_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    class SomeExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 8, 8))

    with caplog.at_level(logging.WARNING, logger="hf_stablespam"):
        convert_to_4bit(nn.Sequential(nn.Linear(8, 8), SomeExperts()), CONFIG)
    assert "SomeExperts: the experts of this mixture are in a form that is not known here" in caplog.text


def test_hooks_of_accelerate_that_came_first_call_the_4_bit_layer() -> None:
    """As ``device_map`` puts them there where a model is spread or offloaded: on the instance, with its old forward."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 8)), torch.randn(3, 32)
    plain = model(x)
    add_hook_to_module(model[0], ModelHook())
    convert_to_4bit(model, FourBitConfig("int4", None, group_size=32))
    expected = F.linear(x, model[0].quantized_weight(), model[0].bias)
    assert torch.equal(model(x), expected)
    assert not torch.equal(model(x), plain)
    remove_hook_from_module(model[0])  # leaves a forward on the instance
    assert torch.equal(model(x), expected)
    assert torch.equal(restore_linear(model)(x), plain)


def test_hooks_of_accelerate_under_an_adapter_stay() -> None:
    """The adapter is tried with something else in the layer's place, and the layer is what it was."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
    from peft import LoraConfig, get_peft_model

    class Doubles(ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return output * 2

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 8)), torch.randn(3, 32)
    layer = model[0]
    add_hook_to_module(layer, Doubles())
    adapted = get_peft_model(model, LoraConfig(target_modules=["0"]))
    convert_to_4bit(adapted, FourBitConfig("int4", None, group_size=32))
    expected = F.linear(x, layer.quantized_weight(), layer.bias)
    assert torch.equal(adapted(x), expected * 2)
    remove_hook_from_module(layer)
    assert torch.equal(adapted(x), expected)


def test_a_forward_that_somebody_put_on_the_layer_must_call_the_class() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    layer = model[0]
    layer.forward = lambda x: type(layer).forward(layer, x) * 2
    assert type(convert_to_4bit(model, CONFIG)[0]) is FourBitLinear
    model = nn.Sequential(nn.Linear(8, 8))
    own = model[0]
    own.forward = lambda x: F.linear(x, own.weight, own.bias)
    with pytest.raises(ValueError, match="the layer '0' has a forward of its own, which does not call that of its cla"):
        convert_to_4bit(model, CONFIG)
    assert type(own) is nn.Linear
