"""Curves over steps as inline SVG by matplotlib: no script, no network, and the colors of the page's style sheet."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE: Final = (5.2, 2.3)
"""Width and height, inches."""

# The colors that matplotlib draws with. In the SVG each becomes a variable of the style sheet, so that the figure
# follows the page, light or dark.
_SOFT, _LINE, _MARK, *_CURVES = _COLORS = [f"#0000{number:02x}" for number in range(1, 8)]
_VARIABLES: Final = dict(zip(_COLORS, ("soft", "line", "mark", "c0", "c1", "c2", "c3"), strict=True))


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        label: in the legend; empty for a chart of one curve.
        points: (step, value).
        dots: whether each point is marked: few points, each of which was measured by itself.
    """

    label: str
    points: Sequence[tuple[float, float]]
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """A step at which something happened."""

    step: float
    label: str


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def plot_curves(
    title: str, curves: Sequence[Curve], *, format_value: Callable[[float], str] = str, marks: Sequence[Mark] = ()
) -> str:
    """Return a figure element: a title, axes, a legend where curves have labels, a line for each mark.

    The same arguments give the same bytes.

    Args:
        curves: at most four, with at least one finite point between them.
        format_value: writes a value on the axis.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # Texts stay texts, in the page's font. The ids in the SVG are hashes, salted so that they differ between figures.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 8}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        _style_axes(axes, format_value)
        for curve, color in zip(curves, _CURVES, strict=False):
            _draw_curve(axes, curve, color)
        for mark in marks:
            _draw_mark(axes, mark)
        if any(curve.label for curve in curves):
            axes.legend(frameon=False, labelcolor=_SOFT)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return f"<figure><figcaption>{escape(title)}</figcaption>{_embed(buffer.getvalue(), title)}</figure>"


def _style_axes(axes: Axes, format_value: Callable[[float], str]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(_SOFT)
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.tick_params(colors=_SOFT, length=0)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: format_value(value))


def _draw_curve(axes: Axes, curve: Curve, color: str) -> None:
    points = [point for point in curve.points if math.isfinite(point[1])]
    if points:
        marker = "o" if curve.dots or len(points) == 1 else ""
        axes.plot(*zip(*points, strict=True), color=color, label=curve.label, marker=marker, markersize=4)


def _draw_mark(axes: Axes, mark: Mark) -> None:
    """Draw a dashed line at a step, its label on the side where there is more space."""
    axes.axvline(mark.step, color=_MARK, linestyle="--", linewidth=0.8)
    left = mark.step > sum(axes.get_xlim()) / 2
    axes.annotate(mark.label, (mark.step, 1), (-3 if left else 3, 0), xycoords=("data", "axes fraction"),
                  textcoords="offset points", ha="right" if left else "left", va="top", color=_MARK)  # fmt: skip


def _embed(svg: str, title: str) -> str:
    """Return matplotlib's file as an element of a page: without prolog, addresses, fonts and a fixed size.

    Clip paths go too, since a page with a strict policy has no `url(…)`: the axes are as wide as their curves.
    """
    viewbox = re.search(r'viewBox="[^"]*"', svg)
    assert viewbox is not None
    body = svg[svg.index("<defs>") :]
    body = re.sub(r"<defs>\s*<(style|clipPath)\b.*?</defs>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r' clip-path="[^"]*"| id="[\w.]+_\d+"|font-family: [^;"]*; ', "", body)
    for color, variable in _VARIABLES.items():
        body = body.replace(color, f"var(--{variable})")
    return f'<svg {viewbox[0]} role="img" aria-label="{escape(title)} over steps">{body}'
