"""What a bank can be attached to, what a detached one says, and what is copied and pickled."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_kit as lk
from lora_kit import errors
from lora_kit.errors import BankError, ConfigError, LoraKitError, UnknownAdapterError
from lora_kit.layers.slot_layer import SlotLayer
from tests.support import folders, tiny

CONFIG = lk.LoraConfig(r=2, init_lora_weights=False)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn, torch.bool, "int8", "fp7", 4])
def test_a_dtype_that_adapters_cannot_have_is_refused_at_attach(dtype: Any) -> None:
    model = tiny.llama()
    with pytest.raises(ConfigError, match="dtype"):
        lk.attach(model, dtype=dtype)
    lk.attach(model).detach()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "float16", torch.float64, "float64"])
def test_a_dtype_may_be_named(dtype: Any) -> None:
    bank = lk.attach(tiny.llama(), dtype=dtype)
    bank.load("a", folders.adapter())
    assert bank.dtype.is_floating_point
    assert bank.dtype.itemsize == {"fp32": 4, "bf16": 2, "float16": 2}.get(dtype, 8)


@pytest.mark.parametrize("config", [None, CONFIG])
def test_a_part_or_the_whole_of_a_model_that_has_a_bank_is_refused_by_name(config: lk.LoraConfig | None) -> None:
    model = tiny.llama()
    bank = lk.attach(model, config)
    with pytest.raises(BankError, match="this model is model in a LlamaForCausalLM that has a bank already"):
        lk.attach(model.model)
    with pytest.raises(BankError, match="this model has a bank already"):
        lk.attach(model)
    whole = nn.ModuleDict({"inner": model})
    with pytest.raises(BankError, match="inner in this model has a bank already"):
        lk.attach(whole)
    bank.detach()
    part = lk.attach(model.model, config)
    with pytest.raises(BankError, match="model in this model has a bank already"):
        lk.attach(model)
    part.detach()
    lk.attach(model).detach()


METHODS: dict[str, Callable[[lk.AdapterBank], Any]] = {
    "names": lambda bank: bank.names,
    "offered": lambda bank: bank.offered,
    "active": lambda bank: bank.active,
    "parameters": lambda bank: bank.parameters("a"),
    "coverage": lambda bank: bank.coverage("a"),
    "fingerprint": lambda bank: bank.fingerprint(),
    "add": lambda bank: bank.add("b", CONFIG),
    "load": lambda bank: bank.load("b", folders.adapter()),
    "offer": lambda bank: bank.offer("b", folders.adapter()),
    "unload": lambda bank: bank.unload("a"),
    "lease": lambda bank: bank.lease("a"),
    "restore": lambda bank: bank.restore("a", folders.adapter()),
    "detach": lambda bank: bank.detach(),
    "use": lambda bank: bank.use("a"),
    "use the base": lambda bank: bank.use(None),
    "using": lambda bank: bank.using("a").__enter__(),
    "rows": lambda bank: bank.rows(["a"]).__enter__(),
    "reference": lambda bank: bank.reference(),
    "snapshot": lambda bank: bank.snapshot("a"),
    "state_dict": lambda bank: bank.state_dict(),
    "load_state_dict": lambda bank: bank.load_state_dict({}),
    "save": lambda bank: bank.save("a", "nowhere"),
    "merge": lambda bank: bank.merge("a"),
}


def test_every_method_of_a_bank_is_among_those_that_are_tried() -> None:
    public = {name for name in vars(lk.AdapterBank) if not name.startswith("_")}
    assert public <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_detached_bank_refuses_everything_and_changes_nothing(name: str) -> None:
    model = tiny.llama()
    bank = lk.attach(model, CONFIG, name="a")
    bank.detach()
    modules = [type(module) for module in model.modules()]
    with pytest.raises(BankError, match="detached already"):
        METHODS[name](bank)
    assert [type(module) for module in model.modules()] == modules
    lk.attach(model).detach()


def test_a_bank_is_neither_copied_nor_pickled() -> None:
    bank = lk.attach(tiny.llama(), CONFIG)
    for call in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(BankError, match="a bank is not copied or pickled"):
            call(bank)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_values_are_copied_and_pickled_as_they_are(again: Callable[[Any], Any]) -> None:
    adapter = folders.adapter()
    other = again(adapter)
    assert other == adapter
    assert other.digest == adapter.digest
    assert dict(other.record) == dict(adapter.record)
    assert again(CONFIG) == CONFIG
    given: list[LoraKitError] = [UnknownAdapterError("wied", ["wide"])]
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LoraKitError)]
    given += [kind("what was given", hint="what to do") for kind in kinds if kind is not UnknownAdapterError]
    for error in given:
        found = again(error)
        assert (type(found), str(found), found.args) == (type(error), str(error), error.args)
        assert vars(found) == vars(error)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copied_model_computes_as_the_original_did_and_goes_its_own_way(again: Callable[[Any], Any]) -> None:
    model = tiny.llama()
    bank = lk.attach(model, CONFIG, name="a")
    plain, inputs = tiny.logits(model, tiny.batch()), tiny.batch()
    with bank.rows(["a", None, "a"]):
        mixed = tiny.logits(model, inputs)
        rows = again(model)
    other = again(model)
    bank.use(None)
    assert torch.equal(tiny.logits(other, inputs), plain)
    torch.testing.assert_close(tiny.logits(rows, inputs), mixed)
    with pytest.raises(BankError, match="a copy of one that has a bank"):
        lk.attach(other)
    bank.detach()
    assert torch.equal(tiny.logits(other, inputs), plain)
    lk.attach(again(model)).detach()


class Pair(nn.Module):
    """A model that has a module of another one."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.own = part, nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda bank: copy.copy(bank.model), "shares lm_head, model with a LlamaForCausalLM"),
        (lambda bank: Pair(bank.model.model.layers[0]), "shares model.layers.0 with"),
        (lambda bank: Pair(bank.model.lm_head.base_layer), "shares lm_head.base_layer with"),
        (lambda bank: bank.model.model, "is model in a LlamaForCausalLM"),
        (lambda bank: bank.reference(), "is the reference of one"),
        (lambda bank: Pair(bank.reference()), "is the reference of one"),
    ],
    ids=["shallow copy", "a block", "a wrapped layer", "a part", "the reference", "around the reference"],
)
def test_a_model_that_shares_modules_with_one_that_has_a_bank_gets_none(
    make: Callable[[Any], nn.Module], reason: str
) -> None:
    bank = lk.attach(tiny.llama(), CONFIG)
    if "lm_head.base" in reason:
        bank.add("head", lk.LoraConfig(r=2, target_modules=["lm_head"]))
    model = make(bank)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(BankError, match=reason):
        lk.attach(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_a_lease_is_neither_copied_nor_pickled() -> None:
    bank = lk.attach(tiny.llama(), CONFIG, name="a")
    bank.load("b", bank.snapshot("a"))
    with bank.lease("b") as lease:
        for call in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(BankError, match="a lease is not copied or pickled"):
                call(lease)


def test_data_parallel_is_refused_with_what_to_use_instead() -> None:
    model = tiny.llama()
    lk.attach(model, CONFIG)
    layer = next(module for module in model.modules() if isinstance(module, SlotLayer))
    with pytest.raises(BankError, match="DistributedDataParallel"):
        layer._replicate_for_data_parallel()


@pytest.mark.parametrize("given", [5, None, "model"])
def test_what_is_no_model_is_a_config_error(given: Any) -> None:
    with pytest.raises(ConfigError, match="a model"):
        lk.attach(given)


class Listed(nn.Module):
    """Layers with names that are called from a plain list, as in the heads of Mask2Former."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(4, 4), nn.ReLU()]
        for index, layer in enumerate(self.layers):
            self.add_module(str(index), layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_layers_that_are_called_from_a_plain_list_are_adapted() -> None:
    model = Listed()
    before = list(model.layers)
    bank = lk.attach(model, lk.LoraConfig(r=2, target_modules="all-linear"), name="a")
    model(torch.ones(2, 4)).sum().backward()
    assert all(leaf.grad is not None for leaf in bank.parameters("a"))
    bank.detach()
    assert all(one is other for one, other in zip(model.layers, before, strict=True))


def test_models_may_share_activations_without_weights() -> None:
    first, second = tiny.llama(), tiny.llama(seed=1)
    for layer, other in zip(first.model.layers, second.model.layers, strict=True):
        other.mlp.act_fn = layer.mlp.act_fn
    lk.attach(first, lk.LoraConfig(r=2))
    lk.attach(second, lk.LoraConfig(r=2)).detach()
