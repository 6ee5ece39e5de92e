"""docs/models-scan.md: how many classes work, and why the others do not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import transformers

from tools.scan_models.trial import CUT, FAILS, NOT_TRIED, REFUSED, WORKS
from tools.scan_models.worker import CPU_SECONDS

PAGE: Final = Path(__file__).parents[2] / "docs" / "models-scan.md"
_HEAD: Final = """# Every class of transformers

Made by `make scan-models`, an opt-in job of an hour on one processor, which goes on where it was stopped. Of every
model class of transformers {version} it makes a tiny model with random weights, by shrinking the class's own default
config, finds inputs that it accepts, and tries adapters with `target_modules="all-linear"` on it (on all convolutions
where it has no linear layer), in fp32 on a CPU:

- attached, no output changes, bit for bit;
- a step of training changes B, and then A and B of a second adapter, in every layer whose own weight receives a
  gradient when the model is trained alone: no layer is bypassed;
- from one adapter to the other, to the base and back is bit for bit;
- a batch whose rows use two adapters gives what each gives alone, or is rejected with a reason;
- detached, outputs and keys are the base's; attached again, the second adapter gives the same outputs, bit for bit;
- merged in memory, the outputs are those of the adapter, or the merge is rejected with a reason.

A class has *no tiny model* where that model does not run or train by itself: its sizes depend on each other in ways
that shrinking does not know, it needs inputs that cannot be guessed, or a library that is not installed. It is *cut*
where it takes more than {seconds} s. Models of several kinds of input are given text alone where they accept that; how
many of the covered layers take part is in `benchmarks/results/models_scan.json`. What [models](models.md) says of the
families there is tested in more depth.
"""
_TITLES: Final = {WORKS: "works", REFUSED: "rejected", FAILS: "fails", CUT: "cut", NOT_TRIED: "no tiny model"}

Rows = Mapping[str, Mapping[str, str]]
"""Of each class its family and what was seen of it."""


def write_page(rows: Rows, *, total: int) -> None:
    """Write the page."""
    head = _HEAD.format(version=transformers.__version__, seconds=CPU_SECONDS)
    PAGE.write_text("\n".join([head, *_list_counts(rows, total), *_list_reasons(rows), *_list_families(rows)]) + "\n")


def _list_counts(rows: Rows, total: int) -> Iterator[str]:
    yield "| | classes | families |"
    yield "|---|---|---|"
    yield f"| reached | {len(rows)} of {total} | {len(_families_of(rows.values()))} |"
    for status, title in _TITLES.items():
        having = [row for row in rows.values() if row["status"] == status]
        yield f"| {title} | {len(having)} | {len(_families_of(having))} |"
    working = [row for row in rows.values() if row["status"] == WORKS]
    yield ""
    yield f"Of the {len(working)} that work, {sum(row['rows'] == 'yes' for row in working)} serve rows of different"
    yield f"adapters, and {sum(row['merge'] == 'yes' for row in working)} merge in memory."


def _families_of(rows: Iterable[Mapping[str, str]]) -> set[str]:
    return {row["family"] for row in rows}


def _list_reasons(rows: Rows) -> Iterator[str]:
    """Yield tables of what fails, is refused, cut or not tried: a row for each reason, with the classes."""
    for status, title in ((s, t) for s, t in _TITLES.items() if s != WORKS):
        yield from _list_table(title, {name: row["detail"] for name, row in rows.items() if row["status"] == status})
    for field, title in (("rows", "works, without rows of different adapters"), ("merge", "works, without a merge")):
        working = {name: row[field] for name, row in rows.items() if row["status"] == WORKS}
        yield from _list_table(title, {name: reason for name, reason in working.items() if reason != "yes"})


def _list_table(title: str, reasons: Mapping[str, str]) -> Iterator[str]:
    yield f"\n## {title[0].upper()}{title[1:]}\n"
    if not reasons:
        yield "None."
        return
    yield "| reason | classes |"
    yield "|---|---|"
    names_of: dict[str, list[str]] = {}
    for name, reason in sorted(reasons.items()):
        names_of.setdefault(_generalize(reason), []).append(name)
    for reason, names in sorted(names_of.items(), key=lambda item: (-len(item[1]), item[0])):
        yield f"| {_escape(reason)} | {', '.join(names)} |"


def _generalize(reason: str) -> str:
    """Return a reason without the numbers and the paths that differ from class to class."""
    reason = re.sub(r"the weight of \S+", "the weight of a layer", reason)
    return re.sub(r"(?<![\w.])\d[\d,]*(?![\w.])", "N", reason)


def _list_families(rows: Rows) -> Iterator[str]:
    """Yield a table with a row for each family: how many of its classes work, and what becomes of the others."""
    yield "\n## Families\n"
    yield "| family | classes | work | others |"
    yield "|---|---|---|---|"
    for family in sorted(_families_of(rows.values())):
        own = {name: row["status"] for name, row in rows.items() if row["family"] == family}
        others = Counter(_TITLES[status] for status in own.values() if status != WORKS)
        text = ", ".join(f"{count} {title}" for title, count in sorted(others.items()))
        yield f"| {family} | {len(own)} | {list(own.values()).count(WORKS)} | {text} |"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
