"""A base whose weights accelerate keeps on the CPU or on disk gives what the resident base gives, or is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers

import lora_kit as lk
from lora_kit.errors import BankError, BaseMismatchError, MergeError, TargetError
from tests.support import tiny


def _load_by_map(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder / "base")
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk",
                  "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip
    return transformers.LlamaForCausalLM.from_pretrained(
        folder / "base", device_map=device_map, offload_folder=str(folder / "offloaded")
    )


OFFLOADS: dict[str, Callable[[Any, Path], Any]] = {
    "cpu_offload": lambda model, _: accelerate.cpu_offload(model, "cpu") or model,
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, str(folder), "cpu") or model,
    "device_map": _load_by_map,
}
every_offload = pytest.mark.parametrize("way", OFFLOADS)
TARGETS = ["q_proj", "down_proj", "embed_tokens"]


@every_offload
def test_outputs_and_training_are_those_of_the_resident_model(way: str, tmp_path: Path) -> None:
    resident, model = tiny.llama(), OFFLOADS[way](tiny.llama(), tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    config = lk.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
    expected, bank = (lk.attach(each, config, name="a") for each in (resident, model))
    bank.load_state_dict(expected.state_dict())
    for name in ("a", None):
        expected.use(name)
        bank.use(name)
        assert torch.equal(tiny.logits(model, tiny.batch()), tiny.logits(resident, tiny.batch()))
    with bank.rows(["a", None, "a"]), expected.rows(["a", None, "a"]):
        torch.testing.assert_close(tiny.logits(model, tiny.batch()), tiny.logits(resident, tiny.batch()))
    for each, own in ((resident, expected), (model, bank)):
        own.use("a")
        each(**tiny.batch()).logits.square().mean().backward()
    for leaf, other in zip(bank.parameters("a"), expected.parameters("a"), strict=True):
        torch.testing.assert_close(leaf.grad, other.grad)
    saved = bank.save("a", tmp_path / "a")
    assert all(torch.equal(saved.tensors[key], tensor) for key, tensor in expected.snapshot("a").tensors.items())
    bank.use(None)
    with pytest.raises(MergeError, match="is offloaded"):
        bank.merge("a")
    bank.detach()
    expected.detach()
    assert torch.equal(tiny.logits(model, tiny.batch()), tiny.logits(resident, tiny.batch()))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "layers.0.self_attn.q_proj"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "layers.0.self_attn.q_proj"),
        ({"target_modules": [], "modules_to_save": ["lm_head"]}, "lm_head"),
        ({"target_modules": [], "trainable_token_indices": [3]}, "embed_tokens"),
        ({"target_modules": [], "target_parameters": ["q_proj.weight"]}, "layers.0.self_attn.q_proj"),
    ],
)
def test_what_reads_weights_is_refused_by_the_layers_name(fields: dict[str, Any], name: str) -> None:
    model = tiny.llama()
    accelerate.cpu_offload(model, "cpu")
    plain = tiny.logits(model, tiny.batch())
    with pytest.raises(TargetError, match=f"offloaded, and the adapter needs their weights: .*{name}"):
        lk.attach(model, lk.LoraConfig(r=2, **fields))
    assert torch.equal(tiny.logits(model, tiny.batch()), plain)
    if "init_lora_weights" in fields:
        return  # it is saved as plain LoRA weights, which can be loaded
    bank = lk.attach(model)
    resident = lk.attach(tiny.llama(), lk.LoraConfig(r=2, **fields), name="a")
    with pytest.raises(TargetError, match=name):
        bank.load("a", resident.snapshot("a"))
    assert bank.names == ()


def test_a_model_on_meta_is_refused() -> None:
    with torch.device("meta"):
        model = tiny.llama()
    with pytest.raises(BankError, match=r"on meta: .*embed_tokens"):
        lk.attach(model, lk.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(BankError, match="on meta"):
        lk.attach(model)


def test_blocks_that_are_loaded_as_a_whole_are_refused() -> None:
    model = tiny.llama()
    accelerate.cpu_offload(model, "cpu", preload_module_classes=["LlamaDecoderLayer"])
    with pytest.raises(BankError, match=r"on meta: .*layers\.0\.self_attn\.q_proj"):
        lk.attach(model, lk.LoraConfig(r=2, target_modules=["q_proj"]))


def test_an_offloaded_peft_model_is_not_adopted() -> None:
    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    accelerate.cpu_offload(copy.deepcopy(model), "cpu")
    accelerate.cpu_offload(model, "cpu")
    with pytest.raises(BankError, match="offloaded"):
        lk.adopt(model)


@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload"])
def test_a_model_with_a_bank_is_not_offloaded_afterwards(way: str, tmp_path: Path) -> None:
    model = tiny.llama()
    bank = lk.attach(model, lk.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), name="a")
    expected = tiny.logits(model, tiny.batch())
    with pytest.raises(BankError, match="cannot move or offload"):
        OFFLOADS[way](model, tmp_path)
    assert torch.equal(tiny.logits(model, tiny.batch()), expected)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    bank.detach()
    OFFLOADS[way](model, tmp_path)


def test_hooks_of_an_offloaded_model_come_off_under_a_bank() -> None:
    model = tiny.llama()
    accelerate.cpu_offload(model, "cpu")
    lk.attach(model, lk.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), name="a")
    expected = tiny.logits(model, tiny.batch())
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(tiny.logits(model, tiny.batch()), expected)


@every_offload
def test_an_offloaded_base_has_the_fingerprint_of_the_resident_one(way: str, tmp_path: Path) -> None:
    resident, model = lk.attach(tiny.llama()), OFFLOADS[way](tiny.llama(), tmp_path)
    assert {**lk.attach(model).fingerprint(), "name": None} == resident.fingerprint()
    adapter = lk.attach(tiny.llama(seed=1), lk.LoraConfig(r=2, target_modules=["q_proj"]), name="a").snapshot("a")
    with pytest.raises(BaseMismatchError, match="sampled weights differ"):
        lk.attach(OFFLOADS["cpu_offload"](tiny.llama(), tmp_path)).load("a", adapter)
