"""Layers whose weight the modules around them read, without calling the layer: a wrapper around one would be ignored.

Nothing is known of families here, except of torch's own modules and of kernels, which show nothing to read: what a
module does with its layers stands in the source of its class.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import CodeType, FunctionType
from typing import Final

import torch
from torch import nn

from lora_kit.targets.match import Modules, find_paths_inside, is_within

_READ_BY_KERNELS: Final = ("x_proj", "dt_proj", "out_proj")
"""Linear layers of a state-space mixer (Mamba and its relatives) that reads their weight itself, always or on a GPU."""
_READ_BY_FAST_PATH: Final = ("linear1", "linear2")
"""Linear layers of nn.TransformerEncoderLayer whose weights its fast path hands to one kernel."""
_FACTS: Final = frozenset({"device", "dtype", "ndim", "requires_grad", "shape", "size", "dim", "is_meta", "numel"})
"""Attributes of a weight that tell nothing of its values."""

_IGNORED: Final = " and would ignore a wrapper"
_QUESTIONS: Final = ("isinstance", "hasattr")


def find_bypassed_layers(modules: Modules) -> dict[str, str]:
    """Return, by path, why some layers cannot be wrapped: another module reads their weight and does not call them."""
    bypassed = dict[str, str]()
    for path, module in modules:
        prefix, reason = f"{path}." if path else "", f"{_describe(module)} reads its weight directly{_IGNORED}"
        bypassed |= {prefix + name: reason for name in _list_bypassed_names(module)}
    tops = [path for path, module in modules if isinstance(module, nn.MultiheadAttention)]
    reason = f"nn.MultiheadAttention reads its weight directly{_IGNORED}"
    return bypassed | dict.fromkeys(find_paths_inside(modules, tops), reason)


def _describe(module: nn.Module) -> str:
    if isinstance(module, nn.TransformerEncoderLayer):
        return f"{type(module).__name__} without torch.backends.mha.set_fastpath_enabled(False)"
    return "a state-space mixer" if _is_mixer(module) else type(module).__name__


def _list_bypassed_names(module: nn.Module) -> Iterable[str]:
    if not module._modules:
        return ()
    if _is_mixer(module):
        return _READ_BY_KERNELS
    if isinstance(module, nn.TransformerEncoderLayer):
        return _READ_BY_FAST_PATH if _has_fast_path(module) else ()
    return find_read_names(type(module))  # type: ignore[arg-type]  # a class is hashable


def _is_mixer(module: nn.Module) -> bool:
    return {"A_log", "D"} <= module._parameters.keys()


def _has_fast_path(layer: nn.TransformerEncoderLayer) -> bool:
    """Return whether torch may compute a layer in evaluation mode by one kernel, which is given the weights."""
    is_enabled = torch.backends.mha.get_fastpath_enabled()
    return bool(is_enabled and layer.self_attn.batch_first and layer.activation_relu_or_gelu)


@functools.lru_cache(maxsize=4096)
def find_read_names(kind: type[nn.Module]) -> frozenset[str]:
    """Return names of layers of a class (`q_proj`, `attention.q_proj`) of which its forward only reads the weight.

    A layer that the class calls as well, or hands on to others, does not count: which of the two happens may depend on
    values. Nor is one of which only the dtype, the shape or the like is read.
    """
    methods = _collect_methods(kind)
    if not any(_reads_a_weight(each.__code__) for versions in methods.values() for each in versions):
        return frozenset()
    read, used = set[str](), set[str]()
    for tree in _parse_reachable(methods):
        for name, is_weight in _iterate_uses(tree):
            (read if is_weight else used).add(name)
    return frozenset(name for name in read if not any(is_within(name, top) for top in used))


def _collect_methods(kind: type[nn.Module]) -> dict[str, list[FunctionType]]:
    """Return the methods of a class by name, without torch's own; with each, those of its bases that it calls."""
    methods = dict[str, list[FunctionType]]()
    for base in reversed(kind.__mro__):
        if not base.__module__.startswith("torch."):
            for name, value in vars(base).items():
                method = inspect.unwrap(value) if isinstance(value, FunctionType) else None
                if isinstance(method, FunctionType):
                    inherited = methods.get(name, []) if "super" in method.__code__.co_names else []
                    methods[name] = [method, *inherited]
    return methods


def _reads_a_weight(code: CodeType) -> bool:
    return "weight" in code.co_names or any(_reads_a_weight(c) for c in code.co_consts if isinstance(c, CodeType))


def _parse_reachable(methods: Mapping[str, Sequence[FunctionType]]) -> Iterator[ast.AST]:
    """Yield the syntax trees of `forward` and of the methods that it refers to, directly or not."""
    pending, seen = ["forward"], set[str]()
    while pending:
        name = pending.pop()
        if name in methods and name not in seen:
            seen.add(name)
            for tree in map(_parse, methods[name]):
                pending += [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
                yield tree


def _parse(method: FunctionType) -> ast.AST:
    """Return the syntax tree of a method; an empty one where there is no source."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):
        return ast.Module([], [])


def _iterate_uses(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Yield (name, whether only its weight is read) of each use of `self.<name>`, without those of facts alone."""
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or (name := _name_in_self(node)) is None:
            continue
        parent = parents[node]
        if not isinstance(parent, ast.Attribute):
            if isinstance(node.ctx, ast.Load) and not _is_question(parent):
                yield name, False
        elif parent.attr == "weight" and isinstance(parent.ctx, ast.Load) and _reads_values(parent, parents):
            yield name, True


def _name_in_self(node: ast.Attribute) -> str | None:
    """Return `a.b` of `self.a.b`; None for other expressions."""
    inner = node.value
    if isinstance(inner, ast.Name):
        return node.attr if inner.id == "self" else None
    outer = _name_in_self(inner) if isinstance(inner, ast.Attribute) else None
    return None if outer is None else f"{outer}.{node.attr}"


def _reads_values(weight: ast.Attribute, parents: Mapping[ast.AST, ast.AST]) -> bool:
    """Return whether an expression reads more of a weight than its dtype, its shape or whether there is one."""
    parent = parents[weight]
    if isinstance(parent, ast.Attribute) and parent.attr == "data":
        parent = parents[parent]
    return parent.attr not in _FACTS if isinstance(parent, ast.Attribute) else not _is_question(parent)


def _is_question(node: ast.AST) -> bool:
    """Return whether an expression only asks what its part is: `x is None`, `isinstance(x, Linear)`."""
    if isinstance(node, ast.Compare):
        return any(isinstance(operator, (ast.Is, ast.IsNot)) for operator in node.ops)
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _QUESTIONS
