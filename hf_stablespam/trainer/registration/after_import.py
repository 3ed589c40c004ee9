"""Run a function when a module is imported, now or later, without importing it."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Hook = Callable[[ModuleType], None]


class _HookFinder(MetaPathFinder):
    """Finds hooked modules through the other finders, and calls their hooks at the end of their execution."""

    def __init__(self) -> None:
        self.hooks: dict[str, list[Hook]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.hooks:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self._call_hooks_after(spec.loader, self.hooks[fullname])
        return spec

    @staticmethod
    def _call_hooks_after(loader: Loader, hooks: list[Hook]) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for hook in hooks:
                hook(module)

        # On the instance: a loader belongs to one module, and keeping its class keeps `inspect.getsource` working.
        loader.exec_module = exec_module  # type: ignore[method-assign]


_finder = _HookFinder()


def after_import(name: str, hook: Hook) -> None:
    """Call `hook(module)` once the module `name` is there: at once where it already is, else after its import.

    Asking again for the same hook is harmless as long as the hook itself may be called twice on one module.

    Args:
        name: full name of the module, for example `"transformers.trainer"`.
        hook: called with the module after its code has run.
    """
    module = sys.modules.get(name)
    if module is not None:
        hook(module)
        return
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    hooks = _finder.hooks.setdefault(name, [])
    if hook not in hooks:
        hooks.append(hook)


def forget_hooks() -> None:
    """Call no hook any more for what is imported from now on."""
    _finder.hooks.clear()
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
