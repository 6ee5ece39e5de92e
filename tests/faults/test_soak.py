"""A bank in random use agrees with a slow plain model, step for step; the long form is `make soak`."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_kit.bank.bank import AdapterBank
from lora_kit.bank.routes import Lease
from lora_kit.errors import BankError
from tests.faults.soak import Soak, run_soak


@pytest.mark.parametrize("seed", [1, 2])
def test_random_steps_agree_with_a_plain_model(tmp_path: Path, seed: int) -> None:
    result = run_soak(seconds=0, least=150, seed=seed, folder=tmp_path)
    assert result["steps"] == 150


def take_steps(soak: Soak, count: int) -> None:
    for _ in range(count):
        soak.take_step()


def test_a_wrong_adapter_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bank that uses the adapter before last."""
    soak, using, names = Soak(0, tmp_path), AdapterBank.using, [None]

    def use_the_one_before(bank: AdapterBank, name: str | None) -> object:
        names.append(name)
        return using(bank, names[-2] if names[-2] in (None, *bank.names) else None)

    monkeypatch.setattr(AdapterBank, "using", use_the_one_before)
    with pytest.raises(AssertionError):
        take_steps(soak, 200)


def test_a_slot_that_is_not_given_back_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soak, unload = Soak(0, tmp_path), AdapterBank.unload
    leases: list[Lease] = []

    def keep(bank: AdapterBank, name: str) -> None:
        if not leases and name not in soak.trained:
            leases.append(bank.lease(name))
        unload(bank, name)

    monkeypatch.setattr(AdapterBank, "unload", keep)
    with pytest.raises((AssertionError, BankError)):
        take_steps(soak, 300)
