"""The tables of docs/reliability.md: what was tried and survived, from the results."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks import harness
from tests.faults.beside_peft import DIES, HANGS, LOADS, RAISES, WARNS

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


def fill() -> None:
    """Write every table whose result is there into the page."""
    for name, format_result in TABLES.items():
        path = harness.RESULTS / f"{name}.json"
        if path.is_file():
            harness.fill(PAGE, format_result(json.loads(path.read_text(encoding="utf-8"))), mark=name)


def format_faults(result: Mapping[str, Any]) -> str:
    """Return a row for each area, and one for all: tried, survived, and what PEFT does with the same files."""
    areas = [(area, records) for area, records in result["areas"].items() if records]
    everything = [record for _, records in areas for record in records]
    rows = [_format_area(area, records) for area, records in [*areas, ("together", everything)]]
    head = ("area", "tried", "on the command line", "survived", "PEFT was given", "it raises", "loads with a warning")
    return harness.table((*head, "loads silently", "hangs or dies"), rows)


def _format_area(area: str, records: Sequence[Mapping[str, Any]]) -> list[str]:
    # Where the right thing is to go on, there is nothing that PEFT might miss.
    beside = [record["peft"] for record in records if "peft" in record and record["expected"] != "goes on"]
    counts = Counter(beside)
    shown = [len(beside), counts[RAISES], counts[WARNS], counts[LOADS], counts[HANGS] + counts[DIES]]
    by_command = sum(record["command"] for record in records)
    survived = sum(not record["lost"] for record in records)
    return [area, *map(str, (len(records), by_command, survived)), *(str(n) if beside else "–" for n in shown)]


def format_fuzzing(result: Mapping[str, Any]) -> str:
    """Return a row for each reader: cases, seconds of computing, faults."""
    rows = [
        [one["reader"], f"{one['cases']:,}", str(one["seconds"]), "yes" if one["guided"] else "no", str(one["faults"])]
        for one in result["readers"]
    ]
    total = [str(sum(one[key] for one in result["readers"])) for key in ("seconds", "faults")]
    cases = sum(one["cases"] for one in result["readers"])
    rows.append(["together", f"{cases:,}", total[0], "", total[1]])
    return harness.table(("reader", "cases", "seconds of computing", "guided by coverage", "faults"), rows)


def format_kills(result: Mapping[str, Any]) -> str:
    """Return a row for each kind of work that was killed."""
    keys = ("kills", "in_the_work", "whole", "mixtures", "same_bytes")
    rows = [[one["work"], *(str(one[key]) for key in keys)] for one in result["works"]]
    rows.append(["together", *(str(sum(one[key] for one in result["works"])) for key in keys)])
    head = ("work", "kills", "while it worked", "old or new result whole", "mixtures", "finished in the same bytes")
    return harness.table(head, rows)


def format_flips(result: Mapping[str, Any]) -> str:
    """Return a row for each artifact whose bits were flipped."""
    found = [
        [one["files"], one["bytes"], one["flips"], one["flips"] - len(one["unseen"])] for one in result["artifacts"]
    ]
    rows = [
        [one["artifact"], *(f"{count:,}" for count in counts)]
        for one, counts in zip(result["artifacts"], found, strict=True)
    ]
    rows.append(["together", *(f"{sum(column):,}" for column in zip(*found, strict=True))])
    return harness.table(("of", "files", "bytes", "bits flipped", "seen"), rows)


def format_full_disks(result: Mapping[str, Any]) -> str:
    """Return a row for each work that met a full disk."""
    keys = ("pages", "names", "sizes", "errors", "anyway", "finished")
    rows = [[one["work"], *(str(one[key]) for key in keys), str(len(one["lost"]))] for one in result["works"]]
    sums = [str(sum(one[key] for one in result["works"])) for key in keys]
    rows.append(["together", *sums, str(sum(len(one["lost"]) for one in result["works"]))])
    head = (
        "work",
        "at a page",
        "at a new file",
        "at a file's size",
        "exit code 3, old result whole",
        "done all the same",
    )
    return harness.table((*head, "finished in the same bytes later", "lost"), rows)


def format_soak(result: Mapping[str, Any]) -> str:
    """Return the counts of a long run as a table."""
    counts = sorted(result["counts"].items())
    rows = [["minutes", f"{result['minutes']:.1f}"], ["steps", f"{result['steps']:,}"]]
    rows += [[name, f"{count:,}"] for name, count in counts]
    rows += [["wrong results", str(result["wrong"])], ["memory at a tenth of it, MB", f"{result['memory_early']:.0f}"]]
    rows += [["memory at its end, MB", f"{result['memory_end']:.0f}"]]
    return harness.table(("what", "how often"), rows)


TABLES: Final[Mapping[str, Callable[[Mapping[str, Any]], str]]] = {
    "faults": format_faults,
    "fuzzing": format_fuzzing,
    "flips": format_flips,
    "full_disks": format_full_disks,
    "kills": format_kills,
    "soak": format_soak,
}
"""By the name of the result, which is that of the marks in the page, too."""
