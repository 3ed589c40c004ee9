"""Linear layers that are not called: a part of the model reads their weight, and multiplies by it itself.

Mamba multiplies by ``self.dt_proj.weight``; the kernels of Mamba2, Bamba and others take ``self.out_proj.weight``;
PyTorch's `nn.TransformerEncoderLayer` hands ``self.linear1.weight`` to a kernel in evaluation. What a layer's own
`forward` does to the weight does not happen there. The source says which layers these are, on every machine, whichever
kernels it has, and before any step is made.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from torch import nn

# What may be asked of a weight without multiplying by it.
HARMLESS = frozenset(
    {"device", "dtype", "dim", "element_size", "grad", "is_cuda", "is_floating_point", "is_meta", "layout", "ndim"}
    | {"numel", "requires_grad", "shape", "size"}
)
EACH = "*"  # a place in a list

Path = tuple[str, ...]


def directly_read(model: nn.Module) -> dict[str, str]:
    """Names of the `nn.Linear` layers of `model` whose weight is read by what they are in, and the reader's class.

    Example:
        >>> sorted(directly_read(nn.TransformerEncoderLayer(8, 2)))
        ['linear1', 'linear2', 'self_attn.out_proj']
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if hasattr(
            module, "get_base_layer"
        ):  # an adapter of PEFT, which reads weights to merge: see `layers/adapters.py`
            continue
        owner: Any = type(module)
        for path in _weights_read_by(owner):
            for place, layer in _at(module, path):
                if isinstance(layer, nn.Linear):
                    found[f"{name}.{place}" if name else place] = type(module).__name__
                elif isinstance(getattr(layer, "base_layer", None), nn.Linear):  # under an adapter of PEFT
                    found[f"{name}.{place}.base_layer"] = type(module).__name__
    return found


def _at(module: nn.Module, path: Path) -> Iterator[tuple[str, nn.Module]]:
    """The modules at a path below `module`, by name; several where the path goes through a list."""
    if not path:
        yield "", module
        return
    for name, child in module.named_children():
        if path[0] in (name, EACH):
            for place, found in _at(child, path[1:]):
                yield f"{name}.{place}" if place else name, found


@lru_cache(maxsize=4096)
def _weights_read_by(owner: type[nn.Module]) -> frozenset[Path]:
    """Paths of the modules whose ``weight`` the methods of a class read, starting from `forward`."""
    methods: dict[str, ast.AST] = {}
    for base in owner.__mro__:
        if base is not nn.Module and base is not object:
            methods = {**_methods_of(base), **methods}
    reached, waiting, paths = set(), ["forward"], set()
    while waiting:
        method = waiting.pop()
        if method in reached or method not in methods:
            continue
        reached.add(method)
        paths |= set(_weights_in(methods[method]))
        waiting += _names_of_self(methods[method])
    return frozenset(paths)


def _methods_of(owner: type) -> dict[str, ast.AST]:
    definition = _classes_of(owner.__module__).get(owner.__qualname__)
    nodes = definition.body if definition is not None else []
    return {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}


@lru_cache(maxsize=512)
def _classes_of(module: str) -> dict[str, ast.ClassDef]:
    """The classes of a module by qualified name; none where there is no source, in a notebook's cell for example."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError, SyntaxError):
        return {}
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _weights_in(method: ast.AST) -> Iterator[Path]:
    """Paths of ``self.….weight`` in a method, also through a local name for a part of ``self``."""
    known: dict[str, Path] = {"self": ()}
    for node in ast.walk(method):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            _remember(known, node.targets[0], _path(node.value, known))
        elif isinstance(node, ast.For | ast.comprehension) and isinstance(node.target, ast.Name):
            path = _path(node.iter, known)
            _remember(known, node.target, None if path is None else (*path, EACH))
    parents = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
            path = _path(node.value, known)
            if path and not _is_harmless(parents.get(node)):
                yield path


def _remember(known: dict[str, Path], target: ast.Name, path: Path | None) -> None:
    if path:
        known[target.id] = path


def _path(node: ast.AST, known: dict[str, Path]) -> Path | None:
    """The path that an expression such as ``self.mlp.layers[i]`` stands for; None for others."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute | ast.Subscript):
        path = _path(node.value, known)
        step = node.attr if isinstance(node, ast.Attribute) else EACH
        return None if path is None else (*path, step)
    return None


def _is_harmless(parent: ast.AST | None) -> bool:
    if isinstance(parent, ast.Compare):
        return all(isinstance(operator, ast.Is | ast.IsNot) for operator in parent.ops)
    if isinstance(parent, ast.Call):
        return isinstance(parent.func, ast.Name) and parent.func.id in ("isinstance", "hasattr", "id", "type")
    return isinstance(parent, ast.Attribute) and parent.attr in HARMLESS


def _names_of_self(method: ast.AST) -> list[str]:
    """What a method takes from ``self`` by name, other methods among it."""
    return [
        node.attr
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    ]
