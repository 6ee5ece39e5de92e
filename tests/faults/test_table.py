"""Every fault of the table is survived: the expected error or none, the exit code, and nothing else changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from lora_kit.errors import StorageError
from tests.faults.adapter_acts import load
from tests.faults.fault import Fault
from tests.faults.run_fault import reason_lost
from tests.faults.table import AREAS

ROWS = [
    pytest.param(fault, id=f"{area}: {fault.name}", marks=[pytest.mark.slow] if fault.slow else [])
    for area, faults in AREAS.items()
    for fault in faults
]


@pytest.mark.parametrize("fault", ROWS)
def test_a_fault_is_survived(tmp_path: Path, fault: Fault) -> None:
    assert reason_lost(fault, tmp_path) is None


def test_names_are_of_one_fault_each() -> None:
    for faults in AREAS.values():
        assert len({fault.name for fault in faults}) == len(faults)


def survives(fault: Fault, folder: Path, **changes: Any) -> bool:
    return reason_lost(dataclasses.replace(fault, **changes), folder) is None


def test_what_is_not_survived_is_found(tmp_path: Path) -> None:
    fault = next(fault for fault in AREAS["weight file"] if fault.name == "empty")
    assert survives(fault, tmp_path / "as it is")
    wrong: list[dict[str, Any]] = [
        {"error": None},
        {"error": StorageError},
        {"says": "another word"},
        {"act": lambda folder: None},
        {"act": lambda folder: 1 / 0},
        {"command": ("inspect", "--nothing")},
        {"command": ("list",)},
        {"act": lambda folder: (folder / "leftover").mkdir() or load(folder)},
        {"act": lambda folder: (folder / "base" / "config.json").write_text("{}") and load(folder)},
    ]
    for number, changes in enumerate(wrong):
        assert not survives(fault, tmp_path / str(number), **changes), changes
