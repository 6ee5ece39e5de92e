"""The server stands on public pieces of transformers alone: private ones change from release to release."""

from __future__ import annotations

import ast
from pathlib import Path

import lora_kit.serving

FILES = sorted(Path(lora_kit.serving.__file__).parent.glob("*.py"))
PUBLIC = "transformers"


def list_private_imports(source: str) -> list[str]:
    """The imports from transformers of a file that are not from its top, or of a private name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PUBLIC:
            names = [alias.name for alias in node.names if alias.name.startswith("_")]
            found += [node.module or ""] if node.module != PUBLIC else names
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found += [name for name in names if name.partition(".")[0] == PUBLIC and name != PUBLIC]
    return found


def test_the_server_imports_no_private_module_of_transformers() -> None:
    assert len(FILES) > 20
    assert not {file.name: found for file in FILES if (found := list_private_imports(file.read_text("utf-8")))}


def test_private_imports_would_be_found() -> None:
    for line in (
        "from transformers.generation.continuous_batching import cache",
        "import transformers.cache_utils",
        "from transformers import _private",
    ):
        assert list_private_imports(line)
    assert not list_private_imports("from transformers import AttentionInterface\nimport transformers")
