"""A comparison of two adapters as a page."""

from __future__ import annotations

import json

from lora_kit.algebra.compare import Comparison
from lora_kit.reporting.page import (
    Fact,
    render_charts,
    render_events,
    render_facts,
    render_page,
    render_section,
    render_table,
)
from lora_kit.reporting.plots import can_plot, plot_bars

_MOST_BARS = 60
"""Layers in the picture."""
_COLUMNS = (
    "Cosine: 1 where both adapters change the layer in the same way, 0 where their changes have nothing in common. "
    "Inputs, outputs: which share of the directions that they read, and write, is the same. "
    "‖delta‖: the size of the change."
)


def render_compare_page(comparison: Comparison, names: tuple[str, str]) -> str:
    """Return the page of a comparison.

    Args:
        names: of the two adapters.
    """
    layers = comparison.layers
    alone = [
        f"Only in {name}: {', '.join(paths)}." for name, paths in zip(names, comparison.alone, strict=True) if paths
    ]
    rows = [
        (path, f"{like.cosine:+.3f}", f"{like.inputs:.3f}", f"{like.outputs:.3f}", *(f"{n:.4g}" for n in like.norms))
        for path, like in layers.items()
    ]
    header = ("layer", "cosine", "inputs", "outputs", *(f"‖delta‖ {name}" for name in names))
    configs = [(key, _show(first), _show(second)) for key, (first, second) in comparison.configs.items()]
    return render_page(
        f"{names[0]} and {names[1]}",
        "two adapters of one base, layer by layer",
        [
            render_facts(_list_facts(comparison)),
            render_events(alone),
            _render_cosines(comparison),
            render_section("Layers", render_table(header, rows, numbers=True), note=_COLUMNS),
            render_section("What differs in their configs", render_table(("field", *names), configs)),
            render_section("Modules saved whole", render_table(("tensor", "how"), list(comparison.saved.items()))),
        ],
        summary=_summarize(comparison.cosine),
    )


def _summarize(cosine: float) -> str:
    word = "alike" if cosine > 0.5 else "opposed" if cosine < -0.5 else "nearly unrelated" if abs(cosine) < 0.1 else ""
    said = f"All updates together have the cosine {cosine:+.3f}"
    return f"{said}: the adapters are {word}." if word else f"{said}: the adapters share a part."


def _list_facts(comparison: Comparison) -> list[Fact]:
    first, second = comparison.alone
    return [
        Fact("cosine of all updates", f"{comparison.cosine:+.4f}", "1 the same direction, 0 none, -1 opposite"),
        Fact("layers of both", f"{len(comparison.layers):,}", f"{len(first) + len(second):,} of one only"),
    ]


def _render_cosines(comparison: Comparison) -> str:
    if not can_plot() or not comparison.layers:
        return ""
    ordered = sorted(comparison.layers.items(), key=lambda item: item[1].cosine)[:_MOST_BARS]
    plot = plot_bars("cosine of the layers", [path for path, _ in ordered], [like.cosine for _, like in ordered])
    return render_section("Where they differ most", render_charts([plot]), note="The most different layers first.")


def _show(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
