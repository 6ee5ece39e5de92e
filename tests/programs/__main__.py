"""`python -m tests.programs [--only mlx] [--write]`: ends with 1 if a program computes something else than we do."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from benchmarks import harness
from tests.programs.cases import Case, write_cases
from tests.programs.checks import CHECKS, iterate_checks
from tests.programs.environments import UnavailableError, install, python_of
from tests.programs.outcomes import Check, Outcome
from tests.programs.page import MARK, PAGE, format_table

ROOT: Final = Path(__file__).resolve().parents[2] / ".programs"
RESULT: Final = harness.RESULTS / "programs.json"


def main() -> int:
    """Run the programs that are named, or all of them, and print a line for each form that they read."""
    parser = argparse.ArgumentParser(prog="python -m tests.programs", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), default=[], help="programs to run")
    parser.add_argument("--form", nargs="+", default=[], help="only what is in the column “reads” of docs/export.md")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the environments and files")
    parser.add_argument("--write", action="store_true", help="write the results, and the table of docs/export.md")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    checks = list(iterate_checks(arguments.only, arguments.form))
    if not checks:
        parser.error(f"no program of these reads {' '.join(arguments.form)!r}")
    root = arguments.root.absolute()
    cases, is_wrong = list(write_cases(root / "cases")), False
    for program, check in checks:
        record = _run(program, check, cases, root)
        is_wrong |= record["wrong"]
        if arguments.write:  # at once: a run that is stopped keeps what it has
            write_record(record)
    return 1 if is_wrong else 0


def _run(program: str, check: Check, cases: Sequence[Case], root: Path) -> dict[str, Any]:
    """Run one check, print what came of it, and return its record."""
    record: dict[str, Any] = {"program": program, "form": check.form, "version": None, "wrong": False, "cases": []}
    record["date"] = datetime.now(UTC).date().isoformat()
    started = time.perf_counter()
    try:
        python = Path(sys.executable)
        if check.environment is not None:
            python = python_of(install(check.environment, root, say=_say))
        version, outcomes = check.run(cases, python=python, folder=_empty(root / "runs" / program / check.form))
    except UnavailableError as error:
        _say(f"{program:<22} {check.form:<8} skipped: {error}")
        return {**record, "skipped": str(error)}
    except RuntimeError as error:
        _say(f"{program:<22} {check.form:<8} FAILED: {error}")
        return {**record, "wrong": True, "failed": str(error)}
    record |= {"version": version, "seconds": round(time.perf_counter() - started, 1)}
    record |= {"cases": [asdict(outcome) for outcome in outcomes]}
    record["wrong"] = not all(outcome.is_right for outcome in outcomes)
    _print_summary(record, outcomes)
    return record


def _empty(folder: Path) -> Path:
    """Return a folder with nothing in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _print_summary(record: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    equal = [outcome for outcome in outcomes if outcome.verdict == "equal"]
    largest = max((outcome.difference or 0.0 for outcome in equal), default=0.0)
    counts = {verdict: sum(o.verdict == verdict for o in outcomes) for verdict in ("rejected", "known")}
    _say(
        f"{record['program']:<22} {record['form']:<8} {len(equal):>3} equal, at most {largest:.1e} off; "
        f"{counts['rejected']} rejected, {counts['known']} known faults; {record['seconds']:.0f} s; {record['version']}"
    )
    for outcome in outcomes:
        if not outcome.is_right:
            figures = f"{outcome.difference:.2e} off, bound {outcome.bound:.1e}" if outcome.difference else ""
            _say(f"  {outcome.verdict.upper()} {outcome.key}: {figures} {outcome.reason or ''}")


def write_record(record: dict[str, Any]) -> None:
    """Write the result of a check beside those that the others gave before, and the table of them all."""
    earlier = json.loads(RESULT.read_text(encoding="utf-8"))["checks"] if RESULT.is_file() else []
    kept = [each for each in earlier if (each["program"], each["form"]) != (record["program"], record["form"])]
    result = {"checks": sorted([*kept, record], key=lambda each: (each["program"], each["form"]))}
    RESULT.write_text(_format_json(result), encoding="utf-8")
    harness.fill(PAGE, format_table(result), mark=MARK)


def _format_json(result: dict[str, Any]) -> str:
    """Return a result as JSON with a line for each case."""
    checks = []
    for check in result["checks"]:
        cases = ",\n   ".join(json.dumps(_shorten(case)) for case in check["cases"])
        head = json.dumps({key: value for key, value in check.items() if key != "cases"})
        checks.append(f'{head[:-1]}, "cases": [\n   {cases}]}}')
    head = json.dumps(harness.environment())
    return f'{head[:-1]}, "checks": [\n ' + ",\n ".join(checks) + "]}\n"


def _shorten(case: dict[str, Any]) -> dict[str, Any]:
    """Return a case without what is not known, its figures with three digits."""
    return {k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in case.items() if v is not None}


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
