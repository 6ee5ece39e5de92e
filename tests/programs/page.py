"""The tables of docs/export.md: what was run, in which version, with which figure, and what writing takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from benchmarks.harness import table

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "export.md"
MARK: Final = "programs"
_HEAD: Final = ("program", "reads", "adapters", "largest difference", "effect, at least", "unsupported", "seconds")
_COST_HEAD: Final = ("program", "what", "ours", "the program's own")


def format_table(result: Mapping[str, Any]) -> str:
    """Return the checks of a result as tables in Markdown, with the faults of programs below the first."""
    compared = [check for check in result["checks"] if _reason_not_run(check) or any(map(_is_compared, check["cases"]))]
    parts = [table(_HEAD, [_format_line(check) for check in compared])]
    faults = sorted({f"{c['program']}, {f}" for c in result["checks"] for f in _list_faults(c)})
    if faults:
        parts.append("Wrong in the programs themselves:\n\n" + "\n".join(f"- {fault}" for fault in faults))
    costs = [line for check in result["checks"] for line in _list_costs(check)]
    if costs:
        parts.append(
            "What a command of ours and one of the program takes: processor time, and memory at its peak, both with "
            "the imports of Python. Memory counts pages of mapped files, too, which the system takes back when it "
            "needs them: a merge maps the model that it reads and the one that it wrote and verifies, 430 MB each here."
        )
        parts.append(table(_COST_HEAD, costs))
    return "\n\n".join(parts)


def _reason_not_run(check: Mapping[str, Any]) -> str | None:
    return "not run here" if check.get("skipped") else "failed" if check.get("failed") else None


def _is_compared(case: Mapping[str, Any]) -> bool:
    return any(case.get(key) is not None for key in ("difference", "requests")) or case["verdict"] != "equal"


def _format_line(check: Mapping[str, Any]) -> list[str]:
    if reason := _reason_not_run(check):
        return [check["program"], f"`{check['form']}`", reason, "–", "–", "–", "–"]
    served = [case for case in check["cases"] if case.get("requests") and case["verdict"] != "known"]
    equal = [case for case in check["cases"] if case["verdict"] == "equal" and case.get("effect")]
    bases = {case["key"].partition("/")[0] for case in equal}
    figures = [f"{len(equal)} on {len(bases)} {'base' if len(bases) == 1 else 'bases'}"]
    figures += [f"{max((case['difference'] for case in equal), default=0.0):.1e}"]
    figures += [f"{min((case['effect'] for case in equal), default=0.0):.2f}"]
    if served:
        wrong, asked = (sum(case[key] for case in served) for key in ("wrong_answers", "requests"))
        figures = [f"{len(served)} {'run' if len(served) == 1 else 'runs'}", f"{wrong} of {asked:,} answers wrong", "–"]
    unsupported = sorted({case["key"].partition("/")[2] for case in check["cases"] if case["verdict"] == "rejected"})
    program, seconds = check["version"] or check["program"], f"{check['seconds']:.0f}"
    return [program, f"`{check['form']}`", *figures, ", ".join(unsupported) or "–", seconds]


def _list_faults(check: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a program is known to do wrong, with the largest figure of each kind of adapter."""
    known: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for case in check["cases"]:
        if case["verdict"] == "known":
            known.setdefault((case["key"].partition("/")[2], case["reason"]), []).append(case)
    for (feature, reason), cases in known.items():
        off = max((case["difference"] for case in cases if case.get("difference") is not None), default=None)
        wrong = [f"{case['wrong_answers']} of {case['requests']} answers" for case in cases if case.get("requests")]
        figure = f" (off by up to {off:.2g})" if off is not None else f" ({', '.join(wrong)})" if wrong else ""
        yield f"{feature}: {reason}{figure}"


def _list_costs(check: Mapping[str, Any]) -> Iterator[list[str]]:
    for case in check["cases"]:
        if case.get("ours") and case.get("theirs"):
            sides = [f"{case[side]['seconds']:.1f} s, {case[side]['megabytes']:,.0f} MB" for side in ("ours", "theirs")]
            yield [check["program"], case["key"], *sides]
