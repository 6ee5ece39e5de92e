"""Every fault of the table is survived: the expected error or none, the exit code, and nothing else changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from lora_kit.cli.main import main
from lora_kit.errors import StorageError
from tests.faults.adapter_acts import load
from tests.faults.fault import Fault
from tests.faults.run_fault import reason_lost, take_stock
from tests.faults.table import AREAS

ROWS = [
    pytest.param(fault, id=f"{area}: {fault.name}", marks=[pytest.mark.slow] if fault.slow else [])
    for area, faults in AREAS.items()
    for fault in faults
]


@pytest.mark.parametrize("fault", ROWS)
def test_a_fault_is_survived(tmp_path: Path, fault: Fault) -> None:
    assert reason_lost(fault, tmp_path) is None


@pytest.mark.parametrize("area", ["weight file", "config", "record"])
def test_who_looks_at_a_damaged_adapter_gets_it_or_one_line(
    tmp_path: Path, area: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`inspect` shows the adapter or says what is wrong; `list` shows all others."""
    for number, fault in enumerate(AREAS[area]):
        folder = tmp_path / str(number)
        folder.mkdir()
        fault.make(folder)
        monkeypatch.chdir(folder)
        before = take_stock(folder)
        for verb, adapter in (("inspect", "adapter"), ("list", ".")):
            code = main([verb, adapter])
            lines = capsys.readouterr().err.splitlines()
            assert code in ((0,) if verb == "list" else (0, 2, 3, 4)), (fault.name, verb, code, lines)
            assert sum(line.startswith("error: ") for line in lines) == (code != 0), (fault.name, lines)
            assert not any(line.startswith("Traceback") for line in lines), (fault.name, lines)
        assert take_stock(folder) == before, fault.name


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
