"""Chat templates compiled so that they end: bounded in steps and in what they build.

The environment is that of transformers: its sandbox, its filters, its `{% generation %}` tag. A template that comes
with a model may still loop for hours, or double a text until memory is full. So every round of a loop and every call
of a macro is counted, and what may make a text long (`*`, `+`, `~`, filters, methods) is checked before it does.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

MAX_STEPS: Final = 400_000
"""Rounds of loops and calls of macros while one conversation is rendered."""
MAX_LENGTH: Final = 2**24
"""Characters of a text, items of a list, and bits of a number that a template builds."""
_LONG_NUMBER: Final = re.compile(r"\d{7}")
"""A width in a format that would make a text of millions of characters."""
_steps: ContextVar[list[int]] = ContextVar("steps")


class TemplateLimitError(jinja2.TemplateError):
    """A template goes on for too long, or builds something too large."""


@functools.lru_cache(maxsize=64)
def compile_template(text: str) -> jinja2.Template:
    """Return a compiled chat template that counts its steps.

    Raises:
        jinja2.TemplateError: the text is not a template.
    """
    from transformers.utils.chat_template_utils import _cached_compile_jinja_template

    # An environment of its own, not yet used on the text: compiling computes what is constant.
    environment: Any = _cached_compile_jinja_template("").environment
    environment.count_step, environment.join_texts = _count_step, _join_texts
    environment.intercepted_binops = frozenset(_BINARY)
    environment.binop_table = {**environment.binop_table, **_BINARY}
    environment.filters = {name: _limit_filter(name, each) for name, each in environment.filters.items()}
    environment.call, environment.finalize = _limit_calls(environment.call), _check_output
    tree = _Instrument(environment).visit(environment.parse(text))
    code = environment.compile(tree)
    return jinja2.Template.from_code(environment, code, environment.make_globals(None))


def render_template(template: jinja2.Template, variables: dict[str, object]) -> str:
    """Return what a compiled template renders.

    Raises:
        TemplateLimitError: it takes too many steps, or its output is too long.
    """
    token = _steps.set([0])
    try:
        pieces, length = [], 0
        for piece in template.generate(**variables):
            pieces.append(piece)
            length = check_size(length + len(piece))
        return "".join(pieces)
    finally:
        _steps.reset(token)


def render_marks(template: jinja2.Template, variables: dict[str, object]) -> list[tuple[int, int]]:
    """Return where the rendered text is marked as generated: (start, end) in characters."""
    from transformers.utils.chat_template_utils import _render_with_assistant_indices

    token = _steps.set([0])
    try:
        marks: list[tuple[int, int]] = _render_with_assistant_indices(compiled_template=template, **variables)[1]
        return marks
    finally:
        _steps.reset(token)


def check_size(size: int) -> int:
    """Return a size; raise TemplateLimitError if it is over the limit."""
    if size > MAX_LENGTH:
        raise TemplateLimitError(f"the template builds more than {MAX_LENGTH:,} characters or items")
    return size


def _count_step() -> None:
    steps = _steps.get([0])
    steps[0] += 1
    if steps[0] > MAX_STEPS:
        raise TemplateLimitError(f"the template takes more than {MAX_STEPS:,} steps")


class _Instrument(NodeTransformer):
    """Puts a count into every loop and macro, and a check around every `~`."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self._environment = environment

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._count(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._count(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._count(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("join_texts", node.nodes, node.lineno)

    def _count(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        step = nodes.ExprStmt(self._call("count_step", [], node.lineno)).set_lineno(node.lineno)
        node.body.insert(0, step.set_environment(self._environment))
        return node

    def _call(self, name: str, args: Sequence[nodes.Expr], line: int) -> nodes.Call:
        call = nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)
        call.set_lineno(line, override=False).set_environment(self._environment)
        return call


# What may become large


def _join_texts(*parts: object) -> str:
    texts = [str(_check_output(part)) for part in parts]
    check_size(sum(map(len, texts)))
    return "".join(texts)


def _add(left: Any, right: Any) -> object:
    if isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
        check_size(len(left) + len(right))
    return left + right


def _multiply(left: Any, right: Any) -> object:
    for items, times in ((left, right), (right, left)):
        if isinstance(items, (str, list, tuple)) and isinstance(times, int):
            check_size(len(items) * max(0, times))
    _check_bits(left, right, operator.add)
    return left * right


def _power(left: Any, right: Any) -> object:
    _check_bits(left, right, lambda bits, _: bits * abs(right))
    return left**right


def _check_bits(left: object, right: object, combine: Callable[[int, int], int]) -> None:
    if isinstance(left, int) and isinstance(right, int):
        check_size(combine(left.bit_length(), right.bit_length()))


def _remainder(left: Any, right: Any) -> object:
    if isinstance(left, str):
        _check_format(left)
    return left % right


_BINARY: Final[dict[str, Callable[[Any, Any], object]]] = {
    "+": _add,
    "*": _multiply,
    "**": _power,
    "%": _remainder,
}


def _check_format(text: str) -> None:
    if _LONG_NUMBER.search(text) or "*" in text:
        raise TemplateLimitError(f"the template formats with a width of more than {10**6:,} characters")


def _limit_filter(name: str, function: Callable[..., object]) -> Callable[..., object]:
    """Return a filter that checks what it is given before it works, and its result."""

    @functools.wraps(function)
    def call_within_limits(*args: object, **options: object) -> object:
        values = [_check_output(value) for value in args if isinstance(value, (str, int, list, tuple, dict))]
        _check_arguments(name, values, [*values[1:], *options.values()])
        return _check_result(function(*args, **options))

    return call_within_limits


def _limit_calls(call: Callable[..., object]) -> Callable[..., object]:
    """Return the sandbox's way to call a method or a function, with the same checks."""

    def call_within_limits(context: object, called: object, *args: object, **options: object) -> object:
        own = getattr(getattr(called, "__wrapped__", called), "__self__", None)  # the sandbox wraps `format`
        if isinstance(own, (str, list, tuple)):
            _check_arguments(getattr(called, "__name__", ""), [own, *args], [*args, *options.values()])
        return _check_result(call(context, called, *args, **options))

    return call_within_limits


def _check_arguments(name: str, values: Sequence[Any], rest: Sequence[object]) -> None:
    """Raise TemplateLimitError if a filter or a method would build something too large.

    Args:
        name: of the filter or method.
        values: what it works on, first, and its arguments.
        rest: its arguments.
    """
    for value in rest:
        if isinstance(value, int):
            check_size(abs(value))
    if name in ("format", "format_map") and values and isinstance(values[0], str):
        _check_format(values[0])
    if name == "replace" and len(values) > 2 and all(isinstance(value, str) for value in values[:3]):
        text, old, new = values[:3]
        check_size(len(text) + text.count(old) * len(new))
    if name == "join":
        texts = next((value for value in values if isinstance(value, (list, tuple))), ())
        longest = max((len(value) for value in values if isinstance(value, str)), default=0)
        check_size(sum(len(item) if isinstance(item, str) else 1 for item in texts) + longest * len(texts))
    if name == "indent" and values and isinstance(values[0], str):
        widths = [len(value) if isinstance(value, str) else value for value in rest if isinstance(value, (int, str))]
        check_size(len(values[0]) + max(widths, default=4) * (values[0].count("\n") + 1))


def _check_output(value: object) -> object:
    """Return a value that becomes text; raise TemplateLimitError if it holds too many items, however deep."""
    waiting, length, items = [value], 0, 0
    while waiting:
        item = waiting.pop()
        if isinstance(item, (dict, list, tuple)):
            waiting += [*item, *item.values()] if isinstance(item, dict) else item
        items += 1
        length = check_size(length + (len(item) if isinstance(item, str) else 1))
        if items > MAX_STEPS:
            raise TemplateLimitError(f"the template writes a value of more than {MAX_STEPS:,} items")
    return value


def _check_result(result: object) -> object:
    if isinstance(result, (str, list, tuple, dict)):
        check_size(len(result))
    return result
