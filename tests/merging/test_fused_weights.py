"""Adapters on fused experts, as PEFT writes them, merged into whatever layout the base's files have."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Final

import peft
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

import lora_kit as lk
from lora_kit.errors import BaseModelError, MergeError
from lora_kit.merging.checkpoint.shards import WEIGHTS
from lora_kit.merging.merge import merge
from lora_kit.merging.planned_tensors import MergePlan, PlannedTensor
from lora_kit.merging.verification import logits
from lora_kit.merging.writing import fold_blocks
from lora_kit.models.silence import silence_libraries
from tests.support import merging
from tests.support.merge_families import tiny as family_of
from tests.support.merging import changed, edited, refused, stored

FUSED: Final[dict[str, dict[str, Any]]] = {
    "gpt_oss": {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 16},
    "granitemoe": {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 16},
}
APART: Final = ("mixtral", "qwen2_moe")


def model_of(family: str, dtype: torch.dtype = torch.float32) -> Any:
    if family in APART:
        return family_of(family, dtype)
    small = {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with silence_libraries():
        config = transformers.AutoConfig.for_model(family, **{**small, **FUSED[family]})
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some families leave their experts as they were found in memory
            if not parameter.isfinite().all() or parameter.abs().max() > 10:
                parameter.normal_(std=0.02)
    return model


def experts_of(model: nn.Module) -> list[str]:
    names = [name for name, p in model.named_parameters() if p.ndim == 3 and ".experts." in name]
    return sorted({".".join(name.rsplit(".", 2)[-2:]) for name in names})


def by_peft(model: Any, folder: Path, **fields: Any) -> Any:
    """A random adapter of PEFT's, saved; and its model, which uses it."""
    given = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **fields}
    tuned = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **given))
    with torch.no_grad():
        torch.manual_seed(1)
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    tuned.save_pretrained(folder)
    return tuned.eval()


@pytest.mark.parametrize("elements", [2**18, 1], ids=["one block", "many blocks"])
@pytest.mark.parametrize("which", ["all", "one", "with the router"])
@pytest.mark.parametrize("family", [*APART, *FUSED])
def test_the_merged_model_answers_as_peft_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, which: str, elements: int
) -> None:
    monkeypatch.setattr(fold_blocks, "_BLOCK_ELEMENTS", elements)
    model = model_of(family)
    base = merging.base_folder(tmp_path / "base", model)
    names = experts_of(model)
    assert len(names) == 2
    if which == "with the router":
        router = next(name for name, _ in model.named_parameters() if name.endswith((".gate.weight", "router.weight")))
        names = [*names, ".".join(router.rsplit(".", 2)[-2:])]
    chosen = names[:1] if which == "one" else names
    without = logits.compute_probe_logits(model)
    wanted = logits.compute_probe_logits(by_peft(model, tmp_path / "sql", target_parameters=chosen))
    report = merge(base, tmp_path / "sql", tmp_path / "merged")
    with silence_libraries():
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    found = logits.compute_probe_logits(merged)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert float((wanted - without).abs().max()) > 1e-2
    assert stored(tmp_path / "merged").keys() == stored(base).keys()
    assert {name: t.shape for name, t in stored(tmp_path / "merged").items()} == {
        n: t.shape for n, t in stored(base).items()
    }
    assert report.retention > 0.99
    ends = (".gate.weight", "router.weight", "router.layer.weight")
    routers = [name for name in stored(base) if name.endswith(ends)]
    same = [torch.equal(stored(base)[name], stored(tmp_path / "merged")[name]) for name in routers]
    assert routers
    assert not any(same) if which == "with the router" else all(same)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_are_rounded_once_from_a_sum_in_fp32(tmp_path: Path, family: str) -> None:
    model = model_of(family, torch.bfloat16)
    base = merging.base_folder(tmp_path / "base", model)
    names = experts_of(model)
    by_peft(model_of(family), tmp_path / "sql", target_parameters=names)
    merge(base, tmp_path / "sql", tmp_path / "merged", verify="logits")
    with silence_libraries():
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    value, wanted = lk.Adapter.load(tmp_path / "sql"), model.state_dict()
    for path, pair in value.all_pairs().items():
        scaling = value.config.scaling_of(path)
        if pair.kind == "linear":
            wanted[f"{path}.weight"] = (wanted[f"{path}.weight"].float() + (pair.b @ pair.a) * scaling).bfloat16()
            continue
        deltas = torch.stack([(b @ a) * scaling for a, b in pair.split_by_expert(2)])
        # PEFT's wrapper of the parameter that comes last is the outer one.
        last = model.get_submodule(path.removesuffix(".base_layer"))._parameters
        own = [name for name in last if f"experts.{name}" in names][0 if path.endswith(".base_layer") else 1]
        key = f"{path.removesuffix('.base_layer')}.{own}"
        deltas = deltas.mT if family == "gpt_oss" else deltas
        wanted[key] = (wanted[key].float() + deltas).bfloat16()
    assert not [key for key, tensor in merged.state_dict().items() if not torch.equal(tensor, wanted[key])]


def test_several_adapters_on_the_same_experts_are_added(tmp_path: Path) -> None:
    base = merging.base_folder(tmp_path / "base", model_of("mixtral"))
    names = experts_of(model_of("mixtral"))
    by_peft(model_of("mixtral"), tmp_path / "sql", target_parameters=names)
    by_peft(model_of("mixtral"), tmp_path / "tone", target_parameters=names, r=3)
    merge(base, [(tmp_path / "sql", 0.5), (tmp_path / "tone", -1)], tmp_path / "merged")
    merge(base, [(tmp_path / "sql", 0.5)], tmp_path / "half")
    merge(tmp_path / "half", [(tmp_path / "tone", -1)], tmp_path / "both", allow=["other-base"])
    found, wanted = stored(tmp_path / "merged"), stored(tmp_path / "both")
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


# What is wrong is caught


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    return merging.base_folder(tmp_path / "base", model_of("mixtral"))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    by_peft(model_of("mixtral"), tmp_path / "sql", target_parameters=experts_of(model_of("mixtral")))
    return tmp_path / "sql"


ONE: Final = "model.layers.1.block_sparse_moe.experts.1.w1.weight"


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("doubled", f"{ONE.removesuffix('.weight')}: .*away from base"),
        ("not added", f"{ONE.removesuffix('.weight')}: .*away from base"),
        ("gate and up swapped", "away from base"),
        ("two experts swapped", "away from base"),
        ("dropped", "do not make up model.layers.1.mlp.experts.gate_up_proj"),
        ("mutated", "other numbers"),
    ],
)
def test_an_expert_that_is_not_what_it_should_be_is_found(
    mixtral: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, told: str
) -> None:
    import re

    other = {
        "gate and up swapped": ONE.replace("w1", "w3"),
        "two experts swapped": ONE.replace("experts.1", "experts.2"),
    }

    def edit(plan: MergePlan) -> MergePlan:
        by_name = {entry.name: entry for entry in plan.entries}

        def one(entry: PlannedTensor) -> PlannedTensor | None:
            if what == "mutated" and entry.name.endswith("1.block_sparse_moe.gate.weight"):
                return dataclasses.replace(entry, source=stored(mixtral)[entry.name] * 1.5)
            swapped = other.get(what)
            if swapped and entry.name in (ONE, swapped):
                return dataclasses.replace(entry, updates=by_name[swapped if entry.name == ONE else ONE].updates)
            if entry.name != ONE:
                return entry
            if what == "dropped":
                return None
            factor = {"doubled": 2.0, "not added": 0.0}.get(what, 1.0)
            scaled = tuple(dataclasses.replace(update, scaling=update.scaling * factor) for update in entry.updates)
            return dataclasses.replace(entry, updates=scaled)

        return changed(plan, one)

    edited(monkeypatch, edit)
    found = refused(mixtral, adapter, tmp_path / "merged", allow=["lost-delta"])
    assert found.startswith("VerificationError")
    assert re.search(told, found)


def test_an_expert_no_adapter_changes_cannot_be_dropped(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = merging.adapter_folder(mixtral, tmp_path / "plain", target_modules=["q_proj"])
    edited(monkeypatch, lambda plan: changed(plan, lambda entry: None if entry.name == ONE else entry))
    assert "do not make up" in refused(mixtral, plain, tmp_path / "merged")


@pytest.mark.parametrize("what", ["missing", "another shape"])
def test_a_base_with_an_expert_too_few_is_refused(mixtral: Path, adapter: Path, tmp_path: Path, what: str) -> None:
    tensors: dict[str, Tensor] = stored(mixtral)
    if what == "missing":
        del tensors[ONE]
    else:
        tensors[ONE] = tensors[ONE][:-1].clone()
    safetensors.torch.save_file(tensors, mixtral / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match="do not make up"):
        merge(mixtral, adapter, tmp_path / "merged")


def test_experts_in_a_form_that_is_not_known_are_refused(
    mixtral: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_kit.merging.checkpoint.fused_weights.FusedWeights.find_pieces", lambda *given: None)
    with pytest.raises(MergeError, match="another form"):
        merge(mixtral, adapter, tmp_path / "merged")
