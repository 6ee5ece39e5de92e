"""The documents: figures that pages show follow from the code beside them, or stand in the benchmarks."""

from __future__ import annotations

import re
from typing import Any

from lora_kit.data.preparation.training_defaults import choose_learning_rate
from tests.support.pages import ROOT, blocks

HOW_TO = ROOT / "docs" / "how-to"
BENCHMARKS = (ROOT / "benchmarks" / "README.md").read_text("utf-8")


def test_the_table_of_memory_follows_from_the_formula_above_it() -> None:
    page, names = HOW_TO / "memory.md", dict[str, Any]()
    exec(blocks(page, "python")[0].code, names)
    rows = re.findall(r"^\| [^|]+: ([\d, ]+?)(, tied)? \| (.+) \|$", page.read_text("utf-8"), re.MULTILINE)
    assert len(rows) == 6
    for shape, tied, figures in rows:
        sizes = names["reckon"](*map(int, shape.split(",")), tied=bool(tied))
        assert [f"{size:.1f}" for size in sizes] == figures.split(" | ")


def test_the_learning_rates_are_those_that_prepare_writes() -> None:
    rows = re.findall(r"^\| (\d+) \| (\S+) \| (\S+) \|$", (HOW_TO / "tune.md").read_text("utf-8"), re.MULTILINE)
    assert len(rows) == 7
    for width, texts, labels in rows:
        assert float(texts) == choose_learning_rate(int(width)), width
        assert float(labels) == choose_learning_rate(int(width), has_labels=True), width


def test_the_comparison_of_methods_has_figures_of_the_benchmarks() -> None:
    text = (HOW_TO / "methods.md").read_text("utf-8")
    figure = r"([\d.,]+(?: %| MB)?)"
    rows = re.findall(rf"^\| [^|]+ \| {figure} \| {figure} \| {figure} \|$", text, re.MULTILINE)
    figures = [figure for row in rows for figure in row]
    assert len(figures) == 15
    rounded = {f"{float(number):.2f}" for number in re.findall(r"\| (\d\.\d{3})(?= \|)", BENCHMARKS)}
    assert not [figure for figure in figures if figure not in BENCHMARKS and figure not in rounded]
