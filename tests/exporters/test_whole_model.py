"""Whole models for llama.cpp and Ollama: merged, and converted by the user's converter, here a short script."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lora_kit as lk
from lora_kit.cli.main import main
from lora_kit.errors import ExportError, StorageError
from lora_kit.exporters.export import check
from tests.support import tiny
from tests.support.merging import base_folder

SCRIPT = """import json, pathlib, sys
if sys.argv[1:] == ["--help"]:
    sys.exit()
model, _, out = sys.argv[1:]
facts = {"weights": (pathlib.Path(model) / "model.safetensors").stat().st_size}
pathlib.Path(out).write_text(json.dumps(facts))
"""
FAILS = "raise SystemExit('BPE pre-tokenizer was not recognized')"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return base_folder(tmp_path / "base", tiny.llama())


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    config = lk.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"], init_lora_weights=False)
    record = {"recipe": {"data": {"separator": "\n=>"}}}
    lk.attach(lk.load_base(base).model, config, name="sql").save("sql", tmp_path / "sql", record=record)
    return tmp_path / "sql"


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "llama.cpp" / "convert_hf_to_gguf.py"
    file.parent.mkdir()
    file.write_text(SCRIPT)
    monkeypatch.setenv("LORA_KIT_LLAMA_CPP", str(file.parent))
    return file


@pytest.mark.parametrize("target", ["gguf-model", "ollama-model"])
def test_a_converter_is_run_on_what_merge_writes(
    target: str, base: Path, adapter: Path, converter: Path, tmp_path: Path
) -> None:
    lk.export(adapter, target, tmp_path / "out", base=base)
    lk.merge(base, adapter, tmp_path / "merged")
    facts = json.loads((tmp_path / "out" / "model.gguf").read_text())
    assert facts["weights"] == (tmp_path / "merged" / "model.safetensors").stat().st_size
    assert not (tmp_path / "out" / "merged").exists()
    assert "convert_hf_to_gguf" not in (tmp_path / "out" / "README.md").read_text()


def test_without_a_converter_the_readme_has_the_command_that_makes_the_file(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LORA_KIT_LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", "")
    lk.export(adapter, "gguf-model", tmp_path / "out", base=base)
    assert (tmp_path / "out" / "merged" / "model.safetensors").is_file()
    readme = (tmp_path / "out" / "README.md").read_text()
    command = f"python llama.cpp/convert_hf_to_gguf.py {tmp_path}/out/merged --outfile {tmp_path}/out/model.gguf"
    assert command in readme
    assert f"llama-server -m {tmp_path}/out/model.gguf" in readme


def test_ollama_gets_the_separator_of_the_training(base: Path, adapter: Path, converter: Path, tmp_path: Path) -> None:
    lk.export(adapter, "ollama-model", tmp_path / "out", base=base)
    assert (tmp_path / "out" / "Modelfile").read_text() == 'FROM ./model.gguf\nTEMPLATE """{{ .Prompt }}\n=>"""\n'


def test_a_converter_that_fails_leaves_nothing_and_says_its_last_line(
    base: Path, adapter: Path, converter: Path, tmp_path: Path
) -> None:
    converter.write_text(f"import sys\nif '--help' not in sys.argv: {FAILS}")
    with pytest.raises(ExportError, match=r"ended with 1: BPE pre-tokenizer was not recognized"):
        lk.export(adapter, "gguf-model", tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "line", ["OSError: [Errno 28] No space left on device", "OSError: 400 requested and 0 written"]
)
def test_a_disk_that_the_converter_finds_full_is_of_the_machine(
    line: str, base: Path, adapter: Path, converter: Path, tmp_path: Path
) -> None:
    converter.write_text(f"import sys\nif '--help' not in sys.argv: raise SystemExit({line!r})")
    with pytest.raises(StorageError, match="out cannot be written: No space left on device"):
        lk.export(adapter, "gguf-model", tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_a_converter_that_writes_nothing_is_an_error(
    base: Path, adapter: Path, converter: Path, tmp_path: Path
) -> None:
    converter.write_text("print('done')")
    with pytest.raises(ExportError, match=r"wrote no model\.gguf: done"):
        lk.export(adapter, "gguf-model", tmp_path / "out", base=base)


def test_a_package_that_the_converter_lacks_is_named_before_the_merge(
    base: Path, adapter: Path, converter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_kit.merging.merge.merge", lambda *given, **named: pytest.fail("merged"))
    converter.write_text("import no_such_package.inner")
    with pytest.raises(ExportError, match="No module named") as error:
        lk.export(adapter, "gguf-model", tmp_path / "out", base=base)
    assert "pip install no_such_package beside lora_kit" in str(error.value.hint)


def test_a_folder_without_the_converter_is_an_error_before_the_merge(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_KIT_LLAMA_CPP", str(tmp_path))
    with pytest.raises(ExportError, match=r"has no convert_hf_to_gguf\.py"):
        lk.export(adapter, "gguf-model", tmp_path / "out", base=base)


def test_whole_models_need_a_base_and_take_what_merge_takes(base: Path, adapter: Path, tmp_path: Path) -> None:
    assert check(adapter, "gguf-model", base=base).refused == ()
    (adapter / "lora_kit.json").unlink()
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(ExportError, match="base is needed to merge into"):
        lk.export(adapter, "ollama-model", tmp_path / "out")


def test_the_verb_exports_a_whole_model(base: Path, adapter: Path, converter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", str(adapter), "--target", "gguf-model", "--base", str(base), "--out", str(out)]) == 0
    assert (out / "model.gguf").is_file()
