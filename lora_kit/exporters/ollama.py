"""Ollama: llama.cpp's adapter file and a Modelfile.

`FROM` the base, `ADAPTER` the file (https://docs.ollama.com/modelfile). Its own engine, which it uses for newer
architectures, has no LoRA ("loras are not yet implemented", runner/ollamarunner/runner.go; the list of them is
`OllamaEngineRequired` in fs/ggml/ggml.go), and versions from 0.34.1 on create no model from an adapter
(https://github.com/ollama/ollama/pull/14969).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Final

from lora_kit.exporters import llama_cpp
from lora_kit.exporters.modelfile import MODELFILE, PROMPT_NOTE, find_style, format_modelfile, make_ollama_name
from lora_kit.exporters.plain_lora import ExportCase
from lora_kit.models.locate import find_base

_OWN_ENGINE_ARCHITECTURES: Final = ("gemma3", "qwen3")
_LAST_VERSION: Final = "0.34.0"


def find_unsupported(case: ExportCase) -> Iterator[str]:
    """Yield what Ollama cannot load."""
    yield from llama_cpp.find_unsupported(case)
    architecture = llama_cpp.architecture_of(case.require_config("Ollama has LoRA for some architectures only"))
    if architecture is not None and architecture.name in _OWN_ENGINE_ARCHITECTURES:
        yield f"the base is a {architecture.name}, for which Ollama's own engine has no LoRA; merge it instead"


def write(case: ExportCase, folder: Path) -> None:
    """Write the GGUF file and a Modelfile."""
    llama_cpp.write(case, folder)
    assert case.base is not None  # its config was read
    base = find_base(case.base).resolve()
    sources = [f"FROM {base}", f"ADAPTER ./{llama_cpp.GGUF_FILE}"]
    (folder / MODELFILE).write_text(format_modelfile(find_style(case, base), sources=sources), "utf-8")


def list_requirements(case: ExportCase) -> list[str]:
    """Return what loading it needs."""
    return [f"Ollama up to {_LAST_VERSION}: later ones create no model from an adapter"]


def format_command(case: ExportCase) -> str:
    """Return the command that loads it, in Markdown."""
    name = make_ollama_name(case.name)
    return f"""```sh
cd {quote(case.folder)} && ollama create {name} -f {MODELFILE} && ollama run {name}
```
This needs Ollama up to {_LAST_VERSION}: later ones create no model from an adapter. There, merge the adapter, convert
the model with llama.cpp's `convert_hf_to_gguf.py`, and let `FROM` name that file.

`FROM` is the base's folder, which Ollama converts; its own name for the same base does as well.

{PROMPT_NOTE}"""
