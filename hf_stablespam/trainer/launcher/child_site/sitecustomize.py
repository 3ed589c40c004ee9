"""Python runs this at the start of each process under the launcher; then the `sitecustomize` that it hides, if any."""

import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from pathlib import Path

_HERE = Path(__file__).parent


def _prepare() -> None:
    if find_spec("hf_stablespam") is None:
        # Last, so that it hides nothing: the launcher ran from a source tree that this process does not know.
        sys.path.append(str(_HERE.parents[2]))
    from hf_stablespam.trainer.launcher.launch import prepare_child

    prepare_child()


def _run_hidden() -> None:
    spec = PathFinder.find_spec("sitecustomize", [path for path in sys.path if Path(path) != _HERE])
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(module_from_spec(spec))


_prepare()
_run_hidden()
