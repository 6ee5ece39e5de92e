"""Measure: `python -m benchmarks [SUITE …]`. Nothing is written without --write.

python -m benchmarks --short                                 # the short form of everything, about five minutes
python -m benchmarks --write                                 # everything, into results/ and the pages
python -m benchmarks inference --only "decode 8" --seconds 20  # rows whose name holds these words
python -m benchmarks --tables                                # the pages again, from the results
"""

from __future__ import annotations

import argparse
import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # of torch's profiler, which announces itself

from benchmarks.harness import Effort, Row, quiet, record
from benchmarks.tables import SUITES, suite, write_all

SHORT, FULL = Effort(rounds=3, seconds=4), Effort(rounds=7, seconds=40)


def chosen(arguments: argparse.Namespace) -> dict[tuple[str, str], Row]:
    found = {(name, label): row for name in arguments.suites or SUITES for label, row in suite(name).rows().items()}
    left_out = "full" if arguments.short else "short only"
    found = {key: row for key, row in found.items() if row.form != left_out}
    return {key: row for key, row in found.items() if arguments.only.lower() in key[1].lower()}


def show(label: str, row: Row, measured: dict[str, Any]) -> None:
    """One row as a line, or as one line per case where cases were timed."""
    print(label + (f"   aim {row.aim}" if row.aim else ""), flush=True)
    for case, timing in measured.get("timings", {}).items():
        spread = f"{timing.ratio:.3f} ({timing.low:.3f}–{timing.high:.3f})"
        print(f"    {case:<20} {1e3 * timing.median:>10,.2f} ms   {spread}   {timing.rounds} rounds", flush=True)
    for key, value in measured.items():
        if key != "timings":
            print(f"    {key}: {rounded(value)}", flush=True)


def rounded(value: Any) -> Any:
    """Numbers short enough to read."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    return round(value, 2) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", choices=[*SUITES, []], metavar="SUITE", help=f"of {', '.join(SUITES)}")
    parser.add_argument("--only", default="", metavar="WORDS", help="rows whose name holds this")
    parser.add_argument("--cases", default="", metavar="A,B", help="only these cases, beside the first")
    parser.add_argument("--rounds", type=int, help="at least")
    parser.add_argument("--seconds", type=float, help="for each comparison, at least")
    parser.add_argument("--short", action="store_true", help="fewer rows and rounds")
    parser.add_argument("--list", action="store_true", help="the names of the rows")
    parser.add_argument("--tables", action="store_true", help="measure nothing; make the pages from the results")
    parser.add_argument("--write", action="store_true", help="put the rows into results/ and the pages")
    arguments = parser.parse_args()
    if arguments.write and (arguments.short or arguments.cases):
        parser.error("--write takes whole rows at full length: without --short and --cases")
    quiet()
    effort = SHORT if arguments.short else FULL
    effort = Effort(
        arguments.rounds or effort.rounds,
        effort.seconds if arguments.seconds is None else arguments.seconds,
        tuple(filter(None, arguments.cases.split(","))),
    )
    for (name, label), row in {} if arguments.tables else chosen(arguments).items():
        if arguments.list:
            print(f"{name}: {label}")
            continue
        measured = row.measure(effort)
        show(label, row, measured)
        if arguments.write:
            record(name, label, measured, rows=suite(name).rows())
    if arguments.write or arguments.tables:
        write_all()


if __name__ == "__main__":
    main()
