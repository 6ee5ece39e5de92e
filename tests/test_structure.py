"""The shape of the package: which room may import which, what a bare import costs, and what is public."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

import lora_kit
from tools import structure
from tools.structure import PACKAGE, ROOMS, ROOT, Finding

SOURCES = [file for file in structure.source_files() if file != PACKAGE / "__init__.py"]
# `python -m tools.structure` prints more than what is asserted here.
MUST_FIND_NOTHING = (
    structure.repeated_file_names,
    structure.repeated_class_names,
    structure.participle_names,
    structure.upward_imports,
    structure.imports_between_tests,
    structure.glossary_words,
    structure.glossary_words_in_documents,
    structure.long_functions,
    structure.long_files,
)
BASE = PACKAGE / "models" / "kit_base"
HEAVY = {"transformers", "peft", "datasets", "matplotlib", "accelerate", "bitsandbytes", "pandas"}
TOP_LEVEL = {
    "tools",
    "pyproject.toml",
    "constraints.txt",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "SECURITY.md",
    "CITATION.cff",
    "Makefile",
    "mkdocs.yml",
    "lora_kit",
    "examples",
    "adapters",
    "tests",
    "benchmarks",
    "docs",
}


def python(code: str) -> str:
    """What a fresh interpreter prints for `code`."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


@pytest.mark.parametrize("find", MUST_FIND_NOTHING, ids=lambda find: find.__name__)
def test_the_tree_has_no_such_place(find: Callable[[], list[Finding]]) -> None:
    places = "\n".join(f"{finding.place}: {finding.what}" for finding in find())
    assert not places, f"{find.__doc__}\n{places}"


def test_every_room_has_its_place_in_the_order_of_imports() -> None:
    missing = {structure.room_of(file) for file in SOURCES} - set(ROOMS)
    assert not missing, f"give {missing} a place in tools/structure.py and in docs/architecture.md"


def test_every_room_is_described() -> None:
    described = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    missing = [room for room in {structure.room_of(file) for file in SOURCES} if f"`{room}" not in described]
    assert not missing, f"docs/architecture.md does not say what lives in {missing}"


def test_tests_that_the_documents_point_to_exist() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md"]
    named = {name for page in pages for name in re.findall(r"[\w/]*\btest_\w+\.py", page.read_text(encoding="utf-8"))}
    assert named
    assert not [name for name in sorted(named) if not (ROOT / "tests" / name.removeprefix("tests/")).is_file()]


def test_config_reads_without_torch() -> None:
    allowed = {"__future__", "lora_kit", "regex", *sys.stdlib_module_names}
    assert {
        name.split(".")[0]
        for name in {name for file in (PACKAGE / "config").glob("*.py") for name in structure.imported_modules(file)}
    } <= allowed
    assert (
        json.loads(python("import json, sys, lora_kit.config.lora_config; print(json.dumps('torch' in sys.modules))"))
        is False
    )


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = set(json.loads(python("import json, sys, lora_kit; print(json.dumps(list(sys.modules)))")))
    assert not HEAVY & loaded


def test_the_command_line_starts_without_torch() -> None:
    loaded = set(json.loads(python("import json, sys, lora_kit.cli; print(json.dumps(list(sys.modules)))")))
    assert not (HEAVY | {"torch"}) & loaded


def test_using_a_bank_needs_neither_transformers_nor_the_compiler() -> None:
    code = "import json, sys; from lora_kit import attach, Adapter; print(json.dumps(list(sys.modules)))"
    assert not (HEAVY | {"torch._dynamo"}) & set(json.loads(python(code)))  # the compiler doubles the time of torch


def test_all_is_exact() -> None:
    names = lora_kit.__all__
    assert len(names) == len(set(names))
    assert not [name for name in names if not hasattr(lora_kit, name)]
    # Rooms that were imported are attributes of a package by Python's own rule; nothing else may be.
    public = {name for name in vars(lora_kit) if not name.startswith("_")}
    others = {name for name in public - set(names) if not isinstance(vars(lora_kit)[name], ModuleType)}
    assert not others - {"annotations", "TYPE_CHECKING", "Any"}, f"public but not in __all__: {sorted(others)}"


def test_dir_lists_what_is_public() -> None:
    assert set(lora_kit.__all__) <= set(dir(lora_kit))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="atach"):
        _ = lora_kit.atach


def test_the_top_level_is_as_fixed() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.splitlines()
    assert {line.split("/")[0] for line in listed if not line.startswith(".")} == TOP_LEVEL


def test_the_base_model_is_part_of_the_package() -> None:
    files = {path.name for path in BASE.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
    assert (BASE / "model.safetensors").stat().st_size < 24_000_000
