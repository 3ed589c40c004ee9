"""Modules that moved into `formats` and `layers`, under their old names: for scripts, and for pickled models."""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_PACKAGE = "hf_stablespam.quant."
_FOLDERS = {
    "formats": ("fused", "hadamard", "quantizer", "rounding", "scales"),
    "layers": ("adapters", "experts", "linear", "matmul", "merged_lora"),
}
MOVED = {_PACKAGE + name: f"{_PACKAGE}{folder}.{name}" for folder, names in _FOLDERS.items() for name in names}


class _MovedFinder(MetaPathFinder, Loader):
    """Gives the module itself, not a copy of it, for its old name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        warnings.warn(f"{name} is now {MOVED[name]}; the old name goes with the next version", FutureWarning, 2)
        sys.modules[name] = importlib.import_module(MOVED[name])


def find_moved_modules() -> None:
    """Let the old names be imported. Asked last, so that it costs nothing else anything."""
    if not any(isinstance(finder, _MovedFinder) for finder in sys.meta_path):
        sys.meta_path.append(_MovedFinder())
