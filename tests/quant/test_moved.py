"""Modules that moved are found under their old names, as the same modules: models pickled before hold those names."""

import importlib
import pickle
import sys

import pytest
import torch

from hf_stablespam.quant import FourBitConfig, FourBitLinear
from hf_stablespam.quant._moved import MOVED


@pytest.mark.parametrize("name", MOVED)
def test_an_old_name_gives_the_module_itself_and_says_the_new_one(name, monkeypatch):
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.warns(FutureWarning, match=f"{name} is now {MOVED[name]}"):
        assert importlib.import_module(name) is sys.modules[MOVED[name]]


@pytest.mark.filterwarnings("ignore:.*is now:FutureWarning")
def test_a_layer_pickled_before_the_move_is_read():
    layer = FourBitLinear(32, 8, config=FourBitConfig(group_size=32))
    written = pickle.dumps(layer, protocol=0)  # in text, so that names can be replaced
    for old, new in MOVED.items():
        written = written.replace(new.encode(), old.encode())
    written = written.replace(b"hf_stablespam.quant.formats.number_formats", b"hf_stablespam.quant.formats")
    assert b"hf_stablespam.quant.linear" in written
    assert b"layers" not in written
    read = pickle.loads(written)
    x = torch.randn(3, 32)
    assert type(read) is FourBitLinear
    assert torch.equal(read(x), layer(x))
