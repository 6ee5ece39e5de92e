"""What an adapter does on one model: attached, trained, taken away, merged; each compared with the model alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lora_kit as lk
from lora_kit.errors import LoraKitError
from tools.scan_models.tiny_models import iterate_inputs, iterate_tiny_models

WORKS, REFUSED, FAILS, NOT_TRIED = "works", "refused", "fails", "not tried"


@dataclass(frozen=True)
class Outcome:
    """What was seen of one class.

    Attributes:
        status: `works`, `refused` (with a typed error), `fails`, or `not tried`: the model alone does not run.
        detail: the reason; of one that works, how many layers, and a merge that was refused.
    """

    status: str
    detail: str


class UntriedError(Exception):
    """The model alone cannot be made, run or trained."""


def try_class(kind: type[nn.Module]) -> Outcome:
    """Return what an adapter for all linear layers does on a tiny model of a class."""
    try:
        model, inputs, reached = _make(kind)
        return _try_adapter(model, inputs, reached)
    except UntriedError as error:
        return Outcome(NOT_TRIED, str(error))
    except LoraKitError as error:
        return Outcome(REFUSED, _first_line(error))
    except Exception as error:
        return Outcome(FAILS, _first_line(error))


def _make(kind: type[nn.Module]) -> tuple[Any, dict[str, Any], set[str]]:
    """Return a model that runs alone, the same twice, and trains; its inputs; and what `_train_alone` returns."""
    reason = ""
    try:
        for model in iterate_tiny_models(kind):
            for inputs in iterate_inputs(model):
                reason = _reason_not_usable(model.eval(), inputs)
                if not reason:
                    return model, inputs, _train_alone(model, inputs)
    except UntriedError:
        raise
    except Exception as error:
        raise UntriedError(f"no tiny model: {_first_line(error)}") from error
    raise UntriedError(f"no inputs: {reason}")


def _reason_not_usable(model: Any, inputs: Mapping[str, Any]) -> str:
    """Return why the outputs of a model alone are nothing to compare with; empty where they are."""
    try:
        once, again = _run(model, inputs), _run(model, inputs)
    except Exception as error:
        return _first_line(error)
    if not once:
        return "it returns no floats"
    if not _equal(once, again):
        return "its outputs vary"
    return "" if all(torch.isfinite(tensor).all() for tensor in once) else "its outputs are not finite"


def _train_alone(model: Any, inputs: Mapping[str, Any]) -> set[str]:
    """Return the names of the weights that receive a gradient when the model is trained alone."""
    model.train().requires_grad_(True)
    try:
        torch.manual_seed(0)
        _loss(model(**inputs)).backward()
    except Exception as error:
        raise UntriedError(f"it does not train: {_first_line(error)}") from error
    reached = {name for name, each in model.named_parameters() if each.grad is not None and each.grad.any()}
    model.zero_grad(set_to_none=True)
    model.eval()
    return reached


def _try_adapter(model: Any, inputs: Mapping[str, Any], reached: set[str]) -> Outcome:
    base = _run(model, inputs)
    bank = lk.attach(model, lk.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"), name="a")
    _check(_equal(_run(model, inputs), base), "attach changes the outputs")
    _train(model, bank, inputs)
    covered = bank.coverage("a").targets
    silent = [target.path for target in covered if f"{target.path}.weight" in reached and not _moved(bank, target.path)]
    _check(not silent, f"{len(silent)} of {len(covered)} layers are bypassed: {', '.join(silent[:3])}")
    adapted = _run(model, inputs)
    _check(not _equal(adapted, base), "the trained adapter changes no output")
    bank.use(None)
    _check(_equal(_run(model, inputs), base), "use(None) is not the base")
    bank.use("a")
    _check(_equal(_run(model, inputs), adapted), "a swap is not bitwise")
    return Outcome(WORKS, f"{len(covered)} layers{_merge(model, bank, inputs, adapted)}")


def _merge(model: Any, bank: lk.AdapterBank, inputs: Mapping[str, Any], adapted: list[Tensor]) -> str:
    """Merge, and return a note where that is refused."""
    try:
        bank.merge("a")
    except LoraKitError as error:
        return f"; merge refused: {_first_line(error)}"
    for merged, expected in zip(_run(model, inputs), adapted, strict=True):
        scale = max(1.0, expected.abs().max().item())
        _check((merged - expected).abs().max().item() <= 1e-3 * scale, "merged differs from unmerged")
    return ""


def _train(model: Any, bank: lk.AdapterBank, inputs: Mapping[str, Any]) -> None:
    """Two steps: in the first only B receives a gradient."""
    model.train()
    optimizer = torch.optim.AdamW(bank.parameters("a"), lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        torch.manual_seed(0)
        _loss(model(**inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def _moved(bank: lk.AdapterBank, path: str) -> bool:
    """Return whether the B of a layer is no longer zero."""
    tensors = bank.state_dict()["a"]
    return any(bool(tensor.any()) for key, tensor in tensors.items() if f".{path}.lora_" in key and "_B" in key)


def _loss(outputs: object) -> Tensor:
    return sum((tensor.float().square().mean() for tensor in _floats(outputs) if tensor.requires_grad), torch.zeros(()))


def _run(model: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return [tensor.clone() for tensor in _floats(model(**inputs))]


def _floats(outputs: object) -> Iterator[Tensor]:
    """Yield the floats of an output, however nested; caches apart."""
    if isinstance(outputs, Tensor):
        if outputs.is_floating_point():
            yield outputs
    elif isinstance(outputs, Mapping):
        for name, value in outputs.items():
            if "past_key_values" not in str(name):
                yield from _floats(value)
    elif isinstance(outputs, (list, tuple)):
        for value in outputs:
            yield from _floats(value)


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def _check(good: bool, problem: str) -> None:
    if not good:
        raise AssertionError(problem)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"
