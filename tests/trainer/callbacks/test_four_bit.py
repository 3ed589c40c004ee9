"""FourBitCallback in the Trainer."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_stablespam.quant import FourBitConfig, FourBitLinear, convert_to_4bit
from hf_stablespam.trainer.callbacks.four_bit import FourBitCallback
from hf_stablespam.trainer.export_checkpoint import export_checkpoint
from hf_stablespam.trainer.export_command import main as export_main


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    )


class Data(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict:
        ids = torch.randint(0, 64, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def arguments(path: Path, save: bool = False) -> TrainingArguments:
    return TrainingArguments(
        str(path),
        max_steps=3,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        save_strategy="steps" if save else "no",
        save_steps=3,
        disable_tqdm=True,
        max_grad_norm=0.0,
    )


def test_the_model_is_converted_at_once_and_trains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny()
    keys, before = list(model.state_dict()), model.model.layers[0].mlp.up_proj.weight.detach().clone()
    with caplog.at_level(logging.INFO, logger="hf_stablespam"):
        trainer = Trainer(model, arguments(tmp_path), train_dataset=Data(), callbacks=[FourBitCallback()])
    assert isinstance(model.model.layers[0].mlp.up_proj, FourBitLinear)
    assert type(model.lm_head) is torch.nn.Linear
    trainer.train()
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    assert list(model.state_dict()) == keys
    lines = [record.getMessage() for record in caplog.records if "4-bit training" in record.getMessage()]
    assert len(lines) == 1
    assert "converted 14 linear layers" in lines[0]
    assert "lm_head (Linear)" in lines[0]


def test_a_model_made_by_model_init_is_converted_when_training_begins(tmp_path: Path) -> None:
    trainer = Trainer(
        model_init=tiny,
        args=arguments(tmp_path),
        train_dataset=Data(),
        callbacks=[FourBitCallback(FourBitConfig.nvfp4())],
    )
    first = trainer.model
    trainer.train()
    assert trainer.model is not first
    assert isinstance(trainer.model.model.layers[1].self_attn.q_proj, FourBitLinear)


def test_saved_models_are_ordinary_checkpoints(tmp_path: Path) -> None:
    trainer = Trainer(tiny(), arguments(tmp_path), train_dataset=Data(), callbacks=[FourBitCallback()])
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(plain.state_dict()[key], value)
    assert FourBitConfig.from_dict(plain.config.four_bit_training) == FourBitConfig()


def test_a_model_without_linear_layers_is_refused_before_training(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(4, 4))
    with pytest.raises(ValueError, match="no layer to convert to 4 bits"):
        Trainer(model, arguments(tmp_path), train_dataset=Data(), callbacks=[FourBitCallback()])


class TestExport:
    @pytest.fixture
    def trained(self, tmp_path: Path) -> Trainer:
        pytest.importorskip("compressed_tensors", reason="export needs it; install the extra 'export'")
        config = FourBitConfig(activation=None, group_size=16)
        args = arguments(tmp_path / "run", save=True)
        trainer = Trainer(tiny(), args, train_dataset=Data(), callbacks=[FourBitCallback(config, export=True)])
        trainer.train()
        return trainer

    @staticmethod
    def logits(folder: Path) -> torch.Tensor:
        ids = torch.arange(16).reshape(1, 16)
        with torch.no_grad():
            return LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()(ids).logits

    def test_the_packed_model_is_written_when_training_ends(self, trained: Trainer) -> None:
        folder = Path(trained.args.output_dir) / "4bit"
        model = trained.model.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = model(torch.arange(16).reshape(1, 16)).logits.float()
        assert torch.nn.functional.cosine_similarity(self.logits(folder).float(), expected, dim=-1).min() > 0.999

    def test_a_checkpoint_of_the_trainer_gives_the_same_packed_model(self, trained: Trainer, tmp_path: Path) -> None:
        folder = Path(trained.args.output_dir)
        export_main([str(folder / "checkpoint-3"), str(tmp_path / "packed")])
        assert torch.equal(self.logits(tmp_path / "packed"), self.logits(folder / "4bit"))

    def test_the_command_line_takes_another_format(self, trained: Trainer, tmp_path: Path) -> None:
        export_main([f"{trained.args.output_dir}/checkpoint-3", str(tmp_path / "packed"), "--weight", "nvfp4"])
        assert "nvfp4-pack-quantized" in (tmp_path / "packed" / "config.json").read_text()

    def test_checkpoints_that_cannot_be_exported_are_refused(self, trained: Trainer, tmp_path: Path) -> None:
        folder = Path(trained.args.output_dir)
        tiny().save_pretrained(tmp_path / "plain")
        with pytest.raises(ValueError, match=r"was not trained in 4 bits: .* no 'four_bit_training'; .*--weight int4"):
            export_checkpoint(tmp_path / "plain", tmp_path / "out")
        with pytest.raises(ValueError, match="output must be another folder than the checkpoint"):
            export_checkpoint(tmp_path / "plain", tmp_path / "plain")
        with pytest.raises(ValueError, match="is quantized already; give the checkpoint that the Trainer wrote"):
            export_checkpoint(folder / "4bit", tmp_path / "out")
        with pytest.raises(FileNotFoundError, match=r"has no config.json; give a folder that the Trainer"):
            export_checkpoint(tmp_path / "nowhere", tmp_path / "out")
        shutil.copytree(folder / "checkpoint-3", tmp_path / "broken")
        weights = tmp_path / "broken" / "model.safetensors"
        tensors = load_file(weights)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"lacks weights of LlamaForCausalLM: model.layers.1.mlp.up_proj.weight;"):
            export_checkpoint(tmp_path / "broken", tmp_path / "out")
        os.truncate(weights, weights.stat().st_size // 2)
        with pytest.raises(ValueError, match=r"broken cannot be read: .*cut short or damaged: export an earlier"):
            export_checkpoint(tmp_path / "broken", tmp_path / "out")
        (tmp_path / "broken" / "config.json").write_text("{")
        with pytest.raises(ValueError, match=r"config.json cannot be read: .* it is cut short"):
            export_checkpoint(tmp_path / "broken", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        (tmp_path / "plain" / "adapter_config.json").write_text("{}")
        with pytest.raises(ValueError, match=r"holds a PEFT adapter, .* merge_and_unload\(\)"):
            export_checkpoint(tmp_path / "plain", tmp_path / "out")


def test_what_cannot_be_exported_is_refused_before_training(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="export needs it; install the extra 'export'")
    with pytest.raises(ValueError, match=r"cannot be packed: .*down_proj has 48 inputs, which groups of 32 do not"):
        Trainer(
            tiny(),
            arguments(tmp_path),
            train_dataset=Data(),
            callbacks=[FourBitCallback(FourBitConfig(group_size=32), export=True)],
        )


def unpackable() -> FourBitCallback:
    return FourBitCallback(FourBitConfig(activation=None, group_size=32), export=True)


def test_a_callback_that_is_added_later_refuses_before_training_too(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="export needs it; install the extra 'export'")
    trainer = Trainer(tiny(), arguments(tmp_path), train_dataset=Data())
    trainer.add_callback(unpackable())
    with pytest.raises(ValueError, match=r"cannot be packed: .*down_proj has 48 inputs"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_another_model_of_model_init_is_looked_at_too(tmp_path: Path) -> None:
    """The first one, which the Trainer makes to begin with, could be packed."""
    pytest.importorskip("compressed_tensors", reason="export needs it; install the extra 'export'")
    shapes = iter([64, 48])

    def model() -> LlamaForCausalLM:
        return LlamaForCausalLM(LlamaConfig(**{**tiny().config.to_dict(), "intermediate_size": next(shapes)}))

    trainer = Trainer(model_init=model, args=arguments(tmp_path), train_dataset=Data(), callbacks=[unpackable()])
    with pytest.raises(ValueError, match=r"cannot be packed: .*down_proj has 48 inputs"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_callback_is_pickled_with_its_trainer(tmp_path: Path) -> None:
    """Ray does so in a hyperparameter search."""
    pytest.importorskip("compressed_tensors", reason="export needs it; install the extra 'export'")
    callback = FourBitCallback(FourBitConfig(activation=None, group_size=16), export=True)
    model = tiny()
    Trainer(model, arguments(tmp_path), callbacks=[callback])
    again = pickle.loads(pickle.dumps(callback))
    assert (again.config, again.export) == (callback.config, True)


def test_what_one_model_came_with_is_not_the_next_ones(tmp_path: Path) -> None:
    callback = FourBitCallback()
    first, second = convert_to_4bit(tiny(), FourBitConfig("mxfp4", None, group_size=32)), tiny()
    for model in (first, second):
        Trainer(model, arguments(tmp_path), callbacks=[callback])
    assert [model.model.layers[0].mlp.up_proj.four_bit.weight for model in (first, second)] == ["mxfp4", "int4"]


def gguf_trainer(tmp_path: Path, export: str, model: object = None, config: FourBitConfig | None = None) -> Trainer:
    from tests.quant.export.gguf.models import byte_level_tokenizer
    from tests.quant.export.gguf.models import tiny as model_with_vocabulary

    return Trainer(
        model or model_with_vocabulary(),
        arguments(tmp_path, save=True),
        train_dataset=Data(),
        processing_class=byte_level_tokenizer(),
        callbacks=[FourBitCallback(config or FourBitConfig("int4", None, group_size=32), export=export)],
    )


@pytest.mark.parametrize("export", ["gguf", "other/name.gguf"])
def test_the_callback_writes_a_gguf_file_and_the_command_writes_the_same(tmp_path, export, monkeypatch) -> None:
    gguf = pytest.importorskip("gguf", reason="GGUF files need it; install the extra 'gguf'")
    monkeypatch.chdir(tmp_path)
    gguf_trainer(tmp_path / "run", export).train()
    file = Path("run/model.gguf" if export == "gguf" else export)
    export_main(["--to", "gguf", "run", "later.gguf"])  # from the run's last checkpoint
    first, second = (gguf.GGUFReader(path) for path in (file, "later.gguf"))
    assert len(first.tensors) == len(second.tensors) > 14
    for one, other in zip(first.tensors, second.tensors, strict=True):
        assert one.name == other.name
        assert (one.data == other.data).all(), one.name
    with pytest.raises(FileExistsError, match=r"later.gguf exists; .*--overwrite"):
        export_main(["--to", "gguf", "run", "later.gguf"])
    export_main(["--to", "gguf", "run", "later.gguf", "--overwrite", "--embedding", "f16"])


def test_what_gguf_cannot_hold_is_an_error_before_training(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="GGUF files need it; install the extra 'gguf'")
    with pytest.raises(ValueError, match=r"group_size must be a multiple of 32"):
        gguf_trainer(tmp_path, "gguf", config=FourBitConfig("int4", None, group_size=16))
    with pytest.raises(ValueError, match=r"has 320 tokens, the embedding only 64 rows"):
        gguf_trainer(tmp_path, "gguf", model=tiny(), config=FourBitConfig("mxfp4", None, target_modules="gate_proj"))


def test_weights_rounded_on_request_are_said_to_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("gguf", reason="GGUF files need it; install the extra 'gguf'")
    from tests.quant.export.gguf.models import tiny as model_with_vocabulary

    model_with_vocabulary().save_pretrained(tmp_path / "plain", max_shard_size="300KB")
    with pytest.raises(ValueError, match=r"was not trained in 4 bits: .* \(--weight int4\)"):
        export_main(["--to", "gguf", str(tmp_path / "plain"), str(tmp_path / "out.gguf")])
    export_main(["--to", "gguf", str(tmp_path / "plain"), str(tmp_path / "out.gguf"), "--weight", "int4"])
    assert "was not trained in 4 bits: its weights are rounded to int4 now" in caplog.text
    assert (tmp_path / "plain" / "model.safetensors.index.json").exists()  # a sharded checkpoint
    assert (tmp_path / "out.gguf").exists()


def test_generating_rounds_each_weight_once(monkeypatch):
    from hf_stablespam.quant import linear

    seen = []
    original = linear.quantize_weight
    monkeypatch.setattr(linear, "quantize_weight", lambda *inputs: seen.append(inputs[0]) or original(*inputs))
    callback = FourBitCallback()
    model = convert_to_4bit(tiny(), callback.config).eval()
    model.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert len(seen) == len({id(weight) for weight in seen}) == 14
    model.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=1, do_sample=False)
    assert len(seen) == 28  # nothing is kept from one call to the next


class ReadsItsHead(LlamaForCausalLM):
    """Multiplies by the head's weight itself, through a function: no source of the model says so."""

    def forward(self, input_ids=None, labels=None, **others):
        hidden = self.model(input_ids).last_hidden_state
        return {"loss": fused_loss(self, hidden, labels)}


def fused_loss(model, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = hidden @ model.lm_head.weight.t()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def test_a_layer_that_is_trained_and_never_called_is_refused_before_the_first_update(tmp_path: Path) -> None:
    model = ReadsItsHead(tiny().config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config = FourBitConfig(modules_to_not_convert=(), target_modules=("lm_head", "up_proj"))
    trainer = Trainer(model, arguments(tmp_path), train_dataset=Data(), callbacks=[FourBitCallback(config)])
    with pytest.raises(ValueError, match="weights of lm_head have gradients, but these 4-bit layers were never called"):
        trainer.train()
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    model = ReadsItsHead(tiny().config)
    Trainer(model, arguments(tmp_path), train_dataset=Data(), callbacks=[FourBitCallback()]).train()
