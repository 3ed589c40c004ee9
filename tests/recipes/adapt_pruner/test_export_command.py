"""`hf-stablespam export` on what a Trainer with `AdaptPruneCallback` leaves behind."""

import sys

import pytest
import torch

from hf_stablespam import FourBitCallback, FourBitConfig, restore_linear
from hf_stablespam.__main__ import main
from hf_stablespam.recipes.adapt_pruner import AdaptPruneCallback, load_pruned
from tests.quant.export.gguf.models import VOCABULARY, byte_level_tokenizer, tiny
from tests.trainer.helpers import tiny_trainer

GROUPS = FourBitConfig("int4", None, group_size=32)
EXACT = FourBitConfig("int4", None, group_size=32, scale_dtype="float32")  # what is packed in float32 loses nothing
IDS = torch.arange(24).view(2, 12) % VOCABULARY


def run(folder, config=GROUPS, name="LlamaForCausalLM", **options):
    """Train in 4 bits, cut after the first step, save a checkpoint and the model itself."""
    prune = AdaptPruneCallback(0.85, at_steps=[1], steps=10, calibration=[{"input_ids": IDS}], **options)
    trainer = tiny_trainer(
        folder,
        model=tiny(name),
        callbacks=[FourBitCallback(config), prune],
        **{"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3},
    )
    trainer.processing_class = byte_level_tokenizer()
    trainer.train()
    widths = prune.reports[0].widths
    assert (len({str(width) for width in widths}) == 1) == options.get("equal_widths", False), widths
    return trainer


def export(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["hf-stablespam", "export", *map(str, arguments)])
    return main()


@torch.no_grad()
def logits(model):
    return model.eval()(IDS.to(model.device)).logits


def test_layers_of_unequal_widths(tmp_path, monkeypatch):
    """Packed, as floats, and for llama.cpp: each computes what training computed."""
    pytest.importorskip("compressed_tensors", reason="packed checkpoints need it; install the extra 'export'")
    trainer = run(tmp_path / "run", EXACT)
    expected = logits(trainer.model)
    assert export(monkeypatch, tmp_path / "run", tmp_path / "packed", "--dtype", "float32") == 0
    torch.testing.assert_close(logits(load_pruned(tmp_path / "packed", dtype=torch.float32)), expected)
    assert export(monkeypatch, tmp_path / "run", tmp_path / "floats", "--to", "unpacked") == 0
    torch.testing.assert_close(logits(load_pruned(tmp_path / "floats")), expected)

    trainer.save_model(tmp_path / "model")  # no checkpoint: the note of widths is in its config only
    torch.testing.assert_close(logits(load_pruned(tmp_path / "model")), logits(restore_linear(trainer.model)))


def test_llama_cpp_reads_the_file_of_a_run(tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="GGUF files need it; install the extra 'gguf'")
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: it is in the extra gguf-test")
    from tests.quant.export.gguf.test_llama_cpp import divergence

    trainer = run(tmp_path / "run")
    flags = ("--to", "gguf", "--embedding", "f32")
    assert export(monkeypatch, tmp_path / "run", tmp_path / "model.gguf", *flags) == 0
    assert divergence(trainer.model, tmp_path / "model.gguf") < 0.02


def test_equal_widths(tmp_path, monkeypatch):
    pytest.importorskip("compressed_tensors", reason="packed checkpoints need it; install the extra 'export'")
    trainer = run(tmp_path / "run", EXACT, equal_widths=True)
    assert export(monkeypatch, tmp_path / "run", tmp_path / "packed", "--dtype", "float32") == 0
    plain = type(trainer.model).from_pretrained(tmp_path / "packed", dtype=torch.float32)
    torch.testing.assert_close(logits(plain), logits(trainer.model))


def test_what_cannot_be_exported_is_refused_by_name(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf", reason="GGUF files need it; install the extra 'gguf'")
    run(tmp_path / "qwen", name="Qwen2ForCausalLM")
    assert export(monkeypatch, tmp_path / "qwen", tmp_path / "model.gguf", "--to", "gguf") == 1
    assert "for which llama.cpp's 'qwen2' has no form" in capsys.readouterr().err
    run(tmp_path / "llama", multiple_of=1)
    assert export(monkeypatch, tmp_path / "llama", tmp_path / "packed") == 1
    assert "groups of 32 do not divide" in (error := capsys.readouterr().err)
    assert "Prune with multiple_of=32, train with a group_size" in error
    assert not [path for path in tmp_path.iterdir() if path.name not in ("qwen", "llama")]
