"""save_pruned and load_pruned, and what others see in the folder."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from hf_stablespam import FourBitConfig, convert_to_4bit
from hf_stablespam.recipes.adapt_pruner import LayerPlan, PruningPlan, load_pruned, prune_units, save_pruned
from hf_stablespam.recipes.adapt_pruner.training.callback import SavesWidths
from tests.quant.export.gguf.models import byte_level_tokenizer
from tests.recipes.adapt_pruner.models import FAMILIES, batches, logits, small
from tests.recipes.adapt_pruner.test_surgery import PLAN

ALIKE = PruningPlan([LayerPlan((0, 2, 3, 4), (1,))] * 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_loaded_is_what_was_saved(family, tmp_path):
    model = small(family)
    prune_units(model, PLAN)
    save_pruned(model, tmp_path)
    loaded = load_pruned(tmp_path, dtype=torch.float32)
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(model))
    assert json.loads((tmp_path / "pruning.json").read_text())["layers"][0] == {"intermediate_size": 4, "kv_heads": 2}
    prune_units(loaded, PruningPlan([LayerPlan((0, 1), (0,))] * 3))  # cut again, saved again
    save_pruned(loaded, tmp_path / "again")
    assert torch.equal(logits(load_pruned(tmp_path / "again", dtype=torch.float32)), logits(loaded))


def test_arguments_of_from_pretrained(tmp_path):
    model = small()
    prune_units(model, PLAN)
    save_pruned(model, tmp_path)
    loaded = load_pruned(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    assert loaded.dtype == torch.bfloat16
    assert loaded.config._attn_implementation == "eager"
    assert not loaded.training


CHECKS_CONFIGS = Version(transformers.__version__) >= Version("5")


@pytest.mark.skipif(not CHECKS_CONFIGS, reason="transformers 4 does not check the types of a config's fields")
@pytest.mark.parametrize("read", [AutoModelForCausalLM, LlamaForCausalLM, AutoConfig], ids=lambda read: read.__name__)
def test_plain_from_pretrained_stops_with_the_remedy(read, tmp_path):
    model = small()
    prune_units(model, PLAN)
    save_pruned(model, tmp_path)
    options = {} if read is AutoConfig else {"ignore_mismatched_sizes": True}  # not even so are weights made anew
    with pytest.raises(Exception, match="load_pruned"):
        read.from_pretrained(tmp_path, **options)


def test_the_tokenizer_beside_it_loads_as_ever(tmp_path):
    model = small()
    prune_units(model, PLAN)
    save_pruned(model, tmp_path, byte_level_tokenizer())
    text = "a tokenizer needs no widths"
    assert AutoTokenizer.from_pretrained(tmp_path)(text) == byte_level_tokenizer()(text)


def test_equal_widths_are_a_plain_model(tmp_path):
    model = small()
    prune_units(model, ALIKE)
    save_pruned(model, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(plain), logits(model))
    assert torch.equal(logits(load_pruned(tmp_path, dtype=torch.float32)), logits(model))


def test_an_unpruned_model_goes_through_as_well(tmp_path):
    model = small()
    save_pruned(model, tmp_path)
    assert torch.equal(logits(load_pruned(tmp_path, dtype=torch.float32)), logits(model))


def test_a_model_in_4_bit_training_is_saved_with_its_master_weights(tmp_path):
    model = convert_to_4bit(small(), FourBitConfig(group_size=16, activation=None))
    prune_units(model, PLAN)
    save_pruned(model, tmp_path)
    loaded = load_pruned(tmp_path, dtype=torch.float32)
    for (name, one), (_, other) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    convert_to_4bit(loaded, FourBitConfig(group_size=16, activation=None))
    assert torch.equal(logits(loaded), logits(model))


def test_errors(tmp_path):
    small().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no pruning.json.*load it with from_pretrained"):
        load_pruned(tmp_path)
    save_pruned(small(), tmp_path)
    with pytest.raises(ValueError, match="ignore_mismatched_sizes=True would make weights anew"):
        load_pruned(tmp_path, ignore_mismatched_sizes=True)
    path = tmp_path / "pruning.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "layers": saved["layers"][:2]}))
    with pytest.raises(ValueError, match="one entry per layer, got 2 for 3 layers"):
        load_pruned(tmp_path)
    path.write_text(json.dumps(saved))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Own"]}))
    with pytest.raises(ValueError, match=r"must name a class of transformers, got \['Own'\]"):
        load_pruned(tmp_path)


def test_a_loaded_model_trains(tmp_path):
    model = small()
    prune_units(model, PLAN)
    save_pruned(model, tmp_path)
    loaded = load_pruned(tmp_path)
    ids = batches(1)[0]["input_ids"]
    loaded(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_a_checkpoint_of_a_trial_gets_its_widths(tmp_path):
    """The Trainer puts it into a folder of the trial's own."""
    callback, state, model = SavesWidths(), transformers.TrainerState(), small()
    trainer = SimpleNamespace(
        hp_name=None,
        _trial=object(),
        _get_output_dir=lambda trial: str(tmp_path / "run-0"),
        is_local_process_zero=lambda: True,
        is_world_process_zero=lambda: True,
    )
    state.init_training_references(trainer, 1, 1, None)
    model.save_pretrained(tmp_path / "run-0" / "checkpoint-0")
    callback.on_save(transformers.TrainingArguments(str(tmp_path)), state, transformers.TrainerControl(), model=model)
    assert (tmp_path / "run-0" / "checkpoint-0" / "pruning.json").exists()
