"""The examples in docstrings run and give what they say."""

import doctest
import importlib
import pkgutil

import pytest

import hf_stablespam

# Importing these does something: the launcher's child site runs hooks, `__main__` is a command.
NOT_IMPORTED = ("hf_stablespam.trainer.launcher.child_site.sitecustomize", "hf_stablespam.__main__")
MODULES = [
    module.name
    for module in pkgutil.walk_packages(hf_stablespam.__path__, "hf_stablespam.")
    if module.name not in NOT_IMPORTED
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    importlib.import_module("transformers.trainer")  # prints a line when it is imported first
    assert doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


@pytest.mark.parametrize("name", hf_stablespam.__all__)
def test_public_names_show_an_example(name):
    assert ">>>" in getattr(hf_stablespam, name).__doc__
