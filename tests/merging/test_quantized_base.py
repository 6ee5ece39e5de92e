"""Merging into a quantized base: what is chosen is what is written, and what is lost is said."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

import lora_kit as lk
from lora_kit.cli.main import main
from lora_kit.errors import BaseMismatchError, BaseModelError, ConfigError, MergeError
from lora_kit.merging.checkpoint import bnb_decode
from lora_kit.merging.checkpoint.bnb_weights import FourBitWeight, QuantizedWeight, find_quantized_weights
from lora_kit.merging.checkpoint.shards import INDEX, WEIGHTS
from lora_kit.merging.merge import merge
from lora_kit.merging.planned_tensors import MergePlan, PlannedTensor
from lora_kit.merging.verification import logits
from lora_kit.merging.writing import fold_blocks
from lora_kit.models.loading import load_base
from lora_kit.models.silence import silence_libraries
from tests.support import merging, texts, tiny
from tests.support.long_runs import take_few
from tests.support.merging import ALL, changed, edited, refused, stored
from tests.support.quantized import llama

KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nested nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def quantized(original: Path, folder: Path, kind: str, *, shard: str = "5GB") -> Path:
    """A base as transformers saves it after quantizing another one."""
    config = transformers.BitsAndBytesConfig(**KINDS[kind])
    with silence_libraries():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            original, quantization_config=config, dtype="auto", device_map={"": "cpu"}
        )
        model.save_pretrained(folder, max_shard_size=shard)
    texts.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return merging.base_folder(tmp_path / "original", llama())


@pytest.fixture(params=take_few(KINDS, *(kind for kind in KINDS if kind != "nf4")))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base(original: Path, tmp_path: Path, kind: str) -> Path:
    return quantized(original, tmp_path / "base", kind)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return merging.adapter_folder(base, tmp_path / "sql", target_modules=ALL)


def dequantized(folder: Path) -> dict[str, Tensor]:
    """The weights as bitsandbytes computes with them: what its layers make of the unit vectors, and in 8 bits as is."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    model = load_base(folder).model
    found = dict(model.state_dict())
    for path, module in model.named_modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
            found[f"{path}.weight"] = module(torch.eye(module.in_features)).T
        elif type(module).__name__ == "Linear8bitLt":
            found[f"{path}.weight"] = dequantize_bnb_weight(module.weight, module.state)
    return {name: tensor for name, tensor in found.items() if name.endswith((".weight", ".bias"))}


def with_delta(weights: dict[str, Tensor], adapter: Path) -> dict[str, Tensor]:
    value = lk.Adapter.load(adapter)
    found = {name: tensor.float() for name, tensor in weights.items()}
    for path, pair in value.pairs().items():
        found[f"{path}.weight"] = found[f"{path}.weight"] + value.config.scaling_of(path) * (pair.b @ pair.a)
    return found


def files(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_nothing_is_chosen_for_anybody(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="quantized") as caught:
        merge(base, adapter, tmp_path / "merged")
    assert all(choice in caught.value.hint for choice in ("original", "dequantized", "requantized", "beside"))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("elements", [2**17, 1], ids=["one block", "many blocks"])
def test_dequantized_weights_are_those_of_transformers_plus_the_adapter(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    monkeypatch.setattr(fold_blocks, "_BLOCK_ELEMENTS", elements)
    report = merge(base, adapter, tmp_path / "merged", quantized="dequantized")
    assert "quantization_config" not in files(tmp_path / "merged")
    wanted = {name: tensor.bfloat16() for name, tensor in with_delta(dequantized(base), adapter).items()}
    found = stored(tmp_path / "merged")
    assert found.keys() == wanted.keys()
    assert not [name for name, tensor in found.items() if not torch.equal(tensor, wanted[name])]
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {type(module) for module in merged.modules() if isinstance(module, nn.Linear)} == {nn.Linear}
    assert report.quantized == "dequantized"
    assert report.dtype == "bfloat16"
    assert 0.5 < report.retention < 1
    assert "dequantized weights" in (tmp_path / "merged" / "README.md").read_text()


def test_weights_no_adapter_changes_are_dequantized_too(base: Path, tmp_path: Path) -> None:
    adapter = merging.adapter_folder(base, tmp_path / "sql", target_modules=["q_proj"])
    report = merge(base, adapter, tmp_path / "merged", quantized="dequantized")
    wanted, found = dequantized(base), stored(tmp_path / "merged")
    assert torch.equal(
        found["model.layers.1.mlp.up_proj.weight"], wanted["model.layers.1.mlp.up_proj.weight"].bfloat16()
    )
    assert report.counts["dequantized"] == 12
    assert report.counts["folded"] == 2


@pytest.mark.parametrize("kind", ["nf4", "nested nf4", "fp4"], indirect=True)
def test_the_merged_model_answers_as_base_and_adapter_do(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(base, adapter, tmp_path / "merged", quantized="dequantized", dtype="float32")
    model = load_base(base).model
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
    bank = lk.attach(model, dtype=torch.float32)
    bank.load("sql", adapter)
    without = logits.compute_probe_logits(model)
    bank.use("sql")
    wanted, found = (
        logits.compute_probe_logits(model),
        logits.compute_probe_logits(load_base(tmp_path / "merged").model),
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert float((without - wanted).abs().max()) > 1e-2


def test_requantized_weights_are_what_transformers_makes_of_the_merged_ones(
    base: Path, adapter: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(base, adapter, tmp_path / "plain", quantized="dequantized")
    wanted = stored(quantized(tmp_path / "plain", tmp_path / "wanted", kind))
    for elements in (2**17, 1):
        monkeypatch.setattr(fold_blocks, "_BLOCK_ELEMENTS", elements)
        out = tmp_path / f"merged {elements}"
        report = merge(base, adapter, out, quantized="requantized", allow=["lost-delta"])
        found = stored(out)
        assert found.keys() == wanted.keys()
        texts_of = [name for name in found if "quant_state" in name]
        assert [json.loads(bytes(found[name])) for name in texts_of] == [
            json.loads(bytes(wanted[name])) for name in texts_of
        ]
        rest = found.keys() - set(texts_of)
        assert not [name for name in rest if not torch.equal(found[name], wanted[name])]
        assert files(out)["quantization_config"] == files(base)["quantization_config"]
        assert report.dtype == {"nested nf4": "nf4"}.get(kind, kind)
        assert report.counts["requantized"] == len(report.tensors) == 14
        loaded, target = dequantized(out), with_delta(dequantized(base), adapter)
        own = dequantized(base)
        name = "model.layers.0.mlp.down_proj.weight"
        delta = target[name] - own[name].float()
        lost = float((loaded[name].float() - target[name]).norm() / delta.norm())
        told = next(one for one in report.tensors if one.path == name.removesuffix(".weight"))
        assert told.retained == pytest.approx(max(0.0, 1 - lost), abs=1e-3)


def test_a_requantized_delta_that_is_lost_is_refused(base: Path, tmp_path: Path) -> None:
    small = merging.adapter_folder(base, tmp_path / "small", target_modules=ALL, lora_alpha=0.02)
    found = refused(base, small, tmp_path / "merged", quantized="requantized")
    assert "deltas survives rounding to" in found
    assert "dequantized weights" in found


@pytest.mark.parametrize("kind", ["nested nf4", "int8"], indirect=True)
def test_what_no_adapter_changes_keeps_its_bytes_when_it_is_requantized(base: Path, tmp_path: Path) -> None:
    adapter = merging.adapter_folder(base, tmp_path / "sql", target_modules=["up_proj"])
    merge(base, adapter, tmp_path / "merged", quantized="requantized", allow=["lost-delta"])
    own, found = stored(base), stored(tmp_path / "merged")
    assert own.keys() == found.keys()
    other = [name for name in own if own[name].shape != found[name].shape or not torch.equal(own[name], found[name])]
    assert other
    assert all(".up_proj." in name for name in other)


@pytest.mark.parametrize("kind", ["nested nf4"], indirect=True)
def test_a_dora_on_a_quantized_base_is_merged_into_the_dequantized_weights(
    original: Path, base: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    merge(base, merging.adapter_folder(base, tmp_path / "zero", r=1), plain, quantized="dequantized")
    adapter = merging.adapter_folder(plain, tmp_path / "dora", use_dora=True, target_modules=ALL)
    value = lk.Adapter.load(adapter)
    free = lk.Adapter(value.config, value.tensors)  # which does not say what base it was made for
    report = merge(base, free, tmp_path / "merged", quantized="dequantized", dtype="float32")
    weights = dequantized(base)
    for path, pair in value.pairs().items():
        target = weights[f"{path}.weight"].float() + value.config.scaling_of(path) * (pair.b @ pair.a)
        assert pair.magnitude is not None
        target = target * (pair.magnitude / target.norm(dim=1)).unsqueeze(1)
        torch.testing.assert_close(stored(tmp_path / "merged")[f"{path}.weight"], target, rtol=1e-2, atol=1e-4)
    assert report.retention > 0.99
    merge(base, free, tmp_path / "again", quantized="requantized", allow=["lost-delta"])


def test_the_original_is_merged_into(original: Path, base: Path, adapter: Path, tmp_path: Path) -> None:
    report = merge(base, adapter, tmp_path / "merged", quantized="original", original=original)
    merge(original, adapter, tmp_path / "wanted")
    found, wanted = stored(tmp_path / "merged"), stored(tmp_path / "wanted")
    assert found.keys() == wanted.keys()
    assert not [name for name in found if not torch.equal(found[name], wanted[name])]
    assert "quantization_config" not in files(tmp_path / "merged")
    assert report.quantized == "original"
    assert report.base == str(original)


@pytest.mark.parametrize("what", ["another model", "tuned a little", "another norm", "quantized too"])
def test_another_original_is_refused(original: Path, base: Path, adapter: Path, tmp_path: Path, what: str) -> None:
    tensors = stored(original)
    if what == "another model":
        merging.base_folder(original, llama(seed=3))
    elif what == "tuned a little":
        tensors["model.layers.1.mlp.up_proj.weight"] *= 1 + 0.02 * torch.randn(128, 64)
        safetensors.torch.save_file(tensors, original / WEIGHTS, metadata={"format": "pt"})
    elif what == "another norm":
        tensors["model.norm.weight"] += 0.5
        safetensors.torch.save_file(tensors, original / WEIGHTS, metadata={"format": "pt"})
    else:
        original = base
    error = BaseModelError if what == "quantized too" else BaseMismatchError
    with pytest.raises(error, match="quantized"):
        merge(base, adapter, tmp_path / "merged", quantized="original", original=original)
    assert not (tmp_path / "merged").exists()


def test_an_original_in_another_dtype_is_the_original(
    original: Path, base: Path, adapter: Path, tmp_path: Path
) -> None:
    lifted = merging.base_folder(tmp_path / "lifted", llama().float())
    report = merge(base, adapter, tmp_path / "merged", quantized="original", original=lifted)
    assert report.dtype == "float32"
    assert report.retention > 0.999


@pytest.mark.parametrize("kind", ["nested nf4"], indirect=True)
@pytest.mark.parametrize("choice", ["dequantized", "requantized"])
def test_parts_of_a_weight_may_lie_in_several_files(original: Path, adapter: Path, tmp_path: Path, choice: str) -> None:
    base = quantized(original, tmp_path / "sharded", "nested nf4", shard="3KB")
    places = json.loads((base / INDEX).read_text())["weight_map"]
    name = "model.layers.0.mlp.down_proj.weight"
    assert len({places[part] for part in places if part.startswith(name)}) > 1
    merge(base, adapter, tmp_path / "merged", quantized=choice, allow=["lost-delta"])
    merge(tmp_path / "base", adapter, tmp_path / "wanted", quantized=choice, allow=["lost-delta"])
    found, wanted = stored(tmp_path / "merged"), stored(tmp_path / "wanted")
    assert found.keys() == wanted.keys() == json.loads((tmp_path / "merged" / INDEX).read_text())["weight_map"].keys()
    assert not [name for name in found if not torch.equal(found[name], wanted[name])]


@pytest.mark.parametrize("kind", ["nf4", "int8"], indirect=True)
def test_a_conv1d_which_is_quantized_transposed_is_merged_or_refused_by_name(tmp_path: Path, kind: str) -> None:
    model = tiny.gpt2(dtype=torch.bfloat16)
    model.config.update({"n_embd": 64})
    original = merging.base_folder(tmp_path / "gpt2", transformers.GPT2LMHeadModel(model.config).bfloat16())
    base = quantized(original, tmp_path / "base", kind)
    adapter = merging.adapter_folder(original, tmp_path / "sql", target_modules=["c_attn"])
    report = merge(base, adapter, tmp_path / "onto", quantized="original", original=original)
    assert report.dtype == "bfloat16"
    merge(base, adapter, tmp_path / "merged", quantized="requantized", allow=["lost-delta"])
    wanted = stored(quantized(tmp_path / "onto", tmp_path / "wanted", kind))
    found = stored(tmp_path / "merged")
    name = "transformer.h.0.attn.c_attn.weight"
    assert found[name].shape == wanted[name].shape
    assert not torch.equal(found[name], stored(base)[name])
    with pytest.raises(MergeError, match=f"{name} is a quantized Conv1D"):
        merge(base, adapter, tmp_path / "plain", quantized="dequantized")


def test_the_command_line_says_what_survives(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["merge", "--base", str(base), "--adapter", str(adapter), "--out", str(tmp_path / "merged")]
    assert main(arguments) == 2
    assert "dequantized" in capsys.readouterr().err
    assert main([*arguments, "--quantized", "requantized", "--allow", "lost-delta"]) == 0
    out = capsys.readouterr().out
    assert "requantized weights" in out
    assert "survived rounding to" in out


# What is wrong is caught


@pytest.mark.parametrize("choice", ["dequantized", "requantized"])
@pytest.mark.parametrize("what", ["doubled", "dropped", "gate and up swapped", "another weight", "zeroed"])
def test_a_fold_that_is_not_the_adapters_is_found(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, choice: str
) -> None:
    gate, up, down = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))

    def edit(plan: MergePlan) -> MergePlan:
        by_name = {entry.name: entry for entry in plan.entries}
        other = {gate: by_name[up], up: by_name[gate]}

        def one(entry: PlannedTensor) -> PlannedTensor | None:
            update = entry.updates[0] if entry.updates else None
            if what == "doubled" and entry.name == up and update:
                return dataclasses.replace(entry, updates=(dataclasses.replace(update, scaling=update.scaling * 2),))
            if what == "dropped" and entry.name == down and update:
                return dataclasses.replace(entry, updates=(dataclasses.replace(update, scaling=0.0),))
            if what == "gate and up swapped" and entry.name in other:
                return dataclasses.replace(entry, updates=other[entry.name].updates)
            if what == "another weight" and isinstance(entry.source, QuantizedWeight) and entry.name == up:
                theirs = by_name[gate].source
                assert isinstance(theirs, QuantizedWeight)
                parts = {name: theirs.parts[name.replace("up_proj", "gate_proj")] for name in entry.source.parts}
                return dataclasses.replace(entry, source=dataclasses.replace(entry.source, parts=parts))
            if what == "zeroed" and entry.name == "model.norm.weight":
                return dataclasses.replace(entry, source=torch.zeros(64, dtype=torch.bfloat16))
            return entry

        return changed(plan, one)

    edited(monkeypatch, edit)
    found = refused(base, adapter, tmp_path / "merged", quantized=choice, allow=["lost-delta"])
    assert found.startswith("VerificationError")


@pytest.mark.parametrize("what", ["codes", "scales", "state"])
def test_one_part_written_wrong_is_found(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, what: str
) -> None:
    if kind == "int8" and what == "state":
        pytest.skip("8 bits have none")
    real = fold_blocks.TensorFold.requantize

    def mutated(fold: fold_blocks.TensorFold) -> Any:
        again = real(fold)
        if "1.mlp.up_proj" not in again.name:
            return again
        part = {"codes": again.name, "scales": next(n for n in again.parts if n.endswith(("absmax", "SCB")))}.get(what)
        value = dict(again.parts)
        if part is None:
            state = next(name for name in value if "quant_state" in name)
            text = bytes(value[state]).replace(b'"blocksize": 64', b'"blocksize": 32')
            value[state] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        elif what == "codes":
            value[part] = value[part].roll(1)
        else:
            value[part] = value[part].roll(1, 0) if value[part].unique().numel() > 1 else value[part] * 0
        return dataclasses.replace(again, parts=value)

    monkeypatch.setattr(fold_blocks.TensorFold, "requantize", mutated)
    found = refused(base, adapter, tmp_path / "merged", quantized="requantized", allow=["lost-delta"])
    assert found.startswith("VerificationError")


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"quantized": "hope"}, "hope"),
        ({"quantized": "original"}, "no original"),
        ({"original": "x"}, "an original"),
        ({"quantized": "requantized", "dtype": "float32"}, "dtype"),
        ({"quantized": "dequantized", "verify": "logits"}, "logits"),
    ],
)
def test_choices_that_contradict_each_other_are_refused(tmp_path: Path, how: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        merge(tmp_path / "base", tmp_path / "sql", tmp_path / "merged", **how)


def test_a_choice_for_a_base_that_is_not_quantized_is_refused(original: Path, tmp_path: Path) -> None:
    adapter = merging.adapter_folder(original, tmp_path / "sql")
    with pytest.raises(ConfigError, match="not quantized"):
        merge(original, adapter, tmp_path / "merged", quantized="dequantized")


@pytest.mark.parametrize("what", ["another method", "nothing quantized"])
def test_a_base_that_says_it_is_quantized_otherwise_is_refused(original: Path, tmp_path: Path, what: str) -> None:
    adapter = merging.adapter_folder(original, tmp_path / "sql")
    method = "gptq" if what == "another method" else "bitsandbytes"
    config = {**files(original), "quantization_config": {"quant_method": method, "load_in_4bit": True}}
    (original / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        (MergeError, BaseModelError), match="gptq" if what == "another method" else "no quantized weight"
    ):
        merge(original, adapter, tmp_path / "merged", quantized="dequantized")


@pytest.mark.parametrize("kind", ["nested nf4", "int8"], indirect=True)
@pytest.mark.parametrize("what", ["cut", "gone", "not JSON"])
def test_a_quantized_weight_that_is_damaged_is_refused_by_name(
    base: Path, adapter: Path, tmp_path: Path, kind: str, what: str
) -> None:
    path = "model.layers.0.mlp.up_proj"
    tensors = stored(base)
    scale = f"{path}.SCB" if kind == "int8" else f"{path}.weight.absmax"
    if what == "cut":
        tensors[scale] = tensors[scale][:-1].clone()
    elif what == "gone":
        del tensors[scale]
    elif kind == "int8":
        tensors[f"{path}.weight_format"] = torch.tensor(1, dtype=torch.uint8)
    else:
        state = f"{path}.weight.quant_state.bitsandbytes__nf4"
        tensors[state] = torch.frombuffer(bytearray(b"{"), dtype=torch.uint8)
    safetensors.torch.save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=path):
        merge(base, adapter, tmp_path / "merged", quantized="dequantized")


@pytest.mark.parametrize("shape", take_few([(5, 7), (3, 130), (40, 40), (1, 64), (300, 128)], (3, 130), (1, 64)))
def test_rows_of_any_width_are_read_as_the_whole_weight_is(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fold_blocks, "_BLOCK_ELEMENTS", 1)
    from bitsandbytes.functional import dequantize_blockwise, quantize_4bit

    weight = torch.randn(shape)
    codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    parts = {"w": codes, **{f"w.{key}": part for key, part in state.as_dict(packed=True).items()}}
    packed = find_quantized_weights(parts, torch.float32)["w"]
    assert isinstance(packed, FourBitWeight)
    flat = torch.arange(weight.numel())
    two = codes.reshape(-1)[flat // 2]
    levels = state.code[torch.where(flat % 2 == 0, two >> 4, two & 15).long()]
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
    whole = (levels * scales[flat // 64]).view(shape)
    assert torch.equal(
        torch.cat([packed[part] for part in fold_blocks.split_rows(*shape, multiple=packed.step)]), whole
    )
    assert torch.equal(bnb_decode.dequantize_rows(packed, torch.arange(shape[0])), whole)
    again = packed.pack(weight[part] for part in fold_blocks.split_rows(*shape, multiple=packed.step))
    assert torch.equal(again[slice(0, shape[0])], whole)
