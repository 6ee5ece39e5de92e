"""Quantized bases through bitsandbytes, on a CPU: trained, swapped, served by rows, resumed, evaluated; PEFT judges."""

from __future__ import annotations

import copy
import functools
import gc
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import lora_kit as lk
from lora_kit.cli.main import main
from lora_kit.errors import BankError, BaseModelError, ConfigError, MergeError, TargetError
from lora_kit.generation.generate import generate
from lora_kit.models.loading import load_base
from tests.support import texts, tiny
from tests.support.merging import adapter_folder, base_folder
from tests.support.quantized import FIELDS, adam, llama, shaken, trained
from tests.support.training import PAIRS

KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "nf4 twice": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.float32},
    "int8": {"load_in_8bit": True},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, 64 wide so that its weights fill whole blocks."""
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("bases") / "llama"
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@functools.cache
def read(folder: Path, kind: str) -> Any:
    settings = transformers.BitsAndBytesConfig(**KINDS[kind])
    return transformers.LlamaForCausalLM.from_pretrained(
        folder, quantization_config=settings, device_map={"": "cpu"}, dtype=torch.float32
    )


def quantized(folder: Path, kind: str) -> Any:
    """A base of its own, as transformers loads it."""
    return copy.deepcopy(read(folder, kind)).eval()


def packed(model: nn.Module) -> dict[str, Tensor]:
    """The quantized weights, by name in the base."""
    tensors = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    found = {name: p.detach().clone() for name, p in tensors.items() if not p.is_floating_point()}
    assert len(found) == 7
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@every_kind
def test_training_follows_peft_on_the_same_quantized_base(kind: str, folder: Path, tmp_path: Path) -> None:
    model = quantized(folder, kind)
    before = packed(model)
    bank = lk.attach(model, lk.LoraConfig(**FIELDS), name="a")
    bank.save("a", tmp_path / "a")
    ours = trained(model, adam(bank.parameters("a")), range(5))
    assert ours[4] < ours[0]
    assert same(packed(model), before)
    theirs = peft.PeftModel.from_pretrained(quantized(folder, kind), tmp_path / "a", is_trainable=True)
    judged = trained(theirs, adam([p for p in theirs.parameters() if p.requires_grad]), range(5))
    torch.testing.assert_close(ours, judged, rtol=1e-3, atol=0)


@every_kind
def test_adapters_swap_and_serve_rows(kind: str, folder: Path) -> None:
    model = quantized(folder, kind)
    bank = lk.attach(model, dtype=torch.float32)
    base = tiny.logits(model, tiny.batch())
    alone = {None: base}
    for name in ("a", "bb"):
        bank.add(name, lk.LoraConfig(**{**FIELDS, "r": 2 * len(name)}))
        shaken(bank, name)
        bank.use(name)
        alone[name] = tiny.logits(model, tiny.batch())
    assert not torch.allclose(alone["a"], base)
    bank.use("a")
    assert torch.equal(tiny.logits(model, tiny.batch()), alone["a"])
    bank.use(None)
    assert torch.equal(tiny.logits(model, tiny.batch()), base)
    names = ["bb", None, "a"]
    with bank.rows(names):
        mixed = tiny.logits(model, tiny.batch())
    # Where activations are rounded to int8, the last bit of a float may tip one of them.
    close = 5e-3 if kind == "int8" else 1e-5
    torch.testing.assert_close(mixed, torch.stack([alone[n][row] for row, n in enumerate(names)]), rtol=0, atol=close)
    assert (alone["a"] - base).abs().max() > 20 * close


@every_kind
def test_a_stopped_training_goes_on_bit_for_bit(kind: str, folder: Path, tmp_path: Path) -> None:
    model = quantized(folder, kind)
    bank = lk.attach(model, lk.LoraConfig(**FIELDS), name="a")
    optimizer = adam(bank.parameters("a"))
    trained(model, optimizer, range(2))
    bank.save("a", tmp_path / "a")
    state = optimizer.state_dict()
    torch.save(state, tmp_path / "optimizer.pt")
    expected = trained(model, optimizer, range(2, 4))
    model = quantized(folder, kind)
    bank = lk.attach(model, lk.LoraConfig(**FIELDS), name="a")
    bank.restore("a", lk.Adapter.load(tmp_path / "a"))
    optimizer = adam(bank.parameters("a"))
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert torch.equal(trained(model, optimizer, range(2, 4)), expected)


@every_kind
def test_evaluating_in_between_changes_nothing(kind: str, folder: Path) -> None:
    losses = []
    for evaluates in (False, True):
        torch.manual_seed(0)
        model = quantized(folder, kind)
        bank = lk.attach(model, lk.LoraConfig(**FIELDS), name="a")
        optimizer = adam(bank.parameters("a"))
        first = trained(model, optimizer, range(1))
        if evaluates:
            with torch.inference_mode():
                model(**tiny.batch())
            tiny.logits(model, tiny.batch())
        losses.append(torch.cat([first, trained(model, optimizer, range(1, 3))]))
    assert torch.equal(*losses)


def test_a_base_that_was_packed_for_inference_is_not_trained_on(folder: Path) -> None:
    model = quantized(folder, "nf4")
    packs = [m for m in model.modules() if getattr(m, "support_avx512bf16_for_cpu", False)]
    lk.attach(model).detach()
    assert packs == [m for m in model.modules() if getattr(m, "support_avx512bf16_for_cpu", False)]
    if not packs:
        pytest.skip("bitsandbytes packs nothing on this CPU")
    tiny.logits(model, tiny.batch())
    with pytest.raises(BankError, match="packed"):
        lk.attach(model, lk.LoraConfig(**FIELDS))


@every_kind
def test_the_dequantized_weight_is_never_kept(kind: str, folder: Path) -> None:
    model = quantized(folder, kind)
    inputs = tiny.batch()
    lk.attach(model, lk.LoraConfig(**FIELDS))
    layers = [m.base_layer for m in model.modules() if hasattr(m, "base_layer")]
    shapes = {(layer.in_features, layer.out_features) for layer in layers}
    shapes |= {shape[::-1] for shape in shapes}
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    gc.collect()
    alive = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    kept = [t for t in [*saved, *alive] if t.is_floating_point() and tuple(t.shape) in shapes]
    assert saved
    assert not kept, [(tuple(t.shape), t.dtype) for t in kept]
    loss.backward()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_adopted_qlora_goes_on_as_in_peft(kind: str, folder: Path) -> None:
    runs = []
    for adopts in (False, True):
        torch.manual_seed(0)
        model = peft.get_peft_model(quantized(folder, kind), peft.LoraConfig(task_type="CAUSAL_LM", **FIELDS))
        optimizer = adam([p for p in model.parameters() if p.requires_grad])
        first = trained(model, optimizer, range(2))
        if adopts:
            lk.adopt(model)
        runs.append(torch.cat([first, trained(model, optimizer, range(2, 5))]))
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_cannot_be_done_on_a_quantized_base_is_refused(kind: str, folder: Path) -> None:
    model = quantized(folder, kind)
    before = packed(model)
    bank = lk.attach(model, lk.LoraConfig(**FIELDS), name="a")
    shaken(bank, "a")
    with pytest.raises(MergeError, match="quantized"):
        bank.merge("a")
    with pytest.raises(TargetError, match="DoRA needs"):
        bank.add("b", lk.LoraConfig(**FIELDS, use_dora=True))
    assert bank.names == ("a",)
    assert same(packed(model), before)


@pytest.mark.parametrize("kind", ["nf4", "fp4-double"])
def test_a_base_that_bitsandbytes_reads_wrong_is_refused_with_its_layers(kind: str, tmp_path: Path) -> None:
    base = base_folder(tmp_path / "narrow", tiny.llama())  # 32 and 48 wide
    with pytest.raises(BaseModelError, match=r"rows are not a multiple of 64 wide.*q_proj \(32 wide\)") as caught:
        load_base(base, quantize=kind, device="cpu")
    assert "int8" in caught.value.hint
    assert load_base(base, quantize="int8", device="cpu").model.is_quantized


def test_a_quantized_base_is_not_quantized_again(folder: Path, tmp_path: Path) -> None:
    read(folder, "nf4").save_pretrained(tmp_path / "base")
    texts.tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(BaseModelError, match="already quantized, by bitsandbytes"):
        load_base(tmp_path / "base", quantize="int8")
    assert load_base(tmp_path / "base").model.is_quantized


def test_a_method_whose_package_is_missing_is_told_in_one_line(folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(folder, tmp_path / "base")
    texts.tokenizer().save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "vptq", "config_for_layers": {}, "shared_layer_config": {}}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="vptq") as caught:
        load_base(base)
    assert "\n" not in str(caught.value)


def test_evaluating_and_generating_say_where_the_base_is_in_another_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = base_folder(tmp_path / "base", llama())
    rows = texts.write(tmp_path / "rows.jsonl", PAIRS)
    adapter = adapter_folder(base, tmp_path / "a").resolve()
    lk.Adapter(
        lk.Adapter.load(adapter).config, lk.Adapter.load(adapter).tensors, record={"recipe": {"quantize": "nf4"}}
    ).save(adapter, replace=True)
    given = ["--base", str(base), "--adapter", str(adapter)]
    assert main(["eval", str(rows), *given, "--quantize", "nf4", "--metrics", "loss", "--json"]) == 0
    quantized = capsys.readouterr()
    assert "trained on its base" not in quantized.err
    assert main(["eval", str(rows), *given, "--metrics", "loss", "--json"]) == 0
    plain = capsys.readouterr()
    assert "a was trained on its base in nf4, which is loaded as it is here" in plain.err
    assert json.loads(plain.out)["results"] != json.loads(quantized.out)["results"]
    assert main(["generate", *given, "--quantize", "int8", "--prompt", "one", "--max-new-tokens", "2"]) == 0
    told = capsys.readouterr().err
    assert "in nf4, which is loaded in int8" in told
    assert "MatMul8bitLt" not in told
    assert main(["generate", *given, "--quantize", "int3", "--prompt", "one"]) == 2
    assert "did you mean 'int8'" in capsys.readouterr().err


def test_a_base_that_is_loaded_is_not_quantized_by_name(tmp_path: Path) -> None:
    base = load_base(base_folder(tmp_path / "base", llama()))
    with pytest.raises(ConfigError, match="quantize does nothing"):
        generate(base, [None], "one", quantize="nf4")
