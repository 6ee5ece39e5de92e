"""Layers whose weight the modules around them read, without calling the layer: a wrapper around one would be ignored.

Nothing is known of families here, except of torch's own modules and of kernels, which show nothing to read: what a
module does with its layers stands in the source of its class.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import CodeType, FunctionType
from typing import Final

import torch
from torch import nn

from lora_kit.layers.introspect import find_module, unwrap_module
from lora_kit.targets.dead_branches import prune_branches
from lora_kit.targets.match import Modules, find_paths_inside, is_within

_READ_BY_KERNELS: Final = ("x_proj", "dt_proj", "out_proj")
"""Linear layers of a state-space mixer (Mamba and its relatives) that reads their weight itself, always or on a GPU."""
_READ_BY_FAST_PATH: Final = ("linear1", "linear2")
"""Linear layers of nn.TransformerEncoderLayer whose weights its fast path hands to one kernel."""
_FACTS: Final = frozenset({"device", "dtype", "ndim", "requires_grad", "shape", "size", "dim", "is_meta", "numel"})
"""Attributes of a weight that tell nothing of its values."""

_IGNORED: Final = " and would ignore a wrapper"
_CHANGED: Final = ", and would not change a wrapper's"
_IS_IN_PLACE: Final = re.compile("[a-z]_$")
_QUESTIONS: Final = ("isinstance", "hasattr")


def find_bypassed_layers(modules: Modules, *, training: bool) -> dict[str, str]:
    """Return, by path, why some layers cannot be wrapped: another module reads their weight and does not call them.

    Args:
        training: whether an adapter there is to be trained; else it is only used.
    """
    bypassed, entries = dict[str, str](), _find_entries(frozenset(type(module) for _, module in modules))
    for path, module in modules:
        if not module._modules:
            continue
        prefix, reason = f"{path}." if path else "", f"{_describe(module)} reads its weight directly{_IGNORED}"
        bypassed |= {prefix + name: reason for name in _list_bypassed_names(module, entries, training)}
        bypassed |= dict.fromkeys(
            _find_paths_ending(modules, prefix, find_changed_names(module, entries)),
            f"{type(module).__name__} changes its weight in place{_CHANGED}",
        )
    tops = [path for path, module in modules if isinstance(module, nn.MultiheadAttention)]
    reason = f"nn.MultiheadAttention reads its weight directly{_IGNORED}"
    return bypassed | dict.fromkeys(find_paths_inside(modules, tops), reason)


def find_read_layers(modules: Modules) -> set[nn.Module]:
    """Return layers whose weight another module reads, where it may call them as well.

    Of a module that reads a weight of which its source does not say whose it is, all layers inside it count. PEFT's own
    classes do not count: they read weights to merge them, never in a forward.
    """
    entries, found = _find_entries(frozenset(type(module) for _, module in modules)), set[nn.Module]()
    for _, module in modules:
        is_reader = module._modules and not type(module).__module__.startswith("peft.")
        names = _find_names_read(type(module), entries) if is_reader else ()  # type: ignore[arg-type]
        for name in names:
            if name is None:
                found |= set(module.modules())
            else:
                with contextlib.suppress(AttributeError):  # not every configuration has it
                    found.add(unwrap_module(find_module(module, name)))
    return found


@functools.lru_cache(maxsize=4096)
def _find_names_read(kind: type[nn.Module], entries: frozenset[str]) -> frozenset[str | None]:
    """Return names of the layers whose weight a class reads; None among them for one that its source does not name."""
    trees = _parse_readers(kind, entries)  # type: ignore[arg-type]
    return frozenset(_name_in_self(node) for tree in trees for node in _iterate_reads(tree))


def find_changed_names(module: nn.Module, entries: frozenset[str]) -> set[str]:
    """Return names (`attention.output`) of layers, inside the parts of a module, whose weight it changes in place.

    RWKV does so whenever its mode changes: in either mode counts.
    """
    trees = _parse_readers(type(module), entries)  # type: ignore[arg-type]
    if not any(True for tree in trees for _ in _iterate_changed(tree)):
        return set()
    pruned = [prune_branches(tree, module, training=mode) for tree in trees for mode in (True, False)]
    return {name for tree in pruned for name in _iterate_changed(tree)}


def _find_paths_ending(modules: Modules, prefix: str, names: Iterable[str]) -> list[str]:
    return [path for name in names for path, _ in modules if path.startswith(prefix) and path.endswith(f".{name}")]


def _iterate_changed(tree: ast.AST) -> Iterator[str]:
    """Yield `a.b` of each `block.a.b.weight.mul_(...)`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _IS_IN_PLACE.search(node.func.attr):
            owner, _, name = ast.unparse(node.func.value).removesuffix(".data").rpartition(".")
            if name == "weight" and "." in owner:
                yield owner.partition(".")[2]


def _describe(module: nn.Module) -> str:
    if isinstance(module, nn.TransformerEncoderLayer):
        return f"{type(module).__name__} without torch.backends.mha.set_fastpath_enabled(False)"
    return "a state-space mixer" if _is_mixer(module) else type(module).__name__


def _list_bypassed_names(module: nn.Module, entries: frozenset[str], training: bool) -> Iterable[str]:
    if _is_mixer(module):
        return _READ_BY_KERNELS
    if isinstance(module, nn.TransformerEncoderLayer):
        return _READ_BY_FAST_PATH if _has_fast_path(module) else ()
    return find_read_names(module, entries, training=training)


def _is_mixer(module: nn.Module) -> bool:
    return {"A_log", "D"} <= module._parameters.keys()


def _has_fast_path(layer: nn.TransformerEncoderLayer) -> bool:
    """Return whether torch may compute a layer in evaluation mode by one kernel, which is given the weights."""
    is_enabled = torch.backends.mha.get_fastpath_enabled()
    return bool(is_enabled and layer.self_attn.batch_first and layer.activation_relu_or_gelu)


def find_read_names(
    module: nn.Module, entries: frozenset[str] = frozenset({"forward"}), *, training: bool = True
) -> set[str]:
    """Return names of a module's layers (`q_proj`, `attention.q_proj`) of which it only reads the weight.

    A layer that the module calls as well, or hands on to others, does not count: which of the two happens may depend on
    values. What depends on the module's own attributes and on its mode does not happen at all, or always. Nor does a
    layer count of which only the dtype, the shape or the like is read.

    Args:
        entries: methods by which the module is used.
        training: the mode.
    """
    trees = _parse_readers(type(module), entries)  # type: ignore[arg-type]  # a class is hashable
    pruned = [prune_branches(tree, module, training=training) for tree in trees]
    return _find_only_read(trees) | _find_only_read(pruned)


def _find_only_read(trees: Iterable[ast.Module]) -> set[str]:
    read, used = set[str](), set[str]()
    for tree in trees:
        for name, is_weight in _iterate_uses(tree):
            (read if is_weight else used).add(name)
    return {name for name in read if not any(is_within(name, top) for top in used)}


@functools.lru_cache(maxsize=4096)
def _parse_readers(kind: type[nn.Module], entries: frozenset[str]) -> tuple[ast.Module, ...]:
    """Return the syntax trees of what a class computes with; none where no weight of a layer is read."""
    methods = _collect_methods(kind)  # type: ignore[arg-type]
    if not any(_reads_a_weight(each.__code__) for versions in methods.values() for each in versions):
        return ()
    trees = tuple(_parse_reachable(methods, entries))
    return trees if any(True for tree in trees for _ in _iterate_reads(tree)) else ()


@functools.lru_cache(maxsize=256)
def _find_entries(kinds: frozenset[type[nn.Module]]) -> frozenset[str]:
    """Return names of the methods that forwards of modules of these classes refer to, directly or not.

    Not every module is used by its `forward`: that of another may call its other methods.
    """
    methods = [_collect_methods(kind) for kind in kinds]  # type: ignore[arg-type]
    pending, seen = {"forward"}, set[str]()
    while pending:
        name = pending.pop()
        seen.add(name)
        codes = [each.__code__ for own in methods for each in own.get(name, ())]
        pending |= {each for code in codes for each in _list_names(code) if any(each in own for own in methods)} - seen
    return frozenset(seen)


def _list_names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _list_names(inner)


@functools.lru_cache(maxsize=4096)
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


def _parse_reachable(methods: Mapping[str, Sequence[FunctionType]], entries: Iterable[str]) -> Iterator[ast.Module]:
    """Yield the syntax trees of some methods and of those that they refer to, directly or not."""
    pending, seen = list(entries), set[str]()
    while pending:
        name = pending.pop()
        if name in methods and name not in seen:
            seen.add(name)
            for tree in map(_parse, methods[name]):
                pending += [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
                yield tree


def _parse(method: FunctionType) -> ast.Module:
    """Return the syntax tree of a method; an empty one where there is no source."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):
        return ast.Module([], [])


def _iterate_uses(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Yield (name, whether only its weight is read) of each use of `self.<name>`, without those of facts alone."""
    parents = _parents_of(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or (name := _name_in_self(node)) is None:
            continue
        parent = parents[node]
        if not isinstance(parent, ast.Attribute) and isinstance(node.ctx, ast.Load) and not _is_question(parent):
            yield name, False
    for read in _iterate_reads(tree):
        if (name := _name_in_self(read)) is not None:
            yield name, True


def _iterate_reads(tree: ast.AST) -> Iterator[ast.expr]:
    """Yield the `x` of each `x.weight` of which the values are read."""
    parents = _parents_of(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
            is_own = isinstance(node.value, ast.Name) and node.value.id == "self"
            if not is_own and _reads_values(node, parents):
                yield node.value


def _parents_of(tree: ast.AST) -> dict[ast.AST, ast.AST]:
    return {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}


def _name_in_self(node: ast.expr) -> str | None:
    """Return `a.b` of `self.a.b`, and `a.0` of `self.a[0]`; None for other expressions."""
    if isinstance(node, ast.Subscript):
        outer, key = _name_in_self(node.value), node.slice
        place = key.value if isinstance(key, ast.Constant) else None
        return f"{outer}.{place}" if outer is not None and isinstance(place, (int, str)) else None
    if not isinstance(node, ast.Attribute):
        return None
    inner = node.value
    if isinstance(inner, ast.Name):
        return node.attr if inner.id == "self" else None
    outer = _name_in_self(inner)
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
