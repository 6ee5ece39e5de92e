"""`eval --report` and `compare --report`: a page, its path in the last line, and all that came from files escaped."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import transformers

import lora_kit as lk
from lora_kit.adapter.store import find_adapter
from lora_kit.algebra.compare import compare
from lora_kit.cli.main import main
from tests.support import texts, tiny

Capture = pytest.CaptureFixture[str]
NASTY = "<script>alert('x')</script>"


def read_page(path: str, capsys: Capture) -> str:
    """Return a page whose path is the last line on the terminal, after the checks that hold for any."""
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {path}"
    page = Path(path).read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.endswith("</html>\n")
    return page


def test_the_page_of_an_evaluation_escapes_texts_and_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    transformers.BertModel(tiny.bert().config).save_pretrained("encoder")
    texts.bert_tokenizer().save_pretrained("encoder")
    # The same text with both labels: one of the two is a mistake, whatever the adapter says.
    rows = [{"text": f"good {NASTY}", "label": label} for label in (NASTY, "calm")]
    texts.write(tmp_path / "rows.jsonl", rows)
    recipe = {"base": "encoder", "task": "classify", "data": "rows.jsonl", "out": "adapters/one"}
    lk.train({**recipe, "train": {"max_steps": 1}})
    shutil.copytree("adapters/one", "adapters/two")
    capsys.readouterr()
    arguments = ["eval", "--base", "encoder", "-a", "one", "-a", "two", "--data", "rows.jsonl", "--report", "page.html"]
    assert main(arguments) == 0
    page = read_page("page.html", capsys)
    escaped = "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;"
    assert f"good {escaped}</td>" in page
    assert f">{escaped}</td>" in page
    # Without a base, nothing "became" right: each adapter has its own count, and the mistakes name whose they are.
    for name in ("one", "two"):
        assert f"<dt>right: {name}</dt><dd>1 of 2" in page
    assert "became right" not in page
    assert "Of two. " in page
    assert main(arguments) == 3
    assert "page.html exists" in capsys.readouterr().err


def test_the_page_of_a_comparison_escapes_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    config = lk.LoraConfig(r=2, init_lora_weights=False, target_modules=("q_proj", "v_proj"))
    folders = ["plain", "<script>x"]
    for folder in folders:
        lk.attach(tiny.llama(), config, name="it").save("it", folder)
    assert main(["compare", *folders, "--report", "page.html"]) == 0
    page = read_page("page.html", capsys)
    assert "<h1>plain and &lt;script&gt;x</h1>" in page
    found = compare(*map(find_adapter, folders))
    for path, like in found.layers.items():
        assert f">{path.replace('_', '_<wbr/>')}</td>" in page
        assert f">{like.cosine:+.3f}</td>" in page
