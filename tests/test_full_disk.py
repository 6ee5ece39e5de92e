"""A full disk: it is said with path and bytes, the old result is whole, and the same work ends once there is space."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import works
from tests.support.full_disk import run_on_full_disk
from tests.support.merging import contents

WORK: dict[str, tuple[works.Start, tuple[int, ...]]] = {
    "prepare": (works.start_prepare, (0, 1_000)),
    "train": (works.start_train, (0, 1_000, 6_000)),
    "sweep": (works.start_sweep, (0, 600, 6_000)),
    "export": (works.start_export, (0, 1_000)),
    "merge": (works.start_merge, (0, 2_000, 20_000)),
    "a file": (works.start_write, (0, 1_000)),
}
"""What writes, and the bytes that a file may have while the disk is full: at its first write, and at later ones."""


@pytest.mark.parametrize("name", WORK)
def test_a_full_disk_is_said_and_nothing_old_is_lost(tmp_path: Path, name: str) -> None:
    if name == "sweep":
        pytest.importorskip("optuna", reason="optuna is not installed (pip install 'lora-kit[sweep]')")
    work, limits = WORK[name]
    work(tmp_path, 1)()
    before = contents(tmp_path / "out")
    for largest in limits:
        code, message = run_on_full_disk(work(tmp_path, 2), largest=largest)
        assert code == 3, largest
        assert re.search(rf"{re.escape(str(tmp_path))}\S* cannot be written: File too large", message), (
            largest,
            message,
        )
        assert re.search(r"[\d,]+ bytes are needed", message), (largest, message)
        assert contents(tmp_path / "out") == before
        assert not [path for path in tmp_path.glob(".*") if path.name.endswith(".staging")]
    work(tmp_path, 2)()
    after = contents(tmp_path / "out")
    assert after != before
    assert after.keys() == before.keys()
