"""`python -m tests.faults [--only record] [--write]`: meet every fault; ends with 1 if one is lost."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks import harness
from tests.faults import reliability_page
from tests.faults.beside_peft import OUTCOMES, ask_peft
from tests.faults.fault import Fault
from tests.faults.quiet import hush
from tests.faults.run_fault import reason_lost
from tests.faults.table import AREAS

RESULT: Final = harness.RESULTS / "faults.json"


def main() -> int:
    """Meet the faults of the areas that are named, or all of them, and print a line for each area."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(AREAS), default=list(AREAS), help="areas")
    parser.add_argument("--write", action="store_true", help="write the results, and the tables of docs/reliability.md")
    arguments = parser.parse_args()
    hush()
    torch.set_num_threads(1)  # a process that is forked has no other threads, and would wait for them
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores in the background
    areas = {area: [_meet(fault) for fault in AREAS[area]] for area in arguments.only}
    for area, records in areas.items():
        _print_area(area, records)
    if arguments.write:
        _write(areas)
    return 1 if any(record["lost"] for records in areas.values() for record in records) else 0


def _meet(fault: Fault) -> dict[str, Any]:
    """Return the record of one fault: how it ended with us, and with PEFT."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fault-") as ours, tempfile.TemporaryDirectory(prefix="fault-") as theirs:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            lost = reason_lost(fault, Path(ours))
        beside = ask_peft(fault, Path(theirs))
    record: dict[str, Any] = {"name": fault.name, "expected": fault.error.__name__ if fault.error else "goes on"}
    record |= {"command": bool(fault.command), "lost": lost, "seconds": round(time.perf_counter() - started, 2)}
    return record | ({"peft": beside[0], "peft_says": beside[1]} if beside else {})


def _print_area(area: str, records: Sequence[Mapping[str, Any]]) -> None:
    lost = [record for record in records if record["lost"]]
    beside = Counter(record["peft"] for record in records if "peft" in record)
    shown = ", ".join(f"{beside[outcome]} {outcome}" for outcome in OUTCOMES if beside[outcome])
    print(
        f"{area:<16} {len(records):>3} tried, {len(records) - len(lost):>3} survived; PEFT: {shown or '-'}", flush=True
    )
    for record in lost:
        print(f"  LOST {record['name']}: {record['lost']}", flush=True)


def _write(areas: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write the results; of a part of the areas, beside what the others gave before."""
    earlier = json.loads(RESULT.read_text(encoding="utf-8"))["areas"] if RESULT.is_file() else {}
    merged = {area: areas.get(area, earlier.get(area, [])) for area in AREAS}
    lines = [
        f" {json.dumps(area)}: [\n  " + ",\n  ".join(map(json.dumps, records)) + "]" for area, records in merged.items()
    ]
    head = json.dumps(harness.environment())
    RESULT.write_text(f'{head[:-1]}, "areas": {{\n' + ",\n".join(lines) + "}}\n", encoding="utf-8")
    reliability_page.fill()


if __name__ == "__main__":
    sys.exit(main())
