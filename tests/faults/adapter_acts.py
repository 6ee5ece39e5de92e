"""What is done with an adapter folder: loaded into a bank that must not notice a failure, by us and by PEFT."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lora_kit as lk
from lora_kit.adapter.folder import WEIGHTS
from lora_kit.errors import AdapterError, LoraKitError
from tests.faults.fault import Act, Fault
from tests.support import folders, tiny

GENERATE = ("generate", "--base", "base", "--adapter", "adapter", "--prompt", "ab", "--max-new-tokens", "1")


@cache
def _bank() -> tuple[lk.AdapterBank, Tensor, dict[str, Tensor]]:
    """A bank with one adapter in use, its logits, and the bits of its model."""
    bank = lk.attach(tiny.llama(), slots=3, max_rank=4)
    bank.load("other", folders.adapter(seed=5))
    bank.use("other")
    return bank, tiny.logits(bank.model, tiny.batch()), _bits(bank.model)


def _bits(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def load(folder: Path, *, allow: Collection[str] = ()) -> None:
    """Load `adapter` into a bank beside another one; after a failure nothing may have changed."""
    bank, logits, bits = _bank()
    try:
        bank.load("broken", folder / "adapter", allow=allow)
    except LoraKitError:
        assert bank.names == ("other",)
        assert bank.active == "other"
        assert torch.equal(tiny.logits(bank.model, tiny.batch()), logits), "the bank computes something else"
        now = _bits(bank.model)
        assert now.keys() == bits.keys()
        assert all(torch.equal(now[name], bits[name]) for name in bits), "the model has other bits"
        raise
    bank.unload("broken")


def load_with_peft(folder: Path) -> None:
    """Load `adapter` with PEFT, and compute with it."""
    import peft

    model = peft.PeftModel.from_pretrained(tiny.llama(), str(folder / "adapter"))
    tiny.logits(model, tiny.batch())


def adapter_fault(
    name: str,
    make: Act,
    says: str = "",
    *,
    error: type[LoraKitError] | None = AdapterError,
    act: Act = load,
    **more: Any,
) -> Fault:
    """Return the row of a fault in an adapter folder: loaded in Python, used by `generate`."""
    return Fault(
        name=name,
        make=make,
        act=act,
        error=error,
        says=says,
        **{"command": GENERATE, "peft": load_with_peft, **more},
    )


def foreign(tensors: Mapping[str, Tensor] | None = None, **fields: Any) -> Act:
    """Return what writes `adapter` as another program would, with these tensors and fields of its config."""
    values = None if tensors is None else dict(tensors)
    return lambda folder: folders.foreign(folder / "adapter", values, **fields)


def damaged(damage: Callable[[bytes], bytes], *, file: str = WEIGHTS, saved: bool = False) -> Act:
    """Return what writes `adapter`, of another program or saved by us, and then damages a file of it."""

    def make(folder: Path) -> None:
        target = folder / "adapter"
        if saved:
            folders.adapter().save(target)
        else:
            folders.foreign(target)
        path = target / file
        path.write_bytes(damage(path.read_bytes()))

    return make
