"""Plots as inline SVG by matplotlib: no script, no network, and the colors of the page's style sheet."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

from lora_kit.errors import escape_unprintable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import MaxNLocator

_SIZE: Final = (4.6, 2.2)
"""Width and height, inches."""

# The colors that matplotlib draws with. In the SVG each becomes a variable of the style sheet, so that the figure
# follows the page, light or dark.
_SOFT, _LINE, _MARK, _INK, *_CURVES = _COLORS = [f"#0000{number:02x}" for number in range(1, 9)]
_VARIABLES: Final = dict(zip(_COLORS, ("soft", "line", "mark", "ink", "c0", "c1", "c2", "c3"), strict=True))
MOST_LABELS: Final = 80
"""Labels of a confusion matrix that can be read."""
MOST_SMALL_LABELS: Final = 15
"""Labels of a confusion matrix that is as wide as half a page."""
_MOST_COUNTED: Final = 30
"""Labels of a confusion matrix that shows its counts as numbers."""


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
    with _draw(title, _SIZE) as (axes, drawn):
        _style_axes(axes, format_value)
        axes.xaxis.set_major_locator(_choose_whole_ticks())
        axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
        for curve, color in zip(curves, _CURVES, strict=False):
            _draw_curve(axes, curve, color)
        for mark in marks:
            _draw_mark(axes, mark)
        if any(curve.label for curve in curves):
            axes.legend(frameon=False, labelcolor=_SOFT)
    return _wrap(title, f"{title} over steps", drawn)


def plot_points(
    title: str, clouds: Sequence[Curve], *, names: tuple[str, str], is_log: bool = False, diagonal: bool = False
) -> str:
    """Return a figure element: points, a color for each cloud.

    Args:
        clouds: at most four.
        names: of the axes.
        is_log: whether the horizontal axis is logarithmic.
        diagonal: draw the line on which both values are equal.
    """
    with _draw(title, _SIZE) as (axes, drawn):
        _style_axes(axes, str)
        axes.set_xlabel(names[0], color=_SOFT)
        axes.set_ylabel(names[1], color=_SOFT)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
        values = [value for cloud in clouds for point in cloud.points for value in point]
        if diagonal and values:
            axes.plot([min(values), max(values)], [min(values), max(values)], color=_MARK, linestyle="--", linewidth=1)
        for cloud, color in zip(clouds, _CURVES, strict=False):
            if cloud.points:
                xs, ys = zip(*cloud.points, strict=True)
                axes.plot(xs, ys, "o", color=color, label=cloud.label, markersize=4, alpha=0.6)
        if is_log:
            _set_log_axis(axes)
        if len(clouds) > 1:
            axes.legend(frameon=False, labelcolor=_SOFT)
    return _wrap(title, title, drawn)


def plot_bars(title: str, names: Sequence[str], values: Sequence[float]) -> str:
    """Return a figure element: a horizontal bar for each name, the first at the top."""
    with _draw(title, (_SIZE[0], 0.6 + 0.16 * len(names))) as (axes, drawn):
        _style_axes(axes, str)
        axes.grid(visible=False, axis="y")
        axes.barh(range(len(names)), values, color=_CURVES[0], height=0.7)
        axes.set_yticks(range(len(names)), [_shorten(name, 40) for name in names], fontsize=6)
        axes.margins(y=0.6 / max(len(names), 1))
        axes.invert_yaxis()
    return _wrap(title, title, drawn)


def plot_confusion(title: str, counts: Sequence[Sequence[int]], labels: Sequence[str]) -> str:
    """Return a figure element: how often each label (a row) was taken for each (a column).

    A cell is the darker the greater its share of the row; what is right is blue, what is not orange.

    Args:
        counts: of the texts with the label of the row that got the label of the column.
        labels: at most `MOST_LABELS`.
    """
    from matplotlib.patches import Rectangle

    size = len(labels)
    side = min(9.0, 1.6 + 0.34 * size)
    font = max(4.5, min(8.0, 240 / max(size, 1)))
    with _draw(title, (side + 0.9, side)) as (axes, drawn):
        for row, own in enumerate(counts):
            total = sum(own)
            for column, count in enumerate(own):
                if not count:
                    continue
                color = _CURVES[0] if row == column else _CURVES[1]
                share = 0.15 + 0.55 * count / total
                axes.add_patch(
                    Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, color=color, alpha=share, linewidth=0)
                )
                if size <= _MOST_COUNTED:
                    axes.text(column, row, f"{count:,}", ha="center", va="center", color=_INK, fontsize=font)
        names = [_shorten(label, 28) for label in labels]
        axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), aspect="equal")
        axes.set_xticks(range(size), names, rotation=90, fontsize=font)
        axes.set_yticks(range(size), names, fontsize=font)
        axes.tick_params(colors=_SOFT, length=0)
        axes.set_xlabel("predicted", color=_SOFT)
        axes.set_ylabel("expected", color=_SOFT)
        axes.spines[:].set_color(_LINE)
    return _wrap(title, title, drawn, kind="matrix" if size > MOST_SMALL_LABELS else "small matrix")


@contextlib.contextmanager
def _draw(title: str, size: tuple[float, float]) -> Iterator[tuple[Axes, io.StringIO]]:
    """Yield axes to draw on, and what holds matplotlib's file after the block.

    The same drawing gives the same bytes. Texts stay texts, in the page's font. The ids in the file are hashes, salted
    so that they differ between figures.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 8}):
        figure = Figure(figsize=size, layout="constrained")
        buffer = io.StringIO()
        yield figure.add_subplot(), buffer
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})


def _wrap(title: str, described: str, drawn: io.StringIO, *, kind: str = "") -> str:
    owner = f' class="{kind}"' if kind else ""
    caption, figure = escape(escape_unprintable(title)), _embed(drawn.getvalue(), escape_unprintable(described))
    return f"<figure{owner}><figcaption>{caption}</figcaption>{figure}</figure>"


def _shorten(text: str, most: int) -> str:
    """Return a name without what matplotlib would take for mathematics, cut where it is long."""
    visible = escape_unprintable(text)
    short = visible if len(visible) <= most else f"{visible[: most - 1]}…"
    return short.replace("$", r"\$")


def _choose_whole_ticks() -> MaxNLocator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10])


def _set_log_axis(axes: Axes) -> None:
    """Make the horizontal axis logarithmic, with few ticks and plain numbers; minor ticks would overlap."""
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()


def _style_axes(axes: Axes, format_value: Callable[[float], str]) -> None:
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(_SOFT)
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.tick_params(colors=_SOFT, length=0)
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


def _embed(svg: str, described: str) -> str:
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
    return f'<svg {viewbox[0]} role="img" aria-label="{escape(described)}">{body}'
