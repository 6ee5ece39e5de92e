"""Logs and folders that are not as they should be are told of; they end no verb and hide nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_kit.cli.main import main

Capture = pytest.CaptureFixture[str]
NAN = float("nan")
LOGS: list[tuple[list[dict[str, Any]], str]] = [
    ([{"loss": 0.5}, {"loss": NAN}, {"loss": NAN}], "0.5 → nan → nan"),
    ([{"eval_loss": NAN}, {"loss": 0.5, "eval_loss": 1.0}], "loss nan"),
    ([{"eval_accuracy": 0.25}, {"loss": 0.5, "eval_accuracy": 0.5}], "accuracy 0.5"),
    ([{"loss": 0.5, "tokens_per_second": NAN, "peak_bytes": 5}], "0.5"),
    ([{"loss": "high"}], "high"),
]


def write_run(out: Path, entries: list[dict[str, Any]]) -> Path:
    """Write the result of a training with a log; return its folder."""
    out.mkdir()
    lines = [json.dumps({"step": step, **entry}) + "\n" for step, entry in enumerate(entries)]
    (out / "metrics.jsonl").write_text("".join(lines))
    (out / "recipe.yaml").write_text("base: x\n")
    return out


@pytest.mark.parametrize(("entries", "shown"), LOGS)
def test_a_number_that_is_none_is_shown_as_such(
    tmp_path: Path, capsys: Capture, entries: list[dict[str, Any]], shown: str
) -> None:
    out = write_run(tmp_path / "out", entries)
    assert main(["follow", "--once", str(out)]) == 0
    assert shown in capsys.readouterr().out
    assert main(["follow", str(out)]) == 0
    assert main(["runs", str(tmp_path)]) == 0


def test_a_loss_that_is_not_a_number_is_in_the_list_and_among_the_lines(tmp_path: Path, capsys: Capture) -> None:
    out = write_run(tmp_path / "out", [{"loss": 0.5}, {"loss": NAN}])
    assert main(["follow", str(out)]) == 0
    assert "step 1: loss nan" in capsys.readouterr().out
    assert main(["runs", str(tmp_path)]) == 0
    assert "nan" in capsys.readouterr().out


def test_a_damaged_run_hides_no_other(tmp_path: Path, capsys: Capture) -> None:
    write_run(tmp_path / "good", [{"loss": 0.5}])
    (tmp_path / "torn.run").mkdir()
    (tmp_path / "torn.run" / "progress.json").write_text("{")
    (tmp_path / "half.sweep").mkdir()
    (tmp_path / "half.sweep" / "plan.json").write_text('{"trials": ')
    assert main(["runs", str(tmp_path), "--json"]) == 0
    states = {Path(each["out"]).name: each["state"] for each in json.loads(capsys.readouterr().out)}
    assert states == {"good": "done", "torn": "damaged", "half.sweep": "damaged"}
    assert main(["runs", str(tmp_path)]) == 0
    assert "not JSON" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["nowhere", "file"])
def test_what_is_no_folder_is_not_called_an_adapter(tmp_path: Path, capsys: Capture, folder: str) -> None:
    (tmp_path / "file").write_text("")
    assert main(["runs", str(tmp_path / folder)]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_the_root_of_all_folders_is_no_training(capsys: Capture) -> None:
    assert main(["follow", "--once", "/"]) == 2
    assert "there is no training" in capsys.readouterr().err
