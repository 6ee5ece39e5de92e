"""Merging to a folder: what transformers loads is base + adapter; what must be refused is refused before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lora_kit as lk
from lora_kit.errors import AdapterError, BaseMismatchError, BaseModelError, MergeError, StorageError, VerificationError
from lora_kit.merging import model_files
from lora_kit.merging.merge import merge
from lora_kit.merging.preflight import MERGE_RECORD, read_merged_digests
from lora_kit.merging.verification import logits
from lora_kit.merging.verification import verify as proof
from lora_kit.merging.writing import journal, writer
from lora_kit.models.loading import load_base
from tests.support import texts, tiny
from tests.support.merging import adapter_folder, base_folder, beside, contents


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return base_folder(tmp_path / "base", tiny.llama())


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return adapter_folder(base, tmp_path / "sql")


@pytest.mark.parametrize("family", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_transformers_loads_is_base_plus_adapter(
    tmp_path: Path, family: Callable[..., Any], dtype: torch.dtype
) -> None:
    base = base_folder(tmp_path / "base", family(dtype=dtype))
    adapter = adapter_folder(base, tmp_path / "sql")
    report = merge(base, adapter, tmp_path / "merged", verify="logits")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == dtype
    plain = load_base(base).model
    bank = lk.attach(plain, slots=1)
    bank.load("sql", adapter)
    batch = tiny.batch()
    without = tiny.logits(plain, batch)
    bank.use("sql")
    wanted, found = tiny.logits(plain, batch), tiny.logits(merged, batch)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1 * float((wanted - without).abs().max())
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)
    assert float((wanted - without).abs().max()) > 10 * tolerance or dtype == torch.bfloat16
    assert report.logits is not None
    assert report.logits.largest_difference <= report.logits.bound < report.logits.effect
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert len(report.tensors) == len(lk.Adapter.load(adapter).pairs())


def test_the_report_says_how_much_survived(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", tiny.llama(dtype=torch.bfloat16))
    adapter = adapter_folder(base, tmp_path / "sql")
    coarse = merge(base, adapter, tmp_path / "coarse", verify="logits")
    fine = merge(base, adapter, tmp_path / "fine", dtype="fp32", verify="logits")
    assert coarse.worst is not None
    assert fine.worst is not None
    assert 0.5 < coarse.worst.retained < 0.999
    assert fine.worst.retained > 0.999
    assert coarse.logits is not None
    assert fine.logits is not None
    assert coarse.logits.bound > fine.logits.bound
    found = json.loads(json.dumps(coarse.to_json()))
    assert found["out"] == str(tmp_path / "coarse")
    assert found["tensors"][0]["retained"] <= 1
    assert found["retention"] == pytest.approx(coarse.retention)
    assert found["bytes"] == sum(len(data) for data in contents(tmp_path / "coarse").values())


def test_saved_modules_are_merged_whole(tmp_path: Path) -> None:
    model = tiny.bert()
    base = base_folder(tmp_path / "base", model)
    adapter = adapter_folder(
        base,
        tmp_path / "mood",
        task="classify",
        target_modules=["query"],
        modules_to_save=["classifier"],
        task_type="SEQ_CLS",
    )
    report = merge(base, adapter, tmp_path / "merged", verify="logits")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    saved = lk.Adapter.load(adapter).saved()
    assert torch.equal(merged.classifier.weight, saved["classifier.weight"])
    assert report.counts["replaced"] == 2
    assert {tensor.path.split(".")[-1] for tensor in report.tensors} == {"query"}


def test_the_merged_folder_has_its_tokenizer_and_record(base: Path, adapter: Path, tmp_path: Path) -> None:
    report = merge(base, adapter, tmp_path / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("one two")["input_ids"] == texts.tokenizer()("one two")["input_ids"]
    record = json.loads((tmp_path / "merged" / MERGE_RECORD).read_text("utf-8"))
    assert record["merged"] == [lk.Adapter.load(adapter).digest] == [*report.adapters]
    assert record["base"]["structure"]
    fresh = tmp_path / "fresh"
    fresh.touch()
    assert {path.stat().st_mode for path in (tmp_path / "merged").iterdir()} == {fresh.stat().st_mode}


@pytest.mark.parametrize("older", [False, True])
def test_the_rotary_embeddings_of_the_base_reach_readers_of_either_spelling(
    base: Path, adapter: Path, tmp_path: Path, older: bool
) -> None:
    scaling = {"rope_type": "linear", "factor": 4.0}
    file = base / "config.json"
    fields = json.loads(file.read_text("utf-8"))
    fields["rope_parameters"] = {"rope_theta": 500_000.0, **scaling}
    if older:
        del fields["rope_parameters"]
        fields |= {"rope_theta": 500_000.0, "rope_scaling": scaling}
    file.write_text(json.dumps(fields), encoding="utf-8")
    merge(base, adapter, tmp_path / "merged")
    written = json.loads((tmp_path / "merged" / "config.json").read_text("utf-8"))
    assert (written["rope_theta"], written["rope_scaling"]) == (500_000.0, scaling)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "merged")
    assert config.rope_parameters == {"rope_theta": 500_000.0, **scaling}


def test_the_same_adapter_is_merged_only_once(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(base, adapter, tmp_path / "once")
    with pytest.raises(MergeError, match="already"):
        merge(tmp_path / "once", adapter, tmp_path / "twice")
    other = adapter_folder(tmp_path / "once", tmp_path / "other", r=2)
    merge(tmp_path / "once", other, tmp_path / "both")
    with pytest.raises(MergeError, match="already"):
        merge(tmp_path / "both", adapter, tmp_path / "twice")
    assert len(read_merged_digests(tmp_path / "both")) == 2
    assert not (tmp_path / "twice").exists()


def test_another_base_is_refused_unless_allowed(adapter: Path, tmp_path: Path) -> None:
    other = base_folder(tmp_path / "other", tiny.llama(seed=5))
    with pytest.raises(BaseMismatchError, match="another base"):
        merge(other, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    merge(other, adapter, tmp_path / "merged", allow=("other-base",))
    assert (tmp_path / "merged" / "config.json").exists()


def test_an_output_that_exists_is_refused_before_any_work(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(base, adapter, tmp_path / "merged")
    before = contents(tmp_path / "merged")
    monkeypatch.setattr("lora_kit.merging.merge.build_meta_model", None)
    with pytest.raises(StorageError, match="exists"):
        merge(base, adapter, tmp_path / "merged")
    assert contents(tmp_path / "merged") == before


def test_only_an_earlier_merge_is_replaced(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(base, adapter, tmp_path / "merged")
    other = adapter_folder(base, tmp_path / "other", r=2)
    report = merge(base, other, tmp_path / "merged", replace=True)
    assert read_merged_digests(tmp_path / "merged") == tuple(report.adapters)
    precious = base_folder(tmp_path / "precious", tiny.llama(seed=3))
    before = contents(precious)
    with pytest.raises(StorageError, match="something else"):
        merge(base, adapter, precious, replace=True)
    assert contents(precious) == before


@pytest.mark.parametrize(
    "place",
    [
        lambda base, adapter: base,
        lambda base, adapter: base / "merged",
        lambda base, adapter: base.parent,
        lambda base, adapter: adapter,
        lambda base, adapter: adapter / "merged",
        lambda base, adapter: base.parent / "sql" / ".." / "base",
    ],
    ids=["the base", "in the base", "around the base", "the adapter", "in the adapter", "the base by another path"],
)
@pytest.mark.parametrize("replace", [False, True])
def test_an_output_in_the_way_of_an_input_is_refused(
    base: Path, adapter: Path, place: Callable[[Path, Path], Path], replace: bool
) -> None:
    before, around = contents(base.parent), beside(base)
    with pytest.raises(MergeError):
        merge(base, adapter, place(base, adapter), replace=replace)
    assert contents(base.parent) == before
    assert beside(base) == around


def test_the_embedded_base_is_no_output() -> None:
    import lora_kit.models.kit_base

    folder = Path(lora_kit.models.kit_base.__path__[0])
    with pytest.raises(MergeError):
        merge("kit-base", folder.parent.parent / "nowhere", folder / "merged")
    assert not (folder / "merged").exists()


def test_an_output_that_cannot_be_made_is_refused_before_any_work(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_kit.merging.merge.build_meta_model", None)
    with pytest.raises(StorageError):
        merge(base, adapter, "/proc/nowhere/merged")


def test_a_quantized_base_is_refused_with_the_choices(base: Path, adapter: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text("utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(MergeError, match="quantized") as raised:
        merge(base, adapter, tmp_path / "merged")
    assert "unquantized" in raised.value.hint
    assert "beside" in raised.value.hint
    assert not (tmp_path / "merged").exists()


def test_tied_weights_are_refused(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", tiny.llama(tie=True))
    adapter = adapter_folder(base, tmp_path / "head", target_modules=["embed_tokens"])
    around = beside(base)
    with pytest.raises(MergeError, match="shared"):
        merge(base, adapter, tmp_path / "merged")
    assert beside(base) == around


def test_a_damaged_record_of_merges_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    for damaged in ("{", "[]", '{"merged": 3}'):
        (base / MERGE_RECORD).write_text(damaged, encoding="utf-8")
        with pytest.raises(MergeError, match="damaged"):
            merge(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize("broken", ["no adapter", "torn weights", "no base"])
def test_inputs_that_cannot_be_read_leave_nothing(base: Path, adapter: Path, tmp_path: Path, broken: str) -> None:
    weights = adapter / "adapter_model.safetensors"
    if broken == "torn weights":
        weights.write_bytes(weights.read_bytes()[:-8])
    if broken == "no adapter":
        weights.unlink()
    if broken == "no base":
        (base / "model.safetensors").unlink()
    around = beside(base)
    with pytest.raises((AdapterError, BaseModelError)):
        merge(base, adapter, tmp_path / "merged")
    assert beside(base) == around


@pytest.mark.parametrize("failing", ["copy_sidecars", "check_result", "write_shards", "KeyboardInterrupt"])
def test_a_failed_merge_leaves_nothing(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        if failing == "KeyboardInterrupt":
            raise KeyboardInterrupt
        raise VerificationError("no") if failing == "check_result" else OSError(28, "No space left on device")

    places = {"copy_sidecars": model_files, "check_result": proof, "write_shards": writer, "KeyboardInterrupt": journal}
    monkeypatch.setattr(places[failing], failing if failing != "KeyboardInterrupt" else "check_read_back", fail)
    before, around = contents(base), beside(base)
    with pytest.raises((StorageError, VerificationError, KeyboardInterrupt)):
        merge(base, adapter, tmp_path / "merged")
    assert contents(base) == before
    assert beside(base) == around


def test_lifting_a_model_to_fp32_gives_its_bits_back() -> None:
    model = tiny.llama(dtype=torch.bfloat16, tie=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with logits.use_fp32(model):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.dtype == torch.bfloat16


def test_merge_is_also_the_name_in_the_package(base: Path, adapter: Path, tmp_path: Path) -> None:
    assert lk.merge(base, adapter, tmp_path / "merged").retention > 0.999
