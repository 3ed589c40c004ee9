"""Adapters under other names, and what a folder remembers of the model."""

import pytest

from hf_stablespam.recipes.lae import LAEModel
from tests.recipes.lae.helpers import tiny_vit, vit_model

NAMES = {"online": "fast", "offline": "slow"}


@pytest.mark.parametrize("local_loss", [True, False])
def test_the_kind_of_loss_is_remembered(local_loss, tmp_path):
    model = vit_model(tasks=2)
    model.local_loss = local_loss
    model.save_pretrained(tmp_path)
    assert LAEModel.from_pretrained(tiny_vit(), tmp_path).local_loss is local_loss
    description = tmp_path / "lae.json"
    description.write_text(description.read_text().replace('"local_loss"', '"other"'))  # a folder of before
    assert LAEModel.from_pretrained(tiny_vit(), tmp_path).local_loss
