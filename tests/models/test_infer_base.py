"""Where nobody gives a base, the one that the adapters name is used, if it is here; nothing is fetched for it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

import lora_kit as lk
from lora_kit.adapter.folder import CONFIG
from lora_kit.cli.main import main
from lora_kit.errors import BaseModelError, ConfigError, ExportError
from lora_kit.exporters.export import export
from lora_kit.models.infer_base import infer_base
from lora_kit.models.locate import find_base, locate_base, warn_of_floating_revision
from tests.support import folders, hub_cache, texts, tiny
from tests.support.training import PAIRS

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with two bases in folders, an adapter for the first, and a cache of the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for seed, name in enumerate(("base", "other")):
        tiny.llama(seed=seed).save_pretrained(name)
        texts.tokenizer().save_pretrained(name)
    save_adapter("sql", base="base")
    return tmp_path


def save_adapter(name: str, *, base: str) -> Path:
    """Save an adapter of the first base into the store, as one that was trained on a base of this name."""
    config = lk.LoraConfig(r=2, target_modules=("q_proj",), init_lora_weights=False)
    model = tiny.llama()
    model.config._name_or_path = base
    bank = lk.attach(model, config, name=name)
    bank.save(name, Path("adapters", name))
    return Path("adapters", name)


def rename_base(adapter: str, base: str | None, **fields: str) -> None:
    """Have an adapter of another tool name another base."""
    folder = Path("adapters", adapter)
    (folder / "lora_kit.json").unlink(missing_ok=True)
    written = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**written, "base_model_name_or_path": base, **fields}))


def run(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    return code, *capsys.readouterr()


def test_the_base_that_an_adapter_names_is_used_by_every_verb(here: Path, capsys: Capture) -> None:
    assert infer_base(["sql"]) == "base"
    texts.write(here / "rows.jsonl", [{"text": "abcd efgh"}] * 2)
    for arguments in (
        ["generate", "-a", "sql", "--prompt", "abc", "--max-new-tokens", "2"],
        ["eval", "rows.jsonl", "-a", "sql", "--compare"],
        ["merge", "-a", "sql", "--out", "merged"],
        ["export", "sql", "--target", "merged", "--out", "exported"],
        ["check", "sql", "--target", "vllm"],
    ):
        code, _, err = run(capsys, *arguments)
        assert code == 0, err


def test_the_fingerprint_decides_whether_it_is_that_base(here: Path, capsys: Capture) -> None:
    (here / "base").rename(here / "moved")
    (here / "other").rename(here / "base")
    arguments = ["generate", "-a", "sql", "--prompt", "abc", "--max-new-tokens", "2"]
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert "was made for base, and this is another base" in err
    assert run(capsys, *arguments, "--base", "moved")[0] == 0
    code, _, err = run(capsys, *arguments, "--allow", "other-base")
    assert code == 0
    assert "another base than it was made for" in err


def test_without_a_fingerprint_that_is_said(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    rename_base("sql", "base")
    assert infer_base(["sql"]) == "base"
    assert "without a fingerprint only shapes can be checked" in caplog.text


def test_a_cached_id_is_used_with_its_revision(here: Path) -> None:
    cache = here / "cache"
    hub_cache.add_repository(cache, "org/base", here / "base", revision="v1")
    rename_base("sql", "org/base")
    with pytest.raises(ConfigError, match="names 'org/base' as its base, but it is neither a folder here nor in the"):
        infer_base(["sql"])
    rename_base("sql", "org/base", revision="v1")
    assert infer_base(["sql"]) == "org/base@v1"
    hub_cache.add_repository(cache, "org/base", here / "base")
    rename_base("sql", "org/base", revision=None)
    assert infer_base(["sql"]) == "org/base"


def test_a_base_that_is_not_here_is_not_fetched_and_the_reason_is_given(here: Path) -> None:
    for base, message in (
        (None, "names no base"),
        ("org/nothing", "neither a folder here nor in the local cache"),
        ("/nowhere/at/all", "there is no such folder"),
        ("adapters", r"no config\.json in this folder"),
        ("adapters/sql", "holds an adapter, not a base"),
    ):
        rename_base("sql", base)
        with pytest.raises(ConfigError, match=f"{message}.*no base was given"):
            infer_base(["sql"])
        with pytest.raises(ExportError, match=f"needed to merge into.*{message}"):
            export("sql", "merged", "out")


def test_adapters_that_name_different_bases_need_a_base(here: Path) -> None:
    save_adapter("same", base=str(here / "base"))
    assert infer_base(["sql", "same"]) == "base"
    save_adapter("tone", base="other")
    with pytest.raises(ConfigError, match=r"different bases: base \('sql'\), other \('tone'\)"):
        infer_base(["sql", "tone"])


# A base by id, revision and subfolder


def test_bases_come_from_the_cache_by_id_revision_and_subfolder(here: Path) -> None:
    cache = here / "cache"
    hub_cache.add_repository(cache, "org/model", here / "base")
    hub_cache.add_repository(cache, "org/model", here / "other", revision="v2")
    hub_cache.add_repository(cache, "org/many", here / "other", subfolder="small")
    assert (find_base("org/model") / "config.json").is_file()
    assert find_base("org/model@v2") != find_base("org/model")
    assert find_base("org/many/small").name == "small"
    source = locate_base("org/many/small@main")
    assert source.loading_options == {
        "local_files_only": True,
        "trust_remote_code": False,
        "revision": "main",
        "subfolder": "small",
    }
    with pytest.raises(BaseModelError, match="not in the local cache, and HF_HUB_OFFLINE is set"):
        locate_base("org/model@v3")


def test_a_revision_and_a_subfolder_are_loaded(here: Path) -> None:
    cache = here / "cache"
    hub_cache.add_repository(cache, "org/model", here / "base")
    hub_cache.add_repository(cache, "org/model", here / "other", revision="v2")
    hub_cache.add_repository(cache, "org/many", here / "other", subfolder="small")
    code = """if True:
        import lora_kit as lk
        for name in ("org/model", "org/model@v2", "org/many/small@main"):
            base = lk.load_base(name)
            print(base.name, base.model.lm_head.weight.sum().item())
    """
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    one, two = (tiny.llama(seed=seed).lm_head.weight.sum().item() for seed in (0, 1))
    assert printed.stdout.split() == ["org/model", str(one), "org/model@v2", str(two), "org/many/small@main", str(two)]


def test_a_folder_of_several_bases_names_them(here: Path) -> None:
    for read in (locate_base, find_base):
        with pytest.raises(BaseModelError, match=r"no config\.json in this folder .*/base, .*/other"):
            read(here)


def test_a_revision_is_written_as_peft_writes_it(here: Path) -> None:
    folder = save_adapter("pinned", base="org/base@v1")
    config = json.loads((folder / CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "v1")


def test_one_set_of_allowances_on_every_verb(here: Path, capsys: Capture) -> None:
    folder = folders.adapter().save(here / "adapters" / "changed")
    config = folder / CONFIG
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 4'))
    assert '"lora_alpha": 4' in config.read_text()
    for arguments in (
        ["inspect", "changed"],
        ["compare", "changed", "changed"],
        ["resize", "changed", "--rank", "2", "--out", "small"],
        ["combine", "-a", "changed", "--weight", "1", "--out", "mixed"],
        ["check", "changed", "--target", "peft"],
        ["export", "changed", "--target", "peft", "--out", "out"],
        ["merge", "-a", "changed", "--base", "base", "--out", "merged"],
        ["generate", "-a", "changed", "--base", "base", "--prompt", "abc", "--max-new-tokens", "1"],
    ):
        code, _, err = run(capsys, *arguments)
        assert (code, "was changed since it was saved" in err) == (2, True), err
        code, _, err = run(capsys, *arguments, "--allow", "changed-files")
        assert "was changed since it was saved" not in err


def test_a_branch_of_the_hub_is_said_with_its_commit_and_a_commit_is_not(
    here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    commit = hub_cache.add_repository(here / "cache", "org/model", here / "base")
    hub_cache.add_repository(here / "cache", "org/many", here / "base", subfolder="small")
    for name in (f"org/model@{commit}", "kit-base", here / "base", "nobody/nothing"):
        warn_of_floating_revision(name)
    assert not caplog.records
    warn_of_floating_revision("org/model")
    assert caplog.messages == [f"org/model may be another model tomorrow; what was read now is org/model@{commit}"]
    warn_of_floating_revision("org/many/small@main")
    assert caplog.messages[1].startswith("org/many/small@main may be another")
    find_base(caplog.messages[0].rpartition(" ")[2])


@pytest.mark.parametrize("verb", ["merge", "train"])
def test_what_is_made_from_a_branch_says_so_on_the_command_line(
    here: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub_cache.add_repository(here / "cache", "org/model", here / "base")
    texts.write(here / "rows.jsonl", PAIRS)
    recipe = {"base": "org/model", "data": "rows.jsonl", "out": "adapters/new", "train": {"max_steps": 1}}
    (here / "recipe.yaml").write_text(json.dumps(recipe))
    command = {
        "merge": ["merge", "--base", "org/model", "--adapter", "sql", "--out", "merged", "--allow", "other-base"],
        "train": ["train", "recipe.yaml"],
    }[verb]
    assert main(command) == 0
    assert capsys.readouterr().err.count("warning: org/model may be another model tomorrow") == 1
