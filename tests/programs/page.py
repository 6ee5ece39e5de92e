"""The table of docs/export.md: what was run, in which version, with which figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from benchmarks.harness import table

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "export.md"
MARK: Final = "programs"
_HEAD: Final = ("program", "reads", "adapters", "largest difference", "effect, at least", "unsupported", "seconds")


def format_table(result: Mapping[str, Any]) -> str:
    """Return the checks of a result as a table in Markdown, with the faults of programs below it."""
    lines = [_format_line(check) for check in result["checks"]]
    faults = sorted({f"{c['program']}, {f}" for c in result["checks"] for f in _list_faults(c)})
    notes = "\n".join(f"- {fault}" for fault in faults)
    return table(_HEAD, lines) + (f"\n\nWrong in the programs themselves:\n\n{notes}" if faults else "")


def _format_line(check: Mapping[str, Any]) -> list[str]:
    if check.get("skipped"):
        return [check["program"], check["form"], "not run here", "–", "–", "–", "–"]
    equal = [case for case in check["cases"] if case["verdict"] == "equal" and case.get("effect")]
    unsupported = sorted({case["key"].partition("/")[2] for case in check["cases"] if case["verdict"] == "rejected"})
    bases = {case["key"].partition("/")[0] for case in equal}
    return [
        check["version"] or check["program"],
        f"`{check['form']}`",
        f"{len(equal)} on {len(bases)} bases",
        f"{max((case['difference'] for case in equal), default=0.0):.1e}",
        f"{min((case['effect'] for case in equal), default=0.0):.2f}",
        ", ".join(unsupported) or "–",
        f"{check['seconds']:.0f}",
    ]


def _list_faults(check: Mapping[str, Any]) -> list[str]:
    known = [case for case in check["cases"] if case["verdict"] == "known"]
    return [f"{case['key'].partition('/')[2]}: {case['reason']}" for case in known]
