"""What is published with an adapter, an export or a merged model: no home, no foreign data path, no live markup."""

from __future__ import annotations

from pathlib import Path

import pytest
from markdown_it import MarkdownIt

import lora_kit as lk
from lora_kit.adapter.model_card import escape_markdown, format_inline_code
from lora_kit.models.infer_base import infer_base
from lora_kit.training.recipe.load import load_recipe
from lora_kit.training.train import train
from tests.support import texts, tiny
from tests.support.merging import adapter_folder, base_folder, contents
from tests.support.training import PAIRS

MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable("table")
NASTY = "<script>alert(1)</script> `x` [y](z) ![p](q) a|b"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in the home of Ada, with a base elsewhere in that home and a client's data."""
    home = tmp_path / "ada"
    (home / "project").mkdir(parents=True)
    (home / "clients").mkdir()
    base_folder(home / "models" / "llama", tiny.llama())
    texts.write(home / "clients" / "acme.jsonl", PAIRS)
    texts.write(home / "project" / "valid.jsonl", PAIRS)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "project")
    return home / "project"


def tells(folder: Path, *secrets: str) -> list[str]:
    """The files below a folder that hold one of these texts."""
    return [name for name, data in contents(folder).items() if any(secret.encode() in data for secret in secrets)]


@pytest.mark.parametrize("method", ["lora", "full", "peft"])
def test_what_was_trained_names_no_home_and_no_data_outside_the_project(project: Path, method: str) -> None:
    home = project.parent
    report = train(
        {
            "base": str(home / "models" / "llama"),
            "data": {"train": str(home / "clients" / "acme.jsonl"), "validation": str(project / "valid.jsonl")},
            "out": str(project / "adapters" / "x"),
            "method": method,
            "train": {"max_steps": 1},
            **(
                {"peft": {"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": []}}
                if method == "peft"
                else {}
            ),
        }
    )
    assert tells(report.out, str(home), "clients") == []
    recipe = load_recipe(report.out / "recipe.yaml")
    assert (recipe.base, recipe.out) == ("~/models/llama", "adapters/x")
    assert (recipe.data.train, recipe.data.validation) == ("acme.jsonl", "valid.jsonl")
    assert report.recipe.data.train == str(home / "clients" / "acme.jsonl")
    if method == "lora":
        assert infer_base([report.out]) == "~/models/llama"


def test_exports_and_merges_name_no_home(project: Path) -> None:
    home = project.parent
    base, out = home / "models" / "llama", home / "out"
    adapter = adapter_folder(base, project / "adapters" / "x", target_modules=["q_proj"])
    assert tells(adapter, str(home)) == []
    for target in ("peft", "vllm", "mlx", "gguf"):
        lk.export(adapter, target, out / target, base=base)
    lk.merge(base, adapter, out / "merged")
    assert tells(out, str(home)) == []
    assert "~/models/llama" in (out / "vllm" / "README.md").read_text()


def test_names_are_escaped_for_markdown_and_html_alike(project: Path) -> None:
    name = NASTY.replace("/", "")
    adapter = adapter_folder(project.parent / "models" / "llama", project / name, target_modules=["q_proj"])
    lk.Adapter.load(adapter).save(project / f"{name} 2", record={"metrics": {NASTY: 1.0}})
    lk.export(adapter, "vllm", project / "out")
    for card in (project / f"{name} 2" / "README.md", project / "out" / "README.md"):
        page = MARKDOWN.render(card.read_text())
        assert "&lt;script&gt;alert(1)" in page
        assert not any(tag in page for tag in ("<script", "<a ", "<img"))


def test_escaped_text_is_the_same_text_to_a_reader() -> None:
    assert MARKDOWN.render(escape_markdown(NASTY)) == (
        "<p>&lt;script&gt;alert(1)&lt;/script&gt; `x` [y](z) ![p](q) a|b</p>\n"
    )
    for code in ("plain", "a`b", "``", "`", "<b>"):
        shown = MARKDOWN.render(f"say {format_inline_code(code)} now")
        assert shown == f"<p>say <code>{code.replace('<', '&lt;').replace('>', '&gt;')}</code> now</p>\n"
