"""`modules_to_save` as PEFT reads it: heads of classifiers, and names that match the ends of others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch

import lora_kit as lk
from lora_kit.adapter.folder import CONFIG, WEIGHTS
from lora_kit.errors import AdapterError, BankError, TargetError
from tests.support import classifiers, peft_models, tiny
from tests.support.classifiers import FAMILIES, HEADS, classifier, logits, peft_classifier

every_classifier = pytest.mark.parametrize(
    ("family", "task_type"), [(family, task_type) for family in FAMILIES for task_type in HEADS]
)
CLOSE = {"rtol": 0.0, "atol": 1e-6}


def rewrite(folder: Path, **fields: Any) -> Path:
    """Change fields of an adapter's config."""
    before = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(before | fields))
    return folder


def loaded(model: Any, folder: Path, **options: Any) -> lk.AdapterBank:
    """A bank with the adapter of a folder in use."""
    bank = lk.attach(model, slots=1, max_rank=8)
    bank.load("a", folder, **options)
    bank.use("a")
    return bank


def in_peft(model: Any, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(model, folder).eval()


@every_classifier
def test_a_classifier_of_peft_loads_and_goes_back(tmp_path: Path, family: str, task_type: str) -> None:
    theirs = peft_classifier(family, task_type)
    theirs.save_pretrained(tmp_path / "theirs")
    model = classifier(family, task_type)
    bank = loaded(model, tmp_path / "theirs")
    torch.testing.assert_close(logits(model), logits(theirs), **CLOSE)
    assert (logits(theirs) - logits(classifier(family, task_type))).abs().max() > 1e-2
    bank.save("a", tmp_path / "ours")
    torch.testing.assert_close(
        logits(in_peft(classifier(family, task_type), tmp_path / "ours")), logits(theirs), **CLOSE
    )


@every_classifier
def test_a_classifier_trained_here_is_the_same_in_peft(tmp_path: Path, family: str, task_type: str) -> None:
    model = classifier(family, task_type)
    head = "classifier" if hasattr(model, "classifier") else "score"
    config = lk.LoraConfig(r=4, target_modules=FAMILIES[family][1], modules_to_save=[head], task_type=task_type)
    bank = lk.attach(model, config, name="a")
    classifiers.shake(model)
    bank.save("a", tmp_path / "ours")
    torch.testing.assert_close(
        logits(in_peft(classifier(family, task_type), tmp_path / "ours")), logits(model), **CLOSE
    )


@every_classifier
def test_an_adopted_classifier_trains_and_saves(tmp_path: Path, family: str, task_type: str) -> None:
    theirs = peft_classifier(family, task_type)
    bank = lk.adopt(theirs)
    labels = torch.tensor([0, 1, 2]) if task_type == "SEQ_CLS" else torch.arange(21).view(3, 7) % 3
    before = logits(theirs)
    theirs(**classifiers.batch(), labels=labels).loss.backward()
    torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.5).step()
    assert not torch.equal(logits(theirs), before)
    bank.save("default", tmp_path / "ours")
    torch.testing.assert_close(
        logits(in_peft(classifier(family, task_type), tmp_path / "ours")), logits(theirs), **CLOSE
    )


def test_what_could_not_be_saved_is_refused_before_it_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AdapterError("the tensors do not fit the config")

    monkeypatch.setattr("lora_kit.bank.peft_bridge.adopt.check_savable", refuse)
    theirs = peft_classifier("Bert", "SEQ_CLS")
    before = peft_models.looks(theirs)
    with pytest.raises(BankError, match="'default' could not be saved: the tensors do not fit"):
        lk.adopt(theirs)
    assert peft_models.looks(theirs) == before


def test_the_head_of_an_older_file_is_read_though_the_config_does_not_name_it(tmp_path: Path) -> None:
    theirs = peft_classifier("Bert", "SEQ_CLS")
    theirs.save_pretrained(tmp_path / "a")
    model = classifier("Bert", "SEQ_CLS")
    bank = loaded(model, rewrite(tmp_path / "a", modules_to_save=None))
    torch.testing.assert_close(logits(model), logits(theirs), **CLOSE)
    assert bank.snapshot("a").config.modules_to_save == ("classifier",)


def test_names_without_a_module_are_warned_about_and_refused_in_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = peft_classifier("Bert", "SEQ_CLS", target_modules=["query", "q_proj"])
    theirs.save_pretrained(tmp_path / "a")
    loaded(classifier("Bert", "SEQ_CLS"), tmp_path / "a")
    assert "a: nothing in the model matches q_proj, score" in caplog.text
    with pytest.raises(TargetError, match="nothing in the model matches score"):
        lk.attach(
            classifier("Bert", "SEQ_CLS"),
            lk.LoraConfig(target_modules=["query"], modules_to_save=["classifier", "score"]),
        )


def test_a_head_that_the_model_has_and_the_file_lacks_is_an_error(tmp_path: Path) -> None:
    peft_classifier("DistilBert", "SEQ_CLS").save_pretrained(tmp_path / "a")
    tensors = safetensors.torch.load_file(tmp_path / "a" / WEIGHTS)
    for ending in (".classifier.", ".pre_classifier.bias"):
        fewer = {key: tensor for key, tensor in tensors.items() if ending not in f"{key}."}
        safetensors.torch.save_file(fewer, tmp_path / "a" / WEIGHTS)
        with pytest.raises(AdapterError, match=r"the file has no \S*classifier"):
            loaded(classifier("DistilBert", "SEQ_CLS"), tmp_path / "a")


def test_a_name_means_every_module_that_ends_in_it(tmp_path: Path) -> None:
    theirs = peft_models.peft_model(modules_to_save=["norm"]).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = tiny.llama()
    bank = loaded(model, tmp_path / "theirs")
    expected = tiny.logits(theirs, tiny.batch())
    torch.testing.assert_close(tiny.logits(model, tiny.batch()), expected, **CLOSE)
    assert len(bank.coverage("a").saved) == 5
    bank.save("a", tmp_path / "ours")
    torch.testing.assert_close(tiny.logits(in_peft(tiny.llama(), tmp_path / "ours"), tiny.batch()), expected, **CLOSE)


def test_an_adapter_with_the_one_module_of_that_very_name_still_loads(tmp_path: Path) -> None:
    peft_models.peft_model(modules_to_save=["model.norm"]).save_pretrained(tmp_path / "a")
    bank = loaded(tiny.llama(), rewrite(tmp_path / "a", modules_to_save=["norm"]))
    assert bank.coverage("a").saved == ("model.norm",)


def test_whole_paths_are_written_where_the_names_would_mean_more_in_peft(tmp_path: Path) -> None:
    # `dense` is inside `pooler` as well, of which PEFT would make a copy within a copy, and then fail to read it.
    model = classifier("Bert", "SEQ_CLS")
    names = ["pooler", "classifier", "attention.output.dense", "pooler.dense"]
    bank = lk.attach(model, lk.LoraConfig(r=4, target_modules=["query"], modules_to_save=names), name="a")
    classifiers.shake(model)
    adapter = bank.save("a", tmp_path / "a")
    assert adapter.config.modules_to_save == bank.coverage("a").saved
    assert "bert.pooler" in adapter.config.modules_to_save
    torch.testing.assert_close(logits(in_peft(classifier("Bert", "SEQ_CLS"), tmp_path / "a")), logits(model), **CLOSE)
