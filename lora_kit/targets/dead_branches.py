"""Branches of a method that a module never takes, because its own attributes and its mode decide so."""

from __future__ import annotations

import ast
import copy
import operator
from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import nn

_OPERATORS: Final[Mapping[type[ast.cmpop], Callable[[Any, Any], bool]]] = {
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_PLAIN: Final = (bool, int, float, str, type(None))


class _UnknownError(Exception):
    """The value depends on more than the module's attributes."""


def prune_branches(tree: ast.Module, module: nn.Module, *, training: bool) -> ast.Module:
    """Return a syntax tree without the branches that a module never takes in a mode.

    Only conditions on plain attributes count (`self.training and self.config.clip is not None`), with whatever values
    they have now.
    """
    pruned = _Pruner(module, training).visit(copy.deepcopy(tree))
    assert isinstance(pruned, ast.Module)
    return pruned


class _Pruner(ast.NodeTransformer):
    def __init__(self, module: nn.Module, training: bool) -> None:
        self._module = module
        self._training = training

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        """Replace a statement by the branch that is taken; keep both where that is not known."""
        taken = self._decide(node.test)
        if taken is None:
            return self.generic_visit(node)
        kept = ast.Module(node.body if taken else node.orelse, [])
        self.generic_visit(kept)
        return kept.body

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        """Replace an expression by the part that is taken."""
        taken = self._decide(node.test)
        if taken is None:
            return self.generic_visit(node)
        kept: ast.AST = self.visit(node.body if taken else node.orelse)
        return kept

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Leave out what comes after a branch that is always taken and returns."""
        self.generic_visit(node)
        ends = (place for place, each in enumerate(node.body) if isinstance(each, (ast.Return, ast.Raise)))
        del node.body[next(ends, len(node.body)) + 1 :]
        return node

    def _decide(self, test: ast.expr) -> bool | None:
        try:
            return bool(self._evaluate(test))
        except _UnknownError:
            return None

    def _evaluate(self, node: ast.expr) -> object:
        """Return the value of an expression.

        Raises:
            _UnknownError: it depends on more than the module's attributes.
        """
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Attribute):
            value = self._read(node)
            if isinstance(value, _PLAIN):
                return value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return not self._evaluate(node.operand)
        if isinstance(node, ast.BoolOp):
            return self._combine([self._decide(value) for value in node.values], isinstance(node.op, ast.Or))
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _OPERATORS:
            return self._compare(node)
        raise _UnknownError

    def _combine(self, values: list[bool | None], decisive: bool) -> bool:
        """Return what `or` (`and`) makes of values, where one that is true (false) decides."""
        if decisive in values:
            return decisive
        if None in values:
            raise _UnknownError
        return not decisive

    def _compare(self, node: ast.Compare) -> bool:
        left, right = self._evaluate(node.left), self._evaluate(node.comparators[0])
        try:
            return _OPERATORS[type(node.ops[0])](left, right)
        except TypeError:
            raise _UnknownError from None

    def _read(self, node: ast.expr) -> object:
        """Return the value of `self.a.b`."""
        if isinstance(node, ast.Name) and node.id == "self":
            return self._module
        if not isinstance(node, ast.Attribute):
            raise _UnknownError
        owner = self._read(node.value)
        if owner is self._module and node.attr == "training":
            return self._training
        try:
            value: object = getattr(owner, node.attr)
        except Exception:  # of a property, say
            raise _UnknownError from None
        return value
