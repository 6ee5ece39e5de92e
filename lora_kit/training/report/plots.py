"""Curves over steps as inline SVG: no script, no network; colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

WIDTH, HEIGHT = 520, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 30
_MOST_POINTS: Final = 400

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        label: in the legend; empty for a chart of one curve.
        points: (step, value).
        dots: whether each point is marked: few points, each of which was measured by itself.
    """

    label: str
    points: Points
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """A step at which something happened."""

    step: float
    label: str


def chart(
    title: str, curves: Sequence[Curve], *, shown: Callable[[float], str] = str, marks: Sequence[Mark] = ()
) -> str:
    """A figure with a title, axes, a legend where there are several curves, and a mark for what happened on the way.

    Args:
        curves: with one finite point at least between them.
        shown: a value in words, for the axis.
    """
    curves = [Curve(curve.label, thinned(_finite(curve.points)), curve.dots) for curve in curves]
    steps = [step for curve in curves for step, _ in curve.points] + [mark.step for mark in marks]
    values = [value for curve in curves for _, value in curve.points]
    across, up = _Axis(0, max(*steps, 1), _LEFT, WIDTH - _RIGHT), _Axis.around(values, HEIGHT - _BOTTOM, _TOP)
    parts = [_grid(across, up, shown)]
    parts += [_mark(mark, across) for mark in marks]
    parts += [_curve(number, curve, across, up, shown) for number, curve in enumerate(curves) if curve.points]
    legend = "".join(
        f'<span class="key c{number}">{escape(curve.label)}</span>'
        for number, curve in enumerate(curves)
        if curve.label
    )
    return (
        f"<figure><figcaption>{escape(title)}{legend}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} over steps">'
        f"{''.join(parts)}</svg></figure>"
    )


@dataclass(frozen=True)
class _Axis:
    """Values from `low` to `high` on pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float) -> _Axis:
        """An axis with some air around the values."""
        low, high = min(values), max(values)
        air = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        return cls(0.0 if 0 <= low < air else low - air, high + air, start, end)

    def at(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)


def _grid(across: _Axis, up: _Axis, shown: Callable[[float], str]) -> str:
    lines = [f'<path class="axis" d="M{_LEFT} {HEIGHT - _BOTTOM}H{WIDTH - _RIGHT}"/>']
    for value in ticks(up.low, up.high):
        y = up.at(value)
        lines.append(f'<path class="grid" d="M{_LEFT} {y}H{WIDTH - _RIGHT}"/>')
        lines.append(f'<text class="y" x="{_LEFT - 7}" y="{y + 4}">{escape(shown(value))}</text>')
    for value in ticks(across.low, across.high):
        if value == int(value):
            lines.append(f'<text class="x" x="{across.at(value)}" y="{HEIGHT - 9}">{int(value):,}</text>')
    return "".join(lines)


def _mark(mark: Mark, across: _Axis) -> str:
    x = across.at(mark.step)
    anchor = "end" if x > WIDTH / 2 else "start"
    place = x - 4 if anchor == "end" else x + 4
    return (
        f'<path class="mark" d="M{x} {_TOP}V{HEIGHT - _BOTTOM}"/>'
        f'<text class="mark" style="text-anchor:{anchor}" x="{place}" y="{_TOP + 8}">{escape(mark.label)}</text>'
    )


def _curve(number: int, curve: Curve, across: _Axis, up: _Axis, shown: Callable[[float], str]) -> str:
    places = [(across.at(step), up.at(value)) for step, value in curve.points]
    path = "M" + "L".join(f"{x} {y}" for x, y in places)
    drawn = f'<path class="line c{number}" d="{path}"/>' if len(places) > 1 else ""
    if not curve.dots and drawn:
        return drawn
    for (x, y), (step, value) in zip(places, curve.points, strict=True):
        told = escape(f"step {step:,.0f}: {shown(value)}")
        drawn += f'<circle class="c{number}" cx="{x}" cy="{y}" r="3"><title>{told}</title></circle>'
    return drawn


def ticks(low: float, high: float) -> list[float]:
    """Two to six round numbers between two."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def thinned(points: Points) -> Points:
    """A few hundred points that look the same: of each stretch the lowest and the highest."""
    if len(points) <= _MOST_POINTS:
        return points
    size = math.ceil(len(points) / (_MOST_POINTS / 2))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
    return kept


def _finite(points: Points) -> Points:
    return [(step, value) for step, value in points if math.isfinite(value)]
