"""Work that is killed leaves the old result or the new one, and ends in the same bytes when it is done again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults import kills
from tests.support.works import KILLED


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED)
def test_killed_at_random_moments_it_ends_in_the_same_bytes(name: str) -> None:
    counts = kills.kill_work(name, kills=6, seed=1)
    assert counts.is_good
    assert counts.kills == 6


def test_a_save_that_is_killed_ends_in_the_same_bytes() -> None:
    assert kills.kill_work("save", kills=3, seed=2).is_good


def test_work_that_leaves_a_mixture_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write in two steps with a pause between them, each straight to its file."""

    def start(folder: Path, number: int) -> Callable[[], Any]:
        def work() -> None:
            import time

            (folder / "out").mkdir(exist_ok=True)
            for name in ("a", "b"):
                (folder / "out" / name).write_text(str(number))
                time.sleep(0.1)

        return work

    monkeypatch.setattr(kills, "KILLED", {"badly": start})
    assert not kills.kill_work("badly", kills=12, seed=0).is_good
