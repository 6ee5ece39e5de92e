"""What a failed load leaves behind, which is nothing; and how one base is told from another."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_kit as lk
from lora_kit.adapter.adapter_record import RECORD, seal_record
from lora_kit.adapter.folder import CONFIG, WEIGHTS
from lora_kit.adapter.peft_keys import PREFIX
from lora_kit.errors import BaseMismatchError, LoraKitError, OutOfMemoryError, StorageError
from lora_kit.layers.linear import LoraLinear
from lora_kit.targets.fingerprint import fingerprint, list_base_mismatches
from lora_kit.targets.match import named_layers
from tests.support import folders, tiny
from tests.support.folders import A0, B0, PATHS
from tests.support.merging import base_folder

Fault = Callable[[Path], Any]


def state(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a load might touch."""
    return {
        "kinds": [(path, type(module)) for path, module in model.named_modules()],
        "keys": list(model.state_dict()),
        "bits": [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())],
        "trainable": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
    }


def is_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    bits = zip(one["bits"], other["bits"], strict=True)
    return all(one[key] == other[key] for key in ("kinds", "keys", "trainable")) and all(
        torch.equal(*pair) for pair in bits
    )


def with_tensors(**changes: torch.Tensor | None) -> Fault:
    values = {key: tensor for key, tensor in (folders.tensors() | changes).items() if tensor is not None}
    return lambda folder: folders.foreign(folder, values)


def with_fields(**fields: Any) -> Fault:
    return lambda folder: folders.foreign(folder, **fields)


def cut_short(folder: Path) -> None:
    folders.adapter().save(folder)
    os.truncate(folder / WEIGHTS, 1_000)


def renamed(old: str, new: str) -> dict[str, torch.Tensor]:
    return {key.replace(old, new): tensor for key, tensor in folders.tensors().items()}


def torn(folder: Path) -> None:
    folders.adapter(seed=1).save(folder)
    (folder / WEIGHTS).write_bytes((folders.adapter(seed=2).save(folder.with_name("two")) / WEIGHTS).read_bytes())


NAN = torch.full((4, 32), float("nan"))
FAULTS: dict[str, tuple[Fault, str]] = {
    "absent": (lambda folder: None, "is not a folder"),
    "empty": (lambda folder: folder.mkdir(), f"has no {CONFIG}"),
    "cut short": (cut_short, "1,000 bytes"),
    "a torn pair": (torn, "changed since"),
    "a damaged config": (lambda folder: (folders.foreign(folder) / CONFIG).write_text("{"), "line 1 column 2"),
    "a huge rank": (with_fields(r=3_000_000), "whole number from 1"),
    "another kind": (with_fields(peft_type="IA3"), "IA3"),
    "NaN": (with_tensors(**{A0: NAN}), "NaN or infinity"),
    "one key missing": (with_tensors(**{B0: None}), "lora_B is missing"),
    "one pair missing": (with_tensors(**{A0: None, B0: None}), "1 of 2 covered"),
    "an extra key": (with_tensors(stray=torch.ones(1)), "stray is not expected"),
    "an extra pair": (
        with_tensors(**{k.replace("q_", "k_"): t[:16] if "B" in k else t for k, t in folders.tensors().items()}),
        "k_proj",
    ),
    "wrong dimensions": (lambda folder: folders.foreign(folder, folders.tensors(size=16)), "32 inputs and 32 outputs"),
    "another model's names": (lambda folder: folders.foreign(folder, renamed("model.layers", "h")), "0 of 2 covered"),
    "targets that match nothing": (with_fields(target_modules=["query"]), "q_proj"),
    "other layers": (with_fields(layers_to_transform=[0]), PATHS[1]),
    "an embedding's pair": (
        lambda folder: folders.foreign(folder, renamed("lora_A.weight", "lora_embedding_A")),
        "is missing",
    ),
    "a head of another size": (
        lambda folder: folders.foreign(
            folder, folders.tensors() | {PREFIX + "lm_head.weight": torch.ones(5, 32)}, modules_to_save=["lm_head"]
        ),
        "lm_head.weight is (5, 32), but the model has (96, 32)",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_failed_load_leaves_bank_and_model_as_they_were(tmp_path: Path, name: str) -> None:
    model, inputs = tiny.llama(), tiny.batch()
    bank = lk.attach(model, folders.config(init_lora_weights=False), name="mine")
    bank.load("other", folders.adapter(seed=5))
    before, logits = state(model), tiny.logits(model, inputs)
    fault, told = FAULTS[name]
    fault(tmp_path / "broken")
    with pytest.raises(LoraKitError) as caught:
        bank.load("broken", tmp_path / "broken")
    assert caught.value.exit_code == 2
    assert told in str(caught.value)
    assert bank.names == ("mine", "other")
    assert bank.active == "mine"
    assert is_same(state(model), before)
    assert torch.equal(tiny.logits(model, inputs), logits)
    bank.load("broken", folders.adapter(seed=6))
    bank.detach()
    assert not state(model)["trainable"] or len(state(model)["trainable"]) == len(list(model.named_parameters()))


def test_a_load_that_runs_out_of_memory_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny.llama(), tiny.batch()
    bank = lk.attach(model, slots=3, max_rank=4)
    bank.load("other", folders.adapter(seed=5))
    bank.use("other")
    before, logits = state(model), tiny.logits(model, inputs)
    put, calls = LoraLinear.put, iter([None, MemoryError("no room")])

    def failing(*given: Any) -> None:
        error = next(calls)
        if error is not None:
            raise error
        put(*given)

    with monkeypatch.context() as patch:
        patch.setattr(LoraLinear, "put", failing)
        with pytest.raises(MemoryError):
            bank.load("next", folders.adapter(seed=6))
    assert bank.names == ("other",)
    assert bank.active == "other"
    assert is_same(state(model), before)
    assert torch.equal(tiny.logits(model, inputs), logits)
    bank.load("next", folders.adapter(seed=6))


def test_a_failed_save_leaves_the_bank_as_it_was(tmp_path: Path) -> None:
    bank = lk.attach(tiny.llama(), folders.config(init_lora_weights=False), name="mine")
    before = bank.snapshot("mine")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    for replace in (False, True):
        with pytest.raises(StorageError):
            bank.save("mine", tmp_path / "taken", replace=replace)
    assert bank.snapshot("mine") == before
    assert bank.active == "mine"


# One base and another


def made_for(model: nn.Module) -> lk.Adapter:
    return lk.Adapter(folders.config(), folders.tensors(), record={"base": fingerprint(model, name="the first")})


def list_mismatches(expected: dict[str, object], model: nn.Module, **options: Any) -> list[str]:
    return list_base_mismatches(expected, list(named_layers(model)), **options)


def test_another_base_of_the_same_shapes_is_refused_unless_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = made_for(tiny.llama(seed=0)).save(tmp_path / "x")
    bank = lk.attach(tiny.llama(seed=1), slots=2)
    with pytest.raises(BaseMismatchError, match=r"made for the first.*sampled weights differ") as caught:
        bank.load("x", folder)
    assert "other-base" in caught.value.hint
    assert bank.names == ()
    bank.load("x", folder, allow={"other-base"})
    assert "another base than it was made for" in caplog.text
    lk.attach(tiny.llama(seed=0), slots=1).load("x", folder)


@pytest.mark.parametrize("first", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("then", [torch.float32, torch.float16, torch.bfloat16])
def test_one_base_is_the_same_base_in_every_dtype(first: torch.dtype, then: torch.dtype) -> None:
    stored = tiny.llama()
    with torch.no_grad():
        for number, parameter in enumerate(stored.parameters()):
            parameter.copy_(torch.randn_like(parameter) * 10.0 ** -(number % 9))
    assert list_mismatches(fingerprint(stored.to(first)), tiny_like(stored, then)) == []
    other = tiny_like(stored, then)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 0.1
    assert "model.layers.1.mlp.up_proj.weight among them" in list_mismatches(fingerprint(stored), other)[0]


def tiny_like(model: nn.Module, dtype: torch.dtype) -> Any:
    made = tiny.llama(seed=3).to(dtype)
    made.load_state_dict(model.state_dict())
    return made


def test_another_structure_is_another_base() -> None:
    told = list_mismatches(fingerprint(tiny.gpt2()), tiny.llama())
    assert told[0] == "its layers have other names or shapes"
    larger = tiny.bert(labels=5)
    assert list_mismatches(fingerprint(tiny.bert()), larger)[0] == "its layers have other names or shapes"


def test_a_fingerprint_does_not_see_the_bank_and_survives_its_file(tmp_path: Path) -> None:
    model = tiny.llama()
    before = fingerprint(model, name="x")
    bank = lk.attach(model, folders.config(init_lora_weights=False, modules_to_save=["lm_head"]))
    assert fingerprint(model, name="x") == before
    folder = lk.Adapter(folders.config(), folders.tensors(), record={"base": before}).save(tmp_path / "x")
    assert lk.Adapter.load(folder).base == before
    bank.detach()
    assert fingerprint(model, name="x") == before


def test_a_head_the_adapter_brings_does_not_count(tmp_path: Path) -> None:
    model = tiny.llama()
    before = fingerprint(model)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert list_mismatches(before, model)
    assert not list_mismatches(before, model, ignore=("lm_head",))


@pytest.mark.parametrize(
    "weights",
    [
        {"lm_head.weight": 5},
        {"lm_head.weight": None},
        {"lm_head.weight": ""},
        {"lm_head.weight": "float16:zz"},
        {"lm_head.weight": "float16:" + "0" * 128},
        {"lm_head.weight": ["x"]},
        {"lm_head.weight": "0123456789abcdef"},
        [1, 2],
        "text",
        5,
    ],
)
def test_a_fingerprint_that_is_none_is_a_difference_and_no_crash(tmp_path: Path, weights: Any) -> None:
    folder = made_for(tiny.llama()).save(tmp_path / "x")
    record = json.loads((folder / RECORD).read_text())
    record["base"]["weights"] = weights
    (folder / RECORD).write_bytes(seal_record(record))
    bank = lk.attach(tiny.llama(), slots=1)
    with pytest.raises(LoraKitError) as caught:
        bank.load("x", folder)
    assert caught.value.exit_code == 2
    assert bank.names == ()


def test_a_load_that_would_not_fit_is_refused_before_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama()
    bank = lk.attach(model, slots=3, max_rank=4)
    before = state(model)
    with monkeypatch.context() as patch:
        patch.setattr("lora_kit.torch_utils.available_memory", lambda: 1_000)
        with pytest.raises(
            OutOfMemoryError, match=r"4 slots in 2 layers needs 8,192 bytes of memory on cpu; 1,000 are"
        ):
            bank.load("next", folders.adapter())
        with pytest.raises(OutOfMemoryError, match="slots"):
            lk.attach(tiny.llama(), folders.config(), name="mine")
    assert is_same(state(model), before)
    assert bank.names == ()
    bank.load("next", folders.adapter())


def test_slots_that_no_layer_could_have_are_refused_by_attach(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.llama()
    before = state(model)
    with pytest.raises(OutOfMemoryError, match=r"1,000,000,000,001 slots in one layer needs [\d,]+ bytes"):
        lk.attach(model, slots=10**12, max_rank=64)
    assert is_same(state(model), before)
    with caplog.at_level("DEBUG"):
        lk.attach(model, slots=3, max_rank=4, dtype=torch.float32).detach()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    most = 4 * 4 * 4 * sum(layer.in_features + layer.out_features for layer in layers)
    assert f"4 slots take at most {most:,} bytes in {len(layers)} layers" in caplog.text


@pytest.mark.parametrize(
    "error",
    [MemoryError("no room"), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")],
)
def test_memory_that_runs_out_anywhere_is_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*given: Any, **named: Any) -> None:
        raise error

    folder = folders.adapter().save(tmp_path / "x")
    base = tmp_path / "base"
    base_folder(base, tiny.llama())
    for where, run in (
        ("lora_kit.adapter.adapter.classify_tensors", lambda: lk.Adapter.load(folder)),
        ("transformers.AutoModelForCausalLM.from_pretrained", lambda: lk.load_base(base)),
        ("lora_kit.merging.merge.writer.write_shards", lambda: lk.merge(base, folder, tmp_path / "merged")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, fail)
            with pytest.raises(OutOfMemoryError) as caught:
                run()
        assert caught.value.exit_code == 3
    assert sorted(os.listdir(tmp_path)) == ["base", "x"]
