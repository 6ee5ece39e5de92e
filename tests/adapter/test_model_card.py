"""The code that a model card shows, run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

import lora_kit as lk
from lora_kit.models.tasks import TASK_SPECS
from tests.support import texts, tiny
from tests.support.merging import base_folder

LABELS = ["good", "bad", "neither"]


def run_card(folder: Path) -> dict[str, object]:
    """Run every block of Python of a folder's card, in one space, with the folder's own path; return that space."""
    card = (folder / "README.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", card, re.S)
    assert blocks
    space: dict[str, object] = {}
    for block in blocks:
        exec(block.replace(f"path/to/{folder.name}", str(folder)), space)
    return space


def front_matter(folder: Path) -> dict[str, object]:
    text = (folder / "README.md").read_text("utf-8")
    return dict(yaml.safe_load(text.split("---\n")[1]))


def save_encoder(folder: Path) -> Path:
    tiny.bert().base_model.save_pretrained(folder)  # type: ignore[operator]
    texts.bert_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("task", ["classify", "tokens"])
def test_the_card_of_a_classifier_loads_it_and_predicts(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_encoder(tmp_path / "encoder")
    base = lk.load_base(source, task=task, num_labels=len(LABELS))
    config = lk.LoraConfig(
        r=2,
        target_modules=["query"],
        modules_to_save=["classifier"],
        task_type=TASK_SPECS[task].peft_type,
        base_model_name_or_path=str(source),
    )
    bank = lk.attach(base.model, config, name="mood")
    bank.save("mood", tmp_path / "mood", record={"labels": LABELS})
    space = run_card(tmp_path / "mood")
    printed = capsys.readouterr().out
    assert "Prediction(" in printed
    assert task == "tokens" or any(label in printed for label in LABELS)
    assert space["bank"].active == "mood"  # type: ignore[attr-defined]
    assert space["base"].model.config.num_labels == len(LABELS)  # type: ignore[attr-defined]
    assert front_matter(tmp_path / "mood")["base_model_relation"] == "adapter"


def test_the_card_of_an_adapter_loads_it_on_its_base(tmp_path: Path) -> None:
    source = base_folder(tmp_path / "llama", tiny.llama())
    base = lk.load_base(source)
    config = lk.LoraConfig(r=2, target_modules=["q_proj"], base_model_name_or_path=str(source), init_lora_weights=False)
    bank = lk.attach(base.model, config, name="x")
    bank.save("x", tmp_path / "x")
    inputs = tiny.batch()
    bank.use("x")
    expected = tiny.logits(base.model, inputs)
    made = run_card(tmp_path / "x")["base"].model  # type: ignore[attr-defined]
    torch.testing.assert_close(tiny.logits(made, inputs), expected)


def test_the_card_of_an_adapter_without_labels_says_what_its_base_is(tmp_path: Path) -> None:
    source = save_encoder(tmp_path / "encoder")
    base = lk.load_base(source, task="classify", num_labels=3)
    config = lk.LoraConfig(
        target_modules=["query"], task_type="SEQ_CLS", base_model_name_or_path=str(source), init_lora_weights=False
    )
    lk.attach(base.model, config, name="x").save("x", tmp_path / "x")
    card = (tmp_path / "x" / "README.md").read_text("utf-8")
    assert "load_base(" not in card
    assert "`base` is what `lk.load_base` returns" in card


def test_the_card_of_a_merged_model_loads_it(tmp_path: Path) -> None:
    source = base_folder(tmp_path / "llama", tiny.llama())
    base = lk.load_base(source)
    config = lk.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    lk.attach(base.model, config, name="x").save("x", tmp_path / "x")
    lk.merge(source, tmp_path / "x", tmp_path / "merged")
    space = run_card(tmp_path / "merged")
    assert type(space["model"]).__name__ == "LlamaForCausalLM"
    fields = front_matter(tmp_path / "merged")
    assert (fields["base_model"], fields["base_model_relation"]) == (str(source), "finetune")
    assert fields["pipeline_tag"] == "text-generation"
