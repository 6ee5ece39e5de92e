"""Whole models for llama.cpp and Ollama: merged, then converted by llama.cpp's own converter where the user has it.

`LORA_KIT_LLAMA_CPP` names the folder of llama.cpp, or `convert_hf_to_gguf.py` is on the path. Where it is not, the
merged model is written, and the README has the command that converts it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from shlex import quote
from typing import Final

from lora_kit.errors import ExportError
from lora_kit.exporters.llama_cpp import KIT_BASE_NOTE
from lora_kit.exporters.modelfile import (
    GGUF_MODEL,
    MODELFILE,
    PROMPT_NOTE,
    find_style,
    format_modelfile,
    make_ollama_name,
)
from lora_kit.exporters.plain_lora import ExportCase
from lora_kit.io.text import escape_text, shorten
from lora_kit.io.write_errors import find_quoted_write_error
from lora_kit.names import KIT_BASE

CONVERTER: Final = "convert_hf_to_gguf.py"
CONVERTER_VARIABLE: Final = "LORA_KIT_LLAMA_CPP"
"""Variable of the environment with the folder of llama.cpp."""
_MERGED: Final = "merged"
_MISSING_PACKAGE: Final = re.compile(r"No module named '(\w+)")


def find_converter() -> Path | None:
    """Return llama.cpp's converter of models; None where it is not here.

    Raises:
        ExportError: the folder that the environment names does not have it.
    """
    folder = os.environ.get(CONVERTER_VARIABLE)
    if folder:
        if not Path(folder, CONVERTER).is_file():
            raise ExportError(f"{escape_text(folder)} has no {CONVERTER}", hint=f"{CONVERTER_VARIABLE} names llama.cpp")
        return Path(folder, CONVERTER)
    found = shutil.which(CONVERTER)
    return Path(found) if found else None


def write_gguf_model(case: ExportCase, folder: Path) -> None:
    """Merge the adapter, and convert the model; without a converter the merged model stays, to be converted."""
    _merge(case, folder)
    _convert_merged(folder)


def write_ollama_model(case: ExportCase, folder: Path) -> None:
    """Write the same, and a Modelfile with the prompt format of the adapter's training, else of the model."""
    _merge(case, folder)
    (folder / MODELFILE).write_text(format_modelfile(find_style(case, folder / _MERGED)), "utf-8")
    _convert_merged(folder)


def _merge(case: ExportCase, folder: Path) -> None:
    from lora_kit.merging.merge import merge  # here, since exports of adapters do without

    converter = find_converter()
    if converter is not None:
        _run(converter, "--help")  # so that what it lacks is known before the work, not after it
    merge(case.require_base(), case.adapter, folder / _MERGED, allow=case.allow)


def _convert_merged(folder: Path) -> None:
    """Replace the merged model by its GGUF file where a converter is here."""
    converter = find_converter()
    if converter is not None:
        _convert(converter, folder / _MERGED, folder / GGUF_MODEL)
        shutil.rmtree(folder / _MERGED)


def _convert(converter: Path, model: Path, file: Path) -> None:
    """Write the GGUF file of a model."""
    last = _run(converter, str(model), "--outfile", str(file))
    if not file.is_file():
        raise _converter_error(f"wrote no {file.name}", last)


def _run(converter: Path, *arguments: str) -> str:
    """Run llama.cpp's converter, and return the last line that it printed.

    Raises:
        ExportError: it fails.
        OSError: the disk does.
    """
    command = [sys.executable, str(converter), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    last = " ".join((done.stderr or done.stdout).strip().splitlines()[-1:])
    if done.returncode:
        failed = find_quoted_write_error(last)
        if failed is not None:
            raise failed
        raise _converter_error(f"ended with {done.returncode}", last)
    return last


def _converter_error(what: str, last: str) -> ExportError:
    hint = f"without {CONVERTER_VARIABLE} the merged model is written, with the command that converts it"
    if missing := _MISSING_PACKAGE.search(last):
        hint = f"pip install {missing[1]} beside lora_kit, where the converter runs; {hint}"
    return ExportError(f"llama.cpp's converter {what}: {shorten(last)}", hint=hint)


def format_gguf_command(case: ExportCase) -> str:
    """Return the command that loads it, in Markdown."""
    model = quote(f"{case.folder}/{GGUF_MODEL}")
    return _format_commands(case, f"llama-server -m {model}")


def format_ollama_command(case: ExportCase) -> str:
    """Return the command that loads it, in Markdown."""
    name = make_ollama_name(case.name)
    run = f"cd {quote(case.folder)} && ollama create {name} -f {MODELFILE} && ollama run {name}"
    return f"{_format_commands(case, run)}\n\n{PROMPT_NOTE}"


def _format_commands(case: ExportCase, run: str) -> str:
    if find_converter() is not None:
        return f"```sh\n{run}\n```"
    merged, model = (quote(f"{case.folder}/{name}") for name in (_MERGED, GGUF_MODEL))
    note = KIT_BASE_NOTE if case.base == KIT_BASE else ""
    convert = f"python llama.cpp/{CONVERTER} {merged} --outfile {model}"
    return f"```sh\n{convert}\n{run}\n```\nThe first command is llama.cpp's.{note}"
