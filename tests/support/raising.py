"""How each error that a docstring of a public name lists comes about; paths are those of `world`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft

import lora_kit as lk
from lora_kit.adapter.adapter import Adapter
from lora_kit.algebra.compare import compare
from lora_kit.data.preparation.prepare import prepare
from lora_kit.exporters.export import check
from tests.support import texts, tiny

SQL, TORN = "adapters/sql", "adapters/torn"


def config(**fields: Any) -> lk.LoraConfig:
    return lk.LoraConfig(**{"r": 2, "target_modules": ("q_proj",), **fields})


def value(model: Any = None, **fields: Any) -> Adapter:
    return lk.attach(model or tiny.llama(), config(init_lora_weights=False, **fields), name="a").snapshot("a")


def loaded(**how: Any) -> lk.AdapterBank:
    """A bank with one adapter, loaded and in use."""
    bank = lk.attach(tiny.llama(), **how)
    bank.load("a", value())
    bank.use("a")
    return bank


def trained(model: Any = None, **fields: Any) -> lk.AdapterBank:
    return lk.attach(model or tiny.llama(), config(**fields), name="a")


def peft_model(**fields: Any) -> Any:
    return peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], **fields))


def at_odds() -> Any:
    """A PeftModel whose config names other layers than it has."""
    model = peft_model()
    model.peft_config["default"].target_modules = {"v_proj"}
    return model


def twice(act: Callable[..., Any], *on: Any) -> None:
    act(*on)
    act(*on)


def within(block: contextlib.AbstractContextManager[Any], act: Callable[[], Any] = lambda: None) -> None:
    with block:
        act()


def forward_of(bank: lk.AdapterBank) -> Callable[[], Any]:
    return lambda: tiny.logits(bank.model, tiny.batch(rows=3))


def merged_inside(bank: lk.AdapterBank) -> None:
    within(bank.using("a"), lambda: bank.merge("a"))


def routed(names: Any) -> None:
    bank = loaded()
    within(bank.rows(names), forward_of(bank))


def released_lease() -> Any:
    lease = loaded().lease("a")
    lease.release()
    return lease


def run_with_other_tokens() -> None:
    bank = loaded()
    within(bank.runs([("a", 2), (None, 1)]), forward_of(bank))


def recipe(**fields: Any) -> dict[str, Any]:
    return {"base": "kit-base", "data": "train.jsonl", "out": "adapters/new", **fields}


def sweep(over: Any = ("lora.r=2,4",), **fields: Any) -> Any:
    data = {"train": "train.jsonl", "validation": "valid.jsonl"}
    return lk.sweep(recipe(**{"data": data, **fields}), over)


def bad_rows() -> str:
    return str(texts.write(Path("bad.jsonl"), [{"question": "?"}]))


CASES: dict[str, Callable[[], Any]] = {
    "attach BankError": lambda: twice(lk.attach, tiny.llama()),
    "attach TargetError": lambda: lk.attach(tiny.llama(), config(target_modules=("nothing",))),
    "attach ConfigError": lambda: lk.attach(tiny.llama(), slots=0),
    "attach OutOfMemoryError": lambda: lk.attach(tiny.llama(), slots=10**12, max_rank=64),
    "adopt BankError": lambda: twice(lk.adopt, peft_model()),
    "adopt ConfigError": lambda: lk.adopt(tiny.llama()),
    "adopt TargetError": lambda: lk.adopt(at_odds()),
    "combine AdapterError": lambda: lk.combine([(TORN, 1)]),
    "combine UnknownAdapterError": lambda: lk.combine([("nobody", 1)]),
    "combine BaseMismatchError": lambda: lk.combine([(SQL, 1), (value(), 1)]),
    "combine MergeError": lambda: lk.combine([(value(use_dora=True), 1)]),
    "combine ConfigError": lambda: lk.combine([(SQL, 1)], method="glue"),
    "resize AdapterError": lambda: lk.resize(TORN, rank=1),
    "resize UnknownAdapterError": lambda: lk.resize("nobody", rank=1),
    "resize MergeError": lambda: lk.resize(value(use_dora=True), rank=1),
    "resize ConfigError": lambda: lk.resize(SQL, rank=1, energy=0.5),
    "compare AdapterError": lambda: compare(TORN, SQL),
    "compare UnknownAdapterError": lambda: compare("nobody", SQL),
    "compare BaseMismatchError": lambda: compare(SQL, value()),
    "compare MergeError": lambda: compare(value(use_dora=True), value()),
    "extract MergeError": lambda: lk.extract("kit-base", "kit-base", rank=1),
    "extract BaseModelError": lambda: lk.extract("kit-base", "nowhere/at/all", rank=1),
    "extract ConfigError": lambda: lk.extract("kit-base", "tuned-folder"),
    "export ExportError": lambda: lk.export(value(use_dora=True), "vllm", "out/x"),
    "export ConfigError": lambda: lk.export(SQL, "vlllm", "out/x"),
    "export BaseModelError": lambda: lk.export(SQL, "vllm", "out/x", base="nowhere/at/all"),
    "export AdapterError": lambda: lk.export(SQL, "vllm", "out/x", base="other-base"),
    "export UnknownAdapterError": lambda: lk.export("nobody", "vllm", "out/x"),
    "export StorageError": lambda: lk.export(SQL, "vllm", "base-folder"),
    "check ConfigError": lambda: check(SQL, "vlllm"),
    "check ExportError": lambda: check(value(), "gguf"),
    "check BaseModelError": lambda: check(SQL, "gguf", base="nowhere/at/all"),
    "check AdapterError": lambda: check(SQL, "vllm", base="other-base"),
    "check UnknownAdapterError": lambda: check("nobody", "vllm"),
    "load_base BaseModelError": lambda: lk.load_base("nowhere/at/all"),
    "load_base ConfigError": lambda: lk.load_base("kit-base", dtype="bf17"),
    "prepare BaseModelError": lambda: prepare("answers.csv", base="nowhere/at/all"),
    "prepare DataError": lambda: prepare("nothing.csv"),
    "prepare StorageError": lambda: prepare("rows.csv", "base-folder"),
    "sweep RecipeError": lambda: sweep(["lora.rank=2,4"]),
    "sweep ConfigError": lambda: lk.sweep(recipe(), ["lora.r=2,4"], workers=0),
    "sweep DataError": lambda: sweep(data={"train": bad_rows(), "validation": "valid.jsonl"}),
    "sweep BaseModelError": lambda: sweep(base="nowhere/at/all"),
    "sweep StorageError": lambda: sweep(out="base-folder"),
    "evaluate AdapterError": lambda: lk.evaluate("kit-base", [TORN], "test.jsonl"),
    "evaluate UnknownAdapterError": lambda: lk.evaluate("kit-base", ["nobody"], "test.jsonl"),
    "evaluate BaseModelError": lambda: lk.evaluate("nowhere/at/all", [SQL], "test.jsonl"),
    "evaluate ConfigError": lambda: lk.evaluate("kit-base", [SQL], "test.jsonl", metrics=["bleuu"]),
    "evaluate DataError": lambda: lk.evaluate("kit-base", [SQL], "nothing.jsonl"),
    "evaluate StorageError": lambda: lk.evaluate(
        "kit-base", [SQL], "test.jsonl", metrics=["exact_match"], out="test.jsonl"
    ),
    "merge MergeError": lambda: lk.merge("base-folder", SQL, "base-folder/merged"),
    "merge AdapterError": lambda: lk.merge("kit-base", TORN, "merged"),
    "merge BaseMismatchError": lambda: lk.merge("tuned-folder", SQL, "merged"),
    "merge BaseModelError": lambda: lk.merge("nowhere/at/all", SQL, "merged"),
    "merge ConfigError": lambda: lk.merge("kit-base", SQL, "merged", verify="twice"),
    "merge StorageError": lambda: lk.merge("kit-base", SQL, "tuned-folder"),
    "train RecipeError": lambda: lk.train(recipe(lora={"rank": 8})),
    "train DataError": lambda: lk.train(recipe(data=bad_rows())),
    "train BaseModelError": lambda: lk.train(recipe(base="nowhere/at/all")),
    "train TargetError": lambda: lk.train(recipe(lora={"target_modules": ["nothing"]})),
    "train StorageError": lambda: lk.train(recipe(out="base-folder")),
    "LoraConfig ConfigError": lambda: lk.LoraConfig(r=0),
    "Adapter AdapterError": lambda: Adapter(config(), {}),
    "Adapter ConfigError": lambda: Adapter(config(), value().tensors, allow=["all"]),
    "Adapter.load AdapterError": lambda: Adapter.load(TORN),
    "Adapter.load ConfigError": lambda: Adapter.load("base-folder"),
    "Adapter.save StorageError": lambda: value().save("base-folder"),
    "Adapter.save ConfigError": lambda: value().save("adapters/new", record={"seed": object()}),
    "bank.parameters BankError": lambda: loaded().parameters("a"),
    "bank.parameters UnknownAdapterError": lambda: loaded().parameters("b"),
    "bank.coverage UnknownAdapterError": lambda: loaded().coverage("b"),
    "bank.add BankError": lambda: trained().add("a", config()),
    "bank.add ConfigError": lambda: trained().add("", config()),
    "bank.add TargetError": lambda: trained().add("b", config(target_modules=("nothing",))),
    "bank.load AdapterError": lambda: loaded().load("b", TORN),
    "bank.load BankError": lambda: loaded(slots=1).load("b", value()),
    "bank.load BaseMismatchError": lambda: loaded().load("b", value(tiny.llama(seed=1))),
    "bank.load ConfigError": lambda: loaded().load("b", value(), allow=["all"]),
    "bank.load_state_dict AdapterError": lambda: trained().load_state_dict({"b": {}}),
    "bank.offer AdapterError": lambda: loaded().offer("b", "nowhere"),
    "bank.offer BankError": lambda: loaded().offer("a", value()),
    "bank.offer ConfigError": lambda: loaded().offer("b", "base-folder"),
    "bank.unload BankError": lambda: loaded().unload("a"),
    "bank.unload UnknownAdapterError": lambda: loaded().unload("b"),
    "bank.lease BankError": lambda: trained().lease("a"),
    "bank.lease UnknownAdapterError": lambda: loaded().lease("b"),
    "bank.restore AdapterError": lambda: trained().restore("a", value(r=4)),
    "bank.restore BankError": lambda: loaded().restore("a", value()),
    "bank.restore UnknownAdapterError": lambda: trained().restore("b", value()),
    "bank.detach BankError": lambda: twice(loaded().detach),
    "bank.use UnknownAdapterError": lambda: loaded().use("b"),
    "bank.using UnknownAdapterError": lambda: within(loaded().using("b")),
    "bank.rows ConfigError": lambda: routed("a"),
    "bank.rows RoutingError": lambda: routed(["a", None]),
    "bank.rows UnknownAdapterError": lambda: routed(["a", "b", None]),
    "bank.runs ConfigError": lambda: within(loaded().runs([])),
    "bank.runs UnknownAdapterError": lambda: within(loaded().runs([("b", 1)])),
    "bank.runs BankError": lambda: within(loaded().runs([(released_lease(), 1)])),
    "bank.runs RoutingError": lambda: run_with_other_tokens(),
    "bank.reason_no_runs UnknownAdapterError": lambda: loaded().reason_no_runs("b"),
    "bank.reference UnknownAdapterError": lambda: loaded().reference("b"),
    "bank.reference BankError": lambda: trained(target_modules=("lm_head",)).reference(),
    "bank.snapshot UnknownAdapterError": lambda: loaded().snapshot("b"),
    "bank.save UnknownAdapterError": lambda: loaded().save("b", "adapters/new"),
    "bank.save StorageError": lambda: loaded().save("a", "base-folder"),
    "bank.save ConfigError": lambda: loaded().save("a", "adapters/new", record={"seed": object()}),
    "bank.merge MergeError": lambda: trained(tiny.llama(tie=True), target_modules=("embed_tokens",)).merge("a"),
    "bank.merge BankError": lambda: merged_inside(loaded()),
    "bank.merge UnknownAdapterError": lambda: loaded().merge("b"),
}
