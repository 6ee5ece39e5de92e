"""Arguments of no sense: every public function answers with an error of the family, and changes nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lora_kit as lk
from lora_kit.bank.bank import AdapterBank
from lora_kit.errors import LoraKitError
from tests.support import folders, tiny

SENSELESS = [None, 5, b"x", object(), [], {}, 3.5, True]
RECIPE = {"base": "kit-base", "data": "x.jsonl", "out": "out"}


@functools.cache
def bank() -> AdapterBank:
    bank = lk.attach(tiny.llama(), slots=4, max_rank=8)
    bank.load("mine", folders.adapter())
    return bank


CALLS: dict[str, tuple[Callable[[Any], object], list[Any]]] = {
    "load": (lambda x: bank().load("q", x), SENSELESS),
    "load, its name": (lambda x: bank().load(x, folders.adapter()), SENSELESS),
    "load, allowed": (lambda x: bank().load("q", folders.adapter(), allow=x), [None, 5, b"x", "x", object(), [5]]),
    "offer": (lambda x: bank().offer("q", x), SENSELESS),
    "use": (lambda x: bank().use(x), SENSELESS[1:]),
    "using": (lambda x: bank().using(x).__enter__(), SENSELESS[1:]),
    "rows": (lambda x: bank().rows(x).__enter__(), [*SENSELESS, 7]),
    "unload": (lambda x: bank().unload(x), SENSELESS),
    "snapshot": (lambda x: bank().snapshot(x), SENSELESS),
    "save": (lambda x: bank().save("mine", x), SENSELESS),
    "lease": (lambda x: bank().lease(x), SENSELESS),
    "merge in memory": (lambda x: bank().merge(x), SENSELESS),
    "Adapter": (lambda x: lk.Adapter(x, {}), SENSELESS),
    "Adapter, its tensors": (lambda x: lk.Adapter(folders.config(), x), SENSELESS),
    "Adapter.load": (lambda x: lk.Adapter.load(x), SENSELESS),
    "attach": (lambda x: lk.attach(x), SENSELESS),
    "adopt": (lambda x: lk.adopt(x), SENSELESS),
    "train": (lambda x: lk.train(x), [*SENSELESS, "x"]),
    "train, its overrides": (lambda x: lk.train(RECIPE, overrides=x), [5, b"x", object(), 3.5, {5: 1}]),
    "sweep": (lambda x: lk.sweep(x, {"lora.r": [4]}), SENSELESS),
    "sweep, its space": (lambda x: lk.sweep(RECIPE, x), SENSELESS),
    "merge": (lambda x: lk.merge(x, folders.adapter(), "merged"), SENSELESS),
    "merge, its adapter": (lambda x: lk.merge("kit-base", x, "merged"), SENSELESS),
    "merge, its output": (lambda x: lk.merge("kit-base", folders.adapter(), x), SENSELESS),
    "export": (lambda x: lk.export(x, "vllm", "out"), SENSELESS),
    "export, its program": (lambda x: lk.export(folders.adapter(), x, "out"), SENSELESS),
    "export, its output": (lambda x: lk.export(folders.adapter(), "vllm", x), SENSELESS),
    "combine": (lambda x: lk.combine(x, method="cat"), SENSELESS),
    "combine, its method": (lambda x: lk.combine([(folders.adapter(), 1.0)], method=x), SENSELESS),
    "resize": (lambda x: lk.resize(x, rank=4), SENSELESS),
    "resize, its rank": (lambda x: lk.resize(folders.adapter(), rank=x), [b"x", object(), [], {}, 3.5, True]),
    "extract": (lambda x: lk.extract(x, "kit-base", rank=4), SENSELESS),
    "load_base": (lambda x: lk.load_base(x), SENSELESS),
    "read_rows": (lambda x: lk.data.read_rows(x), SENSELESS),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_argument_of_no_sense_is_an_error_of_the_family(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call, values = CALLS[name]
    for value in values:
        with pytest.raises(LoraKitError) as caught:
            call(value)
        assert caught.value.exit_code == 2
        assert len(str(caught.value)) <= 500
    assert bank().names == ("mine",)
    assert list(tmp_path.iterdir()) == []
