"""The files beside the weights of a merged model: those that a model needs, with the tokens that end its answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lora_kit as lk
from lora_kit.generation.end_tokens import add_answer_ends
from lora_kit.merging.merge import merge
from lora_kit.names import KIT_BASE
from tests.support import texts, tiny
from tests.support.merging import adapter_folder, base_folder

TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '<unk>' if m.role == 'assistant' }}{% endfor %}"
"""A chat template whose answers end otherwise than the texts of the base; see `ends_with`."""


def ends_with(token: str) -> str:
    return TURNS.replace("<unk>", token)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return base_folder(tmp_path / "base", tiny.llama())


def merged(base: Path, folder: Path, **data: Any) -> tuple[lk.MergeReport, list[int] | int | None]:
    """Return the report of a merge, and the ends that its folder names."""
    adapter = lk.Adapter.load(adapter_folder(base, folder / "chat"))
    known = lk.Adapter(adapter.config, adapter.tensors, record={**adapter.record, "recipe": {"data": data}})
    report = merge(base, known, folder / "merged")
    return report, json.loads((folder / "merged" / "generation_config.json").read_text("utf-8")).get("eos_token_id")


@pytest.mark.parametrize("own", [None, 2, [2, 5]])
def test_the_end_of_an_answer_is_an_end_for_other_programs(base: Path, tmp_path: Path, own: Any) -> None:
    file = base / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), "eos_token_id": own}), "utf-8")
    config = json.loads((base / "config.json").read_text("utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "eos_token_id": 2}), "utf-8")
    report, ends = merged(base, tmp_path, chat_template=ends_with("<s>"))
    assert ends == [*(own if isinstance(own, list) else [2]), texts.BOS]
    assert report.ends == ("<s>",)
    assert ", added to generation_config.json" in (tmp_path / "merged" / "README.md").read_text("utf-8")


@pytest.mark.parametrize("data", [{"chat_template": ends_with("</s>")}, {"separator": " =>"}])
def test_an_end_that_the_base_has_changes_nothing(base: Path, tmp_path: Path, data: dict[str, Any]) -> None:
    file = base / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": texts.EOS, "do_sample": True, "temperature": 0.6}), "utf-8")
    report, _ = merged(base, tmp_path, **data)
    assert report.ends == ()
    assert (tmp_path / "merged" / file.name).read_bytes() == file.read_bytes()


def test_a_model_without_the_file_gets_it_with_the_tokens_of_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}), "utf-8")
    use = {"recipe": {"data": {"chat_template": ends_with("<s>")}}}
    assert add_answer_ends(tmp_path, use, texts.tokenizer()) == ("<s>",)
    fields = json.loads((tmp_path / "generation_config.json").read_text("utf-8"))
    assert fields == {"bos_token_id": 1, "eos_token_id": [2, texts.BOS]}


def test_a_template_that_ends_nothing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    use = {"recipe": {"data": {"chat_template": ends_with("")}}}
    assert add_answer_ends(tmp_path, use, texts.tokenizer()) == ()
    assert "no special token after an answer" in caplog.text


NEEDED = ("tokenizer.json", "source.spm", "target_vocab.json", "preprocessor_config.json", "LICENSE.txt", "dict.txt")
LEFT = ("training.json", "trainer_state.json", "all_results.json", "predictions.json", "rows.txt", "data_config.json")


def test_only_what_a_model_needs_is_copied(base: Path, tmp_path: Path) -> None:
    adapter = adapter_folder(base, tmp_path / "sql")
    for name in (*NEEDED[1:], *LEFT):
        (base / name).write_text("{}", "utf-8")
    merge(base, adapter, tmp_path / "merged")
    copied = {file.name for file in (tmp_path / "merged").iterdir()}
    assert copied >= set(NEEDED)
    assert not copied & set(LEFT)


def test_the_embedded_base_has_no_training_in_what_is_merged(tmp_path: Path) -> None:
    base = lk.load_base(KIT_BASE)
    bank = lk.attach(base.model, lk.LoraConfig(r=1, target_modules=["q_proj"], init_lora_weights=False), name="a")
    bank.save("a", tmp_path / "a")
    merge(KIT_BASE, tmp_path / "a", tmp_path / "merged", allow=["lost-delta"])
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    assert names == {
        *("README.md", "config.json", "generation_config.json", "lora_kit_merge.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
