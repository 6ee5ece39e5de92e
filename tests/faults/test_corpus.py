"""Small files that once were, or might be, a fault of a reader: each is a value or one of our errors, at once."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import FrameType

import pytest

from tools.fuzz import CORPUS, MAX_SECONDS, mutate_forever
from tools.fuzz_readers import MAX_MESSAGE, READERS, check_message, open_reader


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    """No test here may compute for longer than a reader may, and a bit."""

    def stop(number: int, frame: FrameType | None) -> None:
        pytest.fail("it does not end")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, 4 * MAX_SECONDS)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


def cases_of(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / name.replace(" ", "-")).iterdir())]


def test_every_reader_has_kept_cases_and_no_case_is_without_a_reader() -> None:
    assert {path.name for path in CORPUS.iterdir()} == {name.replace(" ", "-") for name in READERS}
    assert sum(path.stat().st_size for path in CORPUS.rglob("*")) < 2**20


@pytest.mark.parametrize("name", READERS)
def test_a_kept_case_and_cases_like_it_are_a_value_or_an_error_of_ours(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_kit.data.template_sandbox.MAX_STEPS", 20_000)
    cases = cases_of(name)
    near = islice(mutate_forever(cases, random.Random(0)), 15)
    with open_reader(name, tmp_path) as read:
        outcomes = {read(data) for data in [*cases, *near]}
    assert "value" in outcomes


@pytest.mark.parametrize("message", ["x" * (MAX_MESSAGE + 1), "x\n" * 99])
def test_a_message_that_nobody_would_read_is_found(message: str) -> None:
    with pytest.raises(AssertionError):
        check_message(message)
