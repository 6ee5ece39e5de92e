"""A bank on a model that was compiled, or wrapped for data parallelism: the names are the model's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

import lora_kit as lk
from lora_kit.errors import BankError, TargetError
from tests.support import tiny


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(x).relu()


class Model(nn.Module):
    """Two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.head(x)
        return y


def _make() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def _run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(torch.linspace(-1, 1, 16).view(2, 8))
    return y


def _compile_model(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def _compile_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def _compile_blocks(model: Any) -> nn.Module:
    for number, layer in enumerate(model.layers):
        model.layers[number] = torch.compile(layer, backend="eager")
    own: nn.Module = model
    return own


def _parallelize(model: nn.Module) -> nn.Module:
    return nn.DataParallel(model)


class Around(nn.Module):
    """A module with another inside under some name, as trainers and engines have them."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        setattr(self, name, model)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = getattr(self, self.name)(x)
        return y


def _checkpoint_blocks(model: Any) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    own: nn.Module = model
    return own


def _checkpoint_layers(model: Any) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, nn.Linear))
    own: nn.Module = model
    return own


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch.compile": _compile_model,
    "model.compile": _compile_in_place,
    "blocks": _compile_blocks,
    "DataParallel": _parallelize,
    "both": lambda model: _compile_model(_parallelize(model)),
    "checkpointed": checkpoint_wrapper,
    "checkpointed blocks": _checkpoint_blocks,
    "checkpointed layers": _checkpoint_layers,
    "compiled, checkpointed blocks": lambda model: _compile_blocks(_checkpoint_blocks(model)),
    "an engine": lambda model: Around(model, "module"),
    "Lightning": lambda model: Around(Around(model, "module"), "_forward_module"),
    "an engine of a compiled model": lambda model: Around(_compile_model(model), "module"),
}


CONFIG = lk.LoraConfig(r=2, init_lora_weights=False, target_modules=["proj"])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("way", WAYS)
def test_names_are_the_models_own_and_outputs_follow_the_adapter(way: str, tmp_path: Path) -> None:
    model = WAYS[way](_make())
    plain = _run(model)
    expected = lk.attach(_make(), CONFIG, name="a")
    bank = lk.attach(model, CONFIG, name="a")
    assert bank.coverage("a") == expected.coverage("a")
    bank.load_state_dict(expected.state_dict())
    adapter = bank.save("a", tmp_path / "a")
    assert set(adapter.tensors) == set(expected.snapshot("a").tensors)
    assert adapter.base == expected.snapshot("a").base
    lk.export(tmp_path / "a", "peft", tmp_path / "exported")
    assert set(lk.Adapter.load(tmp_path / "exported").tensors) == set(adapter.tensors)
    torch.testing.assert_close(_run(model), _run(expected.model))
    bank.add("head", lk.LoraConfig(target_modules=[], modules_to_save=["head"]))
    assert list(bank.snapshot("head").tensors) == ["base_model.model.head.weight", "base_model.model.head.bias"]
    bank.detach()
    assert torch.equal(_run(model), plain)
    bank = lk.attach(model)
    bank.load("a", tmp_path / "a")
    bank.use("a")
    torch.testing.assert_close(_run(model), _run(expected.model))


def test_a_compiled_model_has_one_bank() -> None:
    model = _make()
    lk.attach(model)
    with pytest.raises(BankError, match="already"):
        lk.attach(_compile_model(model))


def test_a_layer_that_was_compiled_by_itself_is_refused_by_name() -> None:
    model = _make()
    model.layers[0].proj = torch.compile(model.layers[0].proj, backend="eager")
    with pytest.raises(TargetError, match=r"layers\.0\.proj was compiled by itself"):
        lk.attach(model, CONFIG)
    lk.attach(model, lk.LoraConfig(r=2, target_modules=["head"]))


def test_a_part_that_is_wrapped_by_itself_is_not_saved_under_the_wrappers_name() -> None:
    model = _make()
    model.layers[0].proj = torch.compile(model.layers[0].proj, backend="eager")
    with pytest.raises(TargetError, match=r"parts of layers\.0 were compiled or wrapped"):
        lk.attach(model, lk.LoraConfig(target_modules=[], modules_to_save=["layers.0"]))


def test_a_module_with_more_than_a_model_inside_is_a_model_of_its_own() -> None:
    model = Around(_make(), "module")
    model.head = nn.Linear(3, 3)
    bank = lk.attach(model, CONFIG, name="a")
    assert bank.model is model
    assert all(key.startswith("base_model.model.module.layers.") for key in bank.snapshot("a").tensors)


@pytest.mark.parametrize("way", ["checkpointed", "checkpointed blocks", "checkpointed layers"])
def test_gradients_under_checkpoint_wrappers_are_those_without(way: str) -> None:
    plain, wrapped = _make(), WAYS[way](_make())
    expected, bank = lk.attach(plain, CONFIG, name="a"), lk.attach(wrapped, CONFIG, name="a")
    bank.load_state_dict(expected.state_dict())
    for model in (plain, wrapped):
        model(torch.linspace(-1, 1, 16).view(2, 8)).square().sum().backward()
    for leaf, other in zip(bank.parameters("a"), expected.parameters("a"), strict=True):
        torch.testing.assert_close(leaf.grad, other.grad)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_peft_model_is_refused(*, compiled: bool) -> None:
    model: nn.Module = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(BankError, match="layers of PEFT"):
        lk.attach(_compile_model(model) if compiled else model)
