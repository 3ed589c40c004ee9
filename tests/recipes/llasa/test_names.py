"""The recipe's public names."""

import pytest

from hf_stablespam.recipes import llasa


@pytest.mark.parametrize("name", llasa.__all__)
def test_public_names_are_documented_with_an_example(name):
    documentation = getattr(llasa, name).__doc__
    assert name in dir(llasa)
    assert documentation
    assert ">>>" in documentation or name == "SearchResult"  # which nobody makes but the search


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(AttributeError, match="did you mean 'best_of_n'"):
        _ = llasa.best_of_m
