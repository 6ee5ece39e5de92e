"""What an adapter does on one model: attached, trained, taken away, merged; each compared with the model alone."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy
import torch
from torch import Tensor, nn

import lora_kit as lk
from lora_kit.errors import LoraKitError, TargetError
from lora_kit.layers.slot_layer import SlotLayer
from tools.scan_models.model_inputs import BATCH, find_inputs
from tools.scan_models.tiny_models import iterate_tiny_models

WORKS, REFUSED, FAILS, NOT_TRIED, CUT = "works", "refused", "fails", "not tried", "cut"
_PREFIX: Final = "base_model.model."
"""Of the keys of an adapter's tensors."""
_Tensors = Mapping[str, Tensor]
_Outputs = Mapping[str | None, list[Tensor]]
_Calls = dict[str, tuple[tuple[Any, ...], Tensor]]


@dataclass(frozen=True)
class Outcome:
    """What was seen of one class.

    Attributes:
        status: `works`, `refused` (with a typed error), `fails`, `not tried`: the model alone does not run, or `cut`:
            it took too long.
        detail: the reason; of one that works, how many layers.
        rows: of one that works: `yes` where rows of a batch may use different adapters, or why not.
        merge: of one that works: `yes`, or why the merge in memory is refused.
    """

    status: str
    detail: str
    rows: str = ""
    merge: str = ""


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
    reasons = list[str]()
    try:
        for model in iterate_tiny_models(kind):
            reached: set[str] = set()
            inputs, reason = find_inputs(model.eval(), partial(_reason_not_usable, model, reached))
            if inputs is not None:
                return model, inputs, reached
            reasons.append(reason)
    except Exception as error:
        reasons.append(f"no tiny model: {_first_line(error)}")
    raise UntriedError(reasons[0])


def _reason_not_usable(model: Any, reached: set[str], inputs: Mapping[str, Any]) -> str:
    """Return why a model alone does not run, or train, with such inputs; empty where it does.

    Args:
        reached: filled with the names of the weights that receive a gradient.
    """
    try:
        once, again = _run(model, inputs), _run(model, inputs)
    except Exception as error:
        return _first_line(error)
    if not once:
        return "it returns no floats"
    if not _equal(once, again):
        return "its outputs vary"
    if not all(torch.isfinite(tensor).all() for tensor in once):
        return "its outputs are not finite"
    try:
        reached |= _train_alone(model, inputs)
    except Exception as error:
        return f"it does not train: {_first_line(error)}"
    finally:
        model.eval().requires_grad_(False)
    return "" if reached else "no weight receives a gradient"


def _train_alone(model: Any, inputs: Mapping[str, Any]) -> set[str]:
    """Return the names of the weights that receive a gradient when the model is trained alone."""
    # Frozen again afterwards, as under an adapter: torch chooses some kernels by it, and rounds accordingly.
    _start_training(model.requires_grad_(True))
    _seed()
    _loss(model(**inputs)).backward()
    # Products of smaller gradients would be zero in fp32.
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    reached = {name for name, gradient in gradients.items() if gradient.abs().max() > 1e-18}
    model.zero_grad(set_to_none=True)
    return reached


def _try_adapter(model: Any, inputs: Mapping[str, Any], reached: set[str]) -> Outcome:
    base, keys = _run(model, inputs), list(model.state_dict())
    bank, note = _attach(model)
    _check(_equal(_run(model, inputs), base), "attach changes the outputs")
    covered = [target.path for target in bank.coverage("a").targets]
    weights = [path for path in covered if f"{path}.weight" in reached]
    started = _copy(bank, "a")
    _train(model, bank, "a", inputs)
    _check_moved(weights, started, _copy(bank, "a"))
    adapted = _run(model, inputs)
    trained = _try_swaps(model, bank, inputs, weights, {"a": adapted, None: base})
    rows = _try_rows(model, bank, inputs)
    second = bank.snapshot("b")
    bank.detach()
    _check(_equal(_run(model, inputs), base), "detach does not restore the outputs")
    _check(list(model.state_dict()) == keys, "detach does not restore the keys")
    if _equal(adapted, base) and _equal(trained, base):
        note += ", on which no output depends smoothly"
    part = "" if len(weights) == len(covered) else f", {len(weights)} of them used"
    return Outcome(WORKS, f"{len(covered)} {note}{part}", rows, _try_merge(model, second, inputs, trained))


def _attach(model: Any) -> tuple[lk.AdapterBank, str]:
    """Return a bank with an adapter for all linear layers; where a model has none, for its convolutions."""
    config = lk.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")
    try:
        return lk.attach(model, config, name="a"), "layers"
    except TargetError:
        paths = [path for path, module in model.named_modules() if _is_plain_convolution(module)]
        if not paths:
            raise
        return lk.attach(model, dataclasses.replace(config, target_modules=paths), name="a"), "convolutions"


def _is_plain_convolution(module: nn.Module) -> bool:
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return False
    return module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"


def _try_swaps(
    model: Any, bank: lk.AdapterBank, inputs: Mapping[str, Any], weights: list[str], known: _Outputs
) -> list[Tensor]:
    """Train a second adapter, whose A receives gradients too, and swap; return the outputs with it."""
    bank.add("b", dataclasses.replace(bank.snapshot("a").config, init_lora_weights=False))
    started = _copy(bank, "b")
    _train(model, bank, "b", inputs)
    _check_moved_together(weights, started, _copy(bank, "b"))
    second = _run(model, inputs)
    for name, expected in (*known.items(), ("b", second), *known.items()):
        bank.use(name)
        _check(_equal(_run(model, inputs), expected), f"a swap to {name} is not bitwise")
    return second


def _try_rows(model: Any, bank: lk.AdapterBank, inputs: Mapping[str, Any]) -> str:
    """Return `yes` where each row of a batch gives what its adapter alone gives, or why rows are refused."""
    bank.use(None)
    other = {name: _repeat_row(value) for name, value in inputs.items()}
    alone = {}
    for name in ("a", "b"):
        bank.use(name)
        alone[name] = _run(model, inputs)
    try:
        with bank.rows(["a", "b"]):
            mixed = _run(model, inputs)
        own = _find_own_rows(_run(model, other), alone["b"])
    except LoraKitError as error:
        return _first_line(error)
    compared = [index for index, is_own in enumerate(own) if is_own]
    for index in compared:
        for row, name in enumerate(("a", "b")):
            _check(_is_close(mixed[index][row], alone[name][index][row]), f"row {row} is not what its adapter gives")
    return "yes" if compared else "no output has rows of its own"


def _repeat_row(value: object) -> object:
    """Return inputs whose first row is the second, too."""
    has_rows = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == BATCH
    return value[1:].expand_as(value).clone() if has_rows and isinstance(value, Tensor) else value


def _find_own_rows(changed: list[Tensor], outputs: list[Tensor]) -> list[bool]:
    """Return of each output whether its second row depends on nothing in the first, which was changed."""
    if len(changed) != len(outputs):
        return [False] * len(outputs)
    pairs = zip(changed, outputs, strict=True)
    return [x.shape == y.shape and x.ndim > 1 and len(x) == BATCH and _is_close(x[1], y[1]) for x, y in pairs]


def _try_merge(model: Any, adapter: lk.Adapter, inputs: Mapping[str, Any], expected: list[Tensor]) -> str:
    """Load what was saved into the restored model and merge it; return `yes`, or why the merge is refused."""
    bank = lk.attach(model)
    bank.load("b", adapter)
    bank.use("b")
    _check(_equal(_run(model, inputs), expected), "loaded again, an adapter gives other outputs")
    calls = _record_calls(model, inputs)
    try:
        bank.merge("b")
    except LoraKitError as error:
        return _first_line(error)
    merged = _run(model, inputs)
    is_equal = len(merged) == len(expected) and all(map(_is_close, merged, expected, [1e-3] * len(merged)))
    _check(is_equal or _give_the_same(model, calls), "merged differs from unmerged")
    return "yes"


def _record_calls(model: nn.Module, inputs: Mapping[str, Any]) -> _Calls:
    """Return what each adapted layer was given in a forward, and gave."""
    calls: _Calls = {}

    def record(path: str, _: nn.Module, x: tuple[Any, ...], y: Tensor) -> None:
        # Copies: a model may change what it gave, or was given, in place.
        calls.setdefault(path, (tuple(each.clone() if isinstance(each, Tensor) else each for each in x), y.clone()))

    adapted = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, SlotLayer)]
    hooks = [layer.register_forward_hook(partial(record, path)) for path, layer in adapted]
    _run(model, inputs)
    for hook in hooks:
        hook.remove()
    return calls


def _give_the_same(model: nn.Module, calls: _Calls) -> bool:
    """Return whether every layer gives what it gave before the merge.

    The model may not: where scores are ranked that are nearly equal, as those of random weights, rounding decides.
    """
    with torch.no_grad():
        return all(_is_close(model.get_submodule(path)(*x), y, 1e-3) for path, (x, y) in calls.items())


def _train(model: Any, bank: lk.AdapterBank, name: str, inputs: Mapping[str, Any]) -> None:
    """Train one step."""
    bank.use(name)
    _start_training(model)
    optimizer = torch.optim.SGD(bank.parameters(name), lr=1e-2)
    _seed()
    if (loss := _loss(model(**inputs))).requires_grad:  # not where no covered layer takes part
        loss.backward()
    # The step has the size of Adam's first, whatever the gradient's: a small gradient is no missing one.
    for parameter in bank.parameters(name):
        parameter.grad = None if parameter.grad is None else parameter.grad.sign()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


def _start_training(model: nn.Module) -> None:
    """Switch to training, except what would keep statistics of its inputs: the base must stay as it was."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _check_moved(paths: Collection[str], before: _Tensors, after: _Tensors) -> None:
    """Check that B was trained in every layer; while it is zero, A receives no gradient."""
    moved = _find_moved(before, after)
    silent = [path for path in paths if f"{_PREFIX}{path}.lora_B.weight" not in moved]
    _check(not silent, f"{len(silent)} of {len(paths)} layers are bypassed: {', '.join(silent[:3])}")


def _check_moved_together(paths: Collection[str], before: _Tensors, after: _Tensors) -> None:
    """Check that A was trained in every layer where B was: random weights may silence layers (a ReLU of negatives)."""
    moved = _find_moved(before, after)
    keys = {path: [f"{_PREFIX}{path}.lora_{name}.weight" in moved for name in "AB"] for path in paths}
    apart = [path for path, (a, b) in keys.items() if a != b]
    _check(not apart, f"{len(apart)} of {len(paths)} layers train A or B alone: {', '.join(apart[:3])}")


def _find_moved(before: _Tensors, after: _Tensors) -> set[str]:
    return {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}


def _copy(bank: lk.AdapterBank, name: str) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in bank.state_dict()[name].items()}


def _loss(outputs: object) -> Tensor:
    return sum((tensor.float().square().mean() for tensor in _floats(outputs) if tensor.requires_grad), torch.zeros(()))


def _run(model: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    _seed()
    with torch.no_grad():
        return [tensor.clone() for tensor in _floats(model(**inputs))]


def _seed() -> None:
    """Seed whatever a model may draw from."""
    torch.manual_seed(0)
    numpy.random.seed(0)
    random.seed(0)


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


def _is_close(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> bool:
    """Return whether two tensors are equal but for rounding; where one is not finite, so is the other."""
    if one.shape != other.shape:
        return False
    scale = max(1.0, other.nan_to_num(posinf=0.0, neginf=0.0).abs().max().item()) if other.numel() else 1.0
    return torch.allclose(one, other, rtol=0.0, atol=tolerance * scale, equal_nan=True)


def _check(good: bool, problem: str) -> None:
    if not good:
        raise AssertionError(problem)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"
