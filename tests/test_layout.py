"""The folders' rule: `optim`, `quant`, `monitor` know neither each other nor transformers; none knows `recipes`."""

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_stablespam"
MODULES = sorted(PACKAGE.rglob("*.py"))
PARTS = ("optim", "quant", "monitor")


def imported(tree: ast.AST, module: Path, *, at_import_only: bool) -> set[str]:
    """Full names that the module imports; `at_import_only` leaves out functions and `if TYPE_CHECKING`."""
    names = set()
    for node in ast.iter_child_nodes(tree):
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if at_import_only and (is_function or is_typing):
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute in this project"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        names |= imported(node, module, at_import_only=at_import_only)
    return names


@cache
def imports_of(module: Path, *, at_import_only: bool = False) -> set[str]:
    return imported(ast.parse(module.read_text()), module, at_import_only=at_import_only)


def within(names: set[str], package: str) -> set[str]:
    return {name for name in names if name == package or name.startswith(f"{package}.")}


@pytest.mark.parametrize("part", PARTS)
def test_parts_do_not_know_each_other_or_the_trainer(part):
    for module in (PACKAGE / part).rglob("*.py"):
        for other in {*PARTS, "trainer", "recipes"} - {part}:
            assert not within(imports_of(module), f"hf_stablespam.{other}"), module


@pytest.mark.parametrize("part", PARTS)
def test_parts_do_not_import_transformers(part):
    for module in (PACKAGE / part).rglob("*.py"):
        assert not within(imports_of(module, at_import_only=True), "transformers"), module


def test_nobody_imports_sharding_before_something_is_sharded():
    """`torch.distributed.tensor` takes more than a second to import."""
    for module in MODULES:
        assert not within(imports_of(module, at_import_only=True), "torch.distributed.tensor"), module


def test_only_the_entry_points_and_the_recipes_import_the_trainer_folder():
    for module in MODULES:
        is_entry = module.parent == PACKAGE and module.name in ("__init__.py", "__main__.py")
        if not is_entry and module.relative_to(PACKAGE).parts[0] not in ("trainer", "recipes"):
            assert not within(imports_of(module), "hf_stablespam.trainer"), module


def test_nothing_imports_a_recipe_but_the_recipe_itself():
    for module in MODULES:
        folder, *rest = module.relative_to(PACKAGE).parts
        own = f"hf_stablespam.recipes.{rest[0]}" if folder == "recipes" and len(rest) > 1 else None
        recipes = within(imports_of(module), "hf_stablespam.recipes")
        assert recipes == (within(recipes, own) if own else set()), module


def test_the_table_of_folders_is_the_tree():
    """CONTRIBUTING names every folder of the package two levels deep, and no other; what it says of files is so."""
    root = PACKAGE.parent
    text = (root / "CONTRIBUTING.md").read_text()
    named = {line.split("`")[1] for line in text.splitlines() if line.startswith("| `")}
    rooms = {module.parent.relative_to(root) for module in MODULES if len(module.relative_to(PACKAGE).parts) <= 3}
    within_recipes = Path("hf_stablespam/recipes")
    expected = {str(room) for room in rooms if room != Path("hf_stablespam") and room.parent != within_recipes}
    assert {name for name in named if name.startswith("hf_stablespam")} == expected
    assert all((root / name).is_dir() for name in named)
    advice = text.split("Where does a new")[1].split("\n## ")[0]
    for path in (part for part in advice.split("`")[1::2] if "/" in part):
        assert (PACKAGE / path).exists() or (root / path).exists(), path


LARGEST_ROOM = 13


def test_rooms_are_small():
    """At most a dozen modules in a folder, beside its `__init__`."""
    for folder in {module.parent for module in MODULES}:
        names = [module.name for module in folder.glob("*.py") if module.name != "__init__.py"]
        assert len(names) < LARGEST_ROOM, f"{folder.relative_to(PACKAGE)}: {sorted(names)}"


def test_the_rule_would_notice_an_import():
    """The checker itself: what it must see, and what it must not."""
    tree = ast.parse("import transformers.trainer\ndef f():\n    from hf_stablespam.quant import x\n")
    assert imported(tree, PACKAGE, at_import_only=True) == {"transformers.trainer"}
    assert within(imported(tree, PACKAGE, at_import_only=False), "hf_stablespam.quant")


def test_the_public_names_are_there():
    import hf_stablespam

    assert len(set(hf_stablespam.__all__)) == len(hf_stablespam.__all__)
    for name in hf_stablespam.__all__:
        assert getattr(hf_stablespam, name).__doc__, name
        assert name in dir(hf_stablespam)


def test_an_unknown_name_suggests_the_nearest():
    import hf_stablespam

    with pytest.raises(AttributeError, match=r"no attribute 'StableSPM' \(did you mean 'StableSPAM'\?\)"):
        _ = hf_stablespam.StableSPM
    with pytest.raises(AttributeError, match=r"no attribute 'qqqq'$"):
        _ = hf_stablespam.qqqq
