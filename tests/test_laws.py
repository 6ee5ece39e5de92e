"""The laws of the design, on tiny GPT-2, Llama and BERT models, fp32 and bf16."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora_kit as lk
from lora_kit.errors import BankError, LoraKitError, RoutingError, UnknownAdapterError
from tests.support import tiny

KINDS = [(name, dtype) for name in tiny.MODELS for dtype in (torch.float32, torch.bfloat16)]
every_kind = pytest.mark.parametrize(("kind", "dtype"), KINDS, ids=[f"{k}-{str(d)[6:]}" for k, d in KINDS])

NAMES = ("wide", "narrow", "table", "head", "dora")
HEADS = {"llama": "lm_head", "gpt2": "lm_head", "bert": "classifier"}
EMBEDDINGS = {"llama": "embed_tokens", "gpt2": "wte", "bert": "word_embeddings"}


def configs(kind: str) -> dict[str, dict[str, Any]]:
    """Adapters of different ranks and targets, one of them a head alone."""
    return {
        "wide": {"r": 4, "lora_alpha": 8, "init_lora_weights": False},
        "narrow": {"r": 2, "layers_to_transform": [1], "use_rslora": True, "init_lora_weights": False},
        "table": {"r": 3, "target_modules": [EMBEDDINGS[kind]], "init_lora_weights": False},
        "head": {"target_modules": [], "modules_to_save": [HEADS[kind]]},
        "dora": {"r": 2, "lora_alpha": 3, "use_dora": True, "init_lora_weights": False},
    }


def filled(kind: str, dtype: torch.dtype) -> tuple[nn.Module, lk.AdapterBank]:
    """A model with five adapters in its bank, each of which changes its outputs."""
    model = tiny.MODELS[kind](dtype=dtype)
    bank = lk.attach(model, dtype=torch.float32)
    for name, fields in configs(kind).items():
        bank.add(name, lk.LoraConfig(**fields))
    with torch.no_grad():
        for parameter in [*bank.parameters("head"), *bank.parameters("dora")]:
            parameter.mul_(1.5)
    return model, bank


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of a model, those of trainable adapters among them, by the names of the modules there are."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def train_some(model: nn.Module, bank: lk.AdapterBank, name: str) -> None:
    optimizer = torch.optim.SGD(bank.parameters(name), lr=0.5)
    bank.use(name)
    for step in range(3):
        model(**tiny.batch(seed=step)).logits.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@every_kind
def test_attach_changes_no_output_and_detach_leaves_the_model_as_it_was(kind: str, dtype: torch.dtype) -> None:
    model = tiny.MODELS[kind](dtype=dtype)
    model.get_input_embeddings().requires_grad_(False)
    before, trains = state(model), [p.requires_grad for p in model.parameters()]
    modules, plain = [type(m) for m in model.modules()], tiny.logits(model, tiny.batch())
    bank = lk.attach(model, lk.LoraConfig(r=4, modules_to_save=[HEADS[kind]]), name="a")
    assert torch.equal(tiny.logits(model, tiny.batch()), plain)
    train_some(model, bank, "a")
    bank.detach()
    assert same(state(model), before)
    assert [p.requires_grad for p in model.parameters()] == trains
    assert [type(m) for m in model.modules()] == modules
    assert torch.equal(tiny.logits(model, tiny.batch()), plain)


@every_kind
def test_training_changes_the_trained_adapter_and_nothing_else(kind: str, dtype: torch.dtype) -> None:
    model, bank = filled(kind, dtype)
    base = state(model)
    kept = {name: bank.snapshot(name) for name in bank.names}
    train_some(model, bank, "wide")
    assert same(state(model), base)
    changed = [name for name in bank.names if bank.snapshot(name) != kept[name]]
    assert changed == ["wide"]
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for name in bank.names for p in bank.parameters(name)}


@every_kind
def test_swaps_and_round_trips_are_bitwise(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, bank = filled(kind, dtype)
    inputs = tiny.batch()
    plain = {}
    for name in (*bank.names, None):
        bank.use(name)
        plain[name] = tiny.logits(model, inputs)
    assert len({tensor.float().sum().item() for tensor in plain.values()}) == 6
    for name in (None, "wide", "narrow", "wide", None, "head", None, "table", "dora", "wide", "dora", None):
        bank.use(name)
        assert torch.equal(tiny.logits(model, inputs), plain[name])
    for name in NAMES:
        saved = bank.save(name, tmp_path / name)
        loaded = lk.Adapter.load(tmp_path / name)
        assert loaded.digest == saved.digest
        assert all(torch.equal(loaded.tensors[key], tensor) for key, tensor in saved.tensors.items())
    bank.detach()
    fresh = tiny.MODELS[kind](dtype=dtype)
    bank = lk.attach(fresh, slots=5, max_rank=4)
    for name in NAMES:
        bank.load(name, tmp_path / name)
    for name in (None, "head", "wide", "table", "dora", "narrow", None):
        bank.use(name)
        assert torch.equal(tiny.logits(fresh, inputs), plain[name])
    bank.use(None)
    for name in NAMES:
        assert bank.snapshot(name) == lk.Adapter.load(tmp_path / name)


@every_kind
def test_a_row_gives_what_its_adapter_gives_alone(kind: str, dtype: torch.dtype) -> None:
    model, bank = filled(kind, dtype)
    names = ["wide", None, "head", "narrow", "table", "wide", "dora"]
    inputs = tiny.batch(rows=len(names))
    with bank.rows(names):
        together = tiny.logits(model, inputs)
    for row, name in enumerate(names):
        bank.use(name)
        alone = tiny.logits(model, {key: value[row : row + 1] for key, value in inputs.items()})
        close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
        torch.testing.assert_close(together[row : row + 1], alone, **close)


@settings(max_examples=25, deadline=None)
@given(names=st.lists(st.sampled_from([*NAMES, None]), min_size=1, max_size=6))
def test_rows_are_independent_of_their_neighbors(names: list[str | None]) -> None:
    model, bank = filled("llama", torch.float32)
    inputs = tiny.batch(rows=len(names))
    with bank.rows(names):
        together = tiny.logits(model, inputs)
    for name in set(names):
        bank.use(name)
        chosen = [row for row, other in enumerate(names) if other == name]
        torch.testing.assert_close(together[chosen], tiny.logits(model, inputs)[chosen], rtol=1e-5, atol=1e-6)


@every_kind
def test_a_failed_load_changes_nothing(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, bank = filled(kind, dtype)
    other = lk.attach(tiny.MODELS[kind](dtype=dtype, seed=9), lk.LoraConfig(r=4, init_lora_weights=False), name="x")
    other.save("x", tmp_path / "x")
    before, names = everything(model), bank.names
    bank.use("wide")
    plain = tiny.logits(model, tiny.batch())
    for source in (tmp_path / "x", tmp_path / "absent", tmp_path):
        with pytest.raises(LoraKitError):
            bank.load("x", source)
    with pytest.raises(BankError, match="loaded already"):
        bank.load("wide", tmp_path / "x")
    assert bank.names == names
    assert bank.active == "wide"
    assert same(everything(model), before)
    assert torch.equal(tiny.logits(model, tiny.batch()), plain)
    bank.load("x", tmp_path / "x", allow=["other-base"])
    assert "x" in bank.names


def test_a_name_that_the_model_does_not_have_is_refused_in_training_and_said_of_an_adapter(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = lk.attach(tiny.llama(), lk.LoraConfig(target_modules=["q_proj"], layers_to_transform=[0, 1])).snapshot(
        "default"
    )
    for more in ({"target_modules": ["q_proj", "FAKE"]}, {"layers_to_transform": [0, 1, 7]}):
        config = dataclasses.replace(made.config, **more)
        with pytest.raises(LoraKitError, match=r"FAKE|layers_to_transform=7"):
            lk.attach(tiny.llama(), config)
        bank = lk.attach(tiny.llama(), slots=1)
        bank.load("quiet", lk.Adapter(config, made.tensors), allow=["unmatched-targets"])
        assert "nothing in the model matches" not in caplog.text
        bank.unload("quiet")
        bank.load("a", lk.Adapter(config, made.tensors))  # as in PEFT: every tensor has its place
        assert "nothing in the model matches" in caplog.text
        caplog.clear()
        short = {key: tensor for key, tensor in made.tensors.items() if "layers.1" not in key}
        with pytest.raises(LoraKitError, match=r"no LoRA weights for model\.layers\.1"):
            bank.load("b", lk.Adapter(config, short))
        assert bank.names == ("a",)


def test_values_that_overflow_the_banks_dtype_are_refused() -> None:
    source = lk.attach(tiny.llama(), lk.LoraConfig(target_modules=["q_proj"]), name="a")
    with torch.no_grad():
        source.parameters("a")[0].fill_(1e5)
    bank = lk.attach(tiny.llama(dtype=torch.float16), slots=1)
    with pytest.raises(LoraKitError, match="beyond 65504"):
        bank.load("a", source.snapshot("a"))
    assert bank.names == ()


def test_a_load_that_runs_out_of_memory_half_way_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, bank = filled("llama", torch.float32)
    adapter = bank.snapshot("wide")
    bank.unload("wide")
    inputs, calls = tiny.batch(), []
    with bank.rows(["narrow", None, "dora"]):
        before = tiny.logits(model, inputs)
    real = torch.Tensor.copy_

    def failing(self: torch.Tensor, *args: Any) -> torch.Tensor:
        calls.append(self)
        if len(calls) == 9:
            raise MemoryError
        return real(self, *args)

    monkeypatch.setattr(torch.Tensor, "copy_", failing)
    with pytest.raises(MemoryError):
        bank.load("wide", adapter)
    monkeypatch.undo()
    assert bank.names == ("narrow", "table", "head", "dora")
    bank.load("table2", bank.snapshot("table"))  # into the slot that was left, which covers other layers
    with bank.rows(["narrow", None, "dora"]):
        assert torch.equal(tiny.logits(model, inputs), before)
    bank.use("table2")
    again = tiny.logits(model, inputs)
    bank.use("table")
    assert torch.equal(tiny.logits(model, inputs), again)
    with bank.rows(["table2", "table", None]):
        rows = tiny.logits(model, inputs)
    torch.testing.assert_close(rows[:2], again[:2], rtol=1e-5, atol=1e-6)


@every_kind
def test_merged_equals_unmerged(kind: str, dtype: torch.dtype) -> None:
    model, bank = filled(kind, dtype)
    if kind == "gpt2":
        model.lm_head.base_layer.weight = nn.Parameter(
            model.lm_head.base_layer.weight.detach().clone(), requires_grad=False
        )
    for name in NAMES:
        bank.use(name)
        unmerged = tiny.logits(model, tiny.batch())
        retentions = bank.merge(name)
        assert bank.active is None
        assert name not in bank.names
        difference = (tiny.logits(model, tiny.batch()) - unmerged).float().norm() / unmerged.float().norm()
        assert difference <= 16 * torch.finfo(dtype).eps
        assert all(each.retained > (0.999 if dtype == torch.float32 else 0.8) for each in retentions)


def test_merging_into_a_tied_weight_is_refused_and_changes_nothing() -> None:
    model = tiny.llama(tie=True)
    before = everything(model)
    bank = lk.attach(model, lk.LoraConfig(target_modules=["embed_tokens", "q_proj"], init_lora_weights=False), name="a")
    plain = tiny.logits(model, tiny.batch())
    with pytest.raises(lk.LoraKitError, match="shared with another module"):
        bank.merge("a")
    assert torch.equal(tiny.logits(model, tiny.batch()), plain)
    bank.detach()
    assert same(everything(model), before)


def test_a_merge_that_would_not_be_finite_changes_nothing() -> None:
    model = tiny.llama(dtype=torch.float16)
    bank = lk.attach(model, lk.LoraConfig(target_modules=["down_proj"], init_lora_weights=False), name="a")
    with torch.no_grad():
        bank.parameters("a")[-1].fill_(1e6)
    before = everything(model)
    with pytest.raises(lk.LoraKitError, match="not finite"):
        bank.merge("a")
    assert same(everything(model), before)
    assert bank.names == ("a",)


def test_an_adapter_on_a_tied_embedding_does_not_leak_into_the_head() -> None:
    model = tiny.llama(tie=True)
    bank = lk.attach(model, lk.LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False), name="a")
    hidden = torch.randn(1, 3, 32)
    assert torch.equal(model.lm_head(hidden), hidden @ model.lm_head.weight.mT)
    ids = torch.tensor([[4, 5]])
    assert not torch.equal(model.model.embed_tokens(ids), model.lm_head.weight[ids])
    bank.use(None)
    assert torch.equal(model.model.embed_tokens(ids), model.lm_head.weight[ids])


def test_nothing_falls_back_silently() -> None:
    model, bank = filled("llama", torch.float32)
    with pytest.raises(UnknownAdapterError, match="did you mean 'wide'"):
        bank.use("wied")
    with pytest.raises(UnknownAdapterError), bank.rows(["wide", "absent"]):
        pass
    with pytest.raises(LoraKitError), bank.rows("wide"):
        pass
    with pytest.raises(RoutingError, match="2 rows were routed"), bank.rows(["wide", "narrow"]):
        tiny.logits(model, tiny.batch(rows=3))
    assert bank.active is None
    bank.use("wide")
    with pytest.raises(BankError, match="in use"):
        bank.unload("wide")
    with pytest.raises(BankError, match="a bank already"):
        lk.attach(model)


def test_routing_is_restored_when_a_block_fails() -> None:
    _, bank = filled("llama", torch.float32)
    bank.use("narrow")

    def fail() -> None:
        with bank.using("wide"), bank.rows(["wide", None]):
            assert bank.active == ("wide", None)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert bank.active == "narrow"
