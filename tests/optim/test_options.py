"""Bad input is an error before anything is trained, and its message names option, rule, value and remedy."""

import inspect
import re
from pathlib import Path

import pytest
import torch

import hf_stablespam
from hf_stablespam.optim import SPAM, StableSPAM, options, stabilize

BAD = [
    ({"lr": -1e-3}, r"lr must be a number >= 0, got -0.001; pass the learning rate as a positive number"),
    ({"lr": float("nan")}, r"lr must be a number >= 0, got nan"),
    ({"lr": "1e-3"}, r"lr must be a number >= 0, got '1e-3'"),
    ({"lr": torch.ones(2)}, r"lr must be a number >= 0 or a tensor of one element, got shape \(2,\)"),
    ({"betas": (1.0, 0.999)}, r"betas\[0\] must be in \[0, 1\), got 1.0; Adam's are \(0.9, 0.999\)"),
    ({"betas": (0.9, -0.1)}, r"betas\[1\] must be in \[0, 1\), got -0.1"),
    ({"betas": 0.9}, r"betas must be two numbers in \[0, 1\), got 0.9"),
    ({"betas": (0.9, 0.99, 0.999)}, r"betas must be two numbers"),
    ({"eps": -1e-8}, r"eps must be a number >= 0, got -1e-08"),
    ({"weight_decay": -0.1}, r"weight_decay must be a number >= 0, got -0.1"),
    ({"clip_beta": 1.5}, r"clip_beta must be in \[0, 1\), got 1.5; None switches clipping off"),
    ({"clip_beta": True}, r"clip_beta must be in \[0, 1\), got True"),
    ({"norm_betas": (0.7, 1.0)}, r"norm_betas\[1\] must be in \[0, 1\), got 1.0; None switches normalising off"),
    ({"norm_betas": 0.7}, r"norm_betas must be two numbers in \[0, 1\), got 0.7; None switches normalising off"),
    ({"reset_interval": 0}, r"reset_interval must be a whole number of steps >= 1, got 0; None switches resets off"),
    ({"reset_interval": 10.0}, r"reset_interval must be a whole number of steps >= 1, got 10.0"),
    ({"decay_steps": -5}, r"decay_steps must be a whole number of steps >= 1, got -5; None switches the decay off"),
    ({"decay_steps": "automatic"}, r"decay_steps must be a whole number of steps >= 1, got 'automatic'"),
    ({"decay_floor": 1.1}, r"decay_floor must be in \[0, 1\], got 1.1; 0.5 is the value of the paper's code"),
    ({"maximize": 1}, r"maximize must be True or False, got 1"),
    ({"foreach": "yes"}, r"foreach must be True, False or None, got 'yes'"),
    ({"fused": 0}, r"fused must be True, False or None, got 0"),
    ({"state_dtype": torch.float64}, r"state_dtype must be one of torch.float32, torch.bfloat16 or None.*float64"),
    ({"state_dtype": "float32"}, r"state_dtype must be one of .*got 'float32'"),
    ({"stochastic_rounding": None}, r"stochastic_rounding must be True or False, got None"),
    ({"foreach": True, "fused": True}, r"foreach and fused must not both be True.*set one, or neither"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_the_constructor_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        StableSPAM([torch.nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize(("options", "message"), BAD)
def test_a_parameter_group_refuses_the_same_and_is_not_added(options, message):
    optimizer = StableSPAM([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], **options})
    assert len(optimizer.param_groups) == 1


def test_an_unknown_option_is_an_error():
    with pytest.raises(TypeError, match="clip_betas"):
        StableSPAM([torch.nn.Parameter(torch.ones(2))], clip_betas=0.9)


def test_a_misspelt_option_in_a_group_names_the_nearest():
    with pytest.raises(TypeError, match=r"unknown option 'clip_betas'.*did you mean 'clip_beta'\?.*known options: lr"):
        StableSPAM([{"params": [torch.nn.Parameter(torch.ones(2))], "clip_betas": 0.9}])


def test_foreign_entries_of_a_group_are_kept():
    optimizer = StableSPAM([{"params": [torch.nn.Parameter(torch.ones(2))], "name": "body", "initial_lr": 0.1}])
    assert optimizer.param_groups[0]["name"] == "body"


def test_complex_parameters_are_refused():
    with pytest.raises(ValueError, match=r"parameters must be real, got torch.complex64.*view_as_real"):
        StableSPAM([torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))])


def test_sparse_gradients_are_refused_and_nothing_has_changed():
    dense, sparse = torch.nn.Parameter(torch.ones(2)), torch.nn.Embedding(4, 2, sparse=True)
    optimizer = StableSPAM([dense, sparse.weight])
    dense.grad = torch.ones(2)
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"gradients must be dense, got torch.sparse_coo.*\(4, 2\).*sparse=False"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(2))
    assert not optimizer.state


def test_an_unresolved_auto_is_refused_when_stepping():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = StableSPAM([weight], decay_steps="auto")
    weight.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"decay_steps must be a number of update steps or None.*got 'auto'.*Trainer"):
        optimizer.step()


@pytest.mark.parametrize(
    ("cls", "table"), [(StableSPAM, options.STABLE_SPAM), (SPAM, options.SPAM)], ids=["stable", "spam"]
)
def test_signature_and_table_have_the_same_defaults(cls, table):
    parameters = list(inspect.signature(cls).parameters.values())[1:]
    assert {parameter.name: parameter.default for parameter in parameters} == {n: o.default for n, o in table.items()}
    defaults = cls([torch.nn.Parameter(torch.ones(2))]).defaults
    assert {name: defaults[name] for name in table} == {n: o.default for n, o in table.items()}


def test_stabilize_has_the_defaults_of_the_table():
    for function in (stabilize, hf_stablespam.StabilizeCallback):
        for name, parameter in inspect.signature(function).parameters.items():
            if name != "optimizer":
                assert parameter.default == options.STABLE_SPAM[name].default, name


ROOT = Path(__file__).parents[2]
SHOWN = {None: "off", False: "`false`", "std": "`std`", (0.7, 0.9): "0.7:0.9"}  # how a page shows a default
OF_THE_TRAINER = {"decay_steps": "`auto`", "state_dtype": "parameter's"}
# tables of options begin with these two columns
TABLE = re.compile(r"^\| option \| default \|.*\n\|[-|]+\n((?:\|.*\n)+)", re.MULTILINE)


def rows_of_tables():
    """(page, option, its default, the rest of the row) of every table of options on every page."""
    for page in [ROOT / "README.md", *sorted(ROOT.joinpath("docs").rglob("*.md"))]:
        for table in TABLE.findall(page.read_text(encoding="utf-8")):
            for line in table.splitlines():
                names, defaults, *rest = (cell.strip() for cell in line.strip("|").split("|"))
                pairs = zip(re.findall(r"`(\w+)`", names), defaults.split(", "), strict=False)
                yield from ((page.name, *pair, rest) for pair in pairs if pair[0] in options.STABLE_SPAM)


def test_every_table_of_the_docs_shows_the_defaults_and_names_of_the_one_table():
    rows = list(rows_of_tables())
    assert {"README.md", "hyperparameters.md", "memory.md"} <= {page for page, *_ in rows}
    for page, name, default, rest in rows:
        option = options.STABLE_SPAM[name]
        assert default == OF_THE_TRAINER.get(name, SHOWN.get(option.default, str(option.default))), (page, name)
        for alias, _ in option.aliases:
            assert any(f"`{alias}`" in cell for cell in rest), (page, name, alias)
    shown = {name for page, name, *_ in rows if page in ("hyperparameters.md", "memory.md")}
    own_fields = {"lr", "betas", "eps", "weight_decay", "maximize", "foreach", "fused"}
    assert shown == set(options.STABLE_SPAM) - own_fields


def test_every_value_that_is_read_is_accepted_or_refused_by_the_same_rule():
    assert options.STATE_DTYPE.accepts(options.STATE_DTYPE.read("bfloat16"))
    assert "float16," not in options.STATE_DTYPE.expected.replace("bfloat16,", "")
    with pytest.raises(KeyError):
        options.STATE_DTYPE.read("float16")
