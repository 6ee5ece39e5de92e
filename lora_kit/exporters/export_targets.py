"""The programs that adapters are exported for, and what each is given."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from lora_kit.exporters import llama_cpp, mlx, ollama, servers, whole_model
from lora_kit.exporters.plain_lora import ExportCase


@dataclass(frozen=True)
class ExportTarget:
    """A program that reads adapters.

    Attributes:
        reader: its name.
        find_unsupported: yields what it cannot read of an adapter, each naming the field.
        write: writes its files into a folder.
        command: returns how they are loaded, in Markdown.
        plain: whether it needs a `PlainLora`: one rank, one scaling, LoRA weights only.
        dora: whether it reads a DoRA's magnitudes.
        needs: returns what it must be started with.
        whole: whether it is given a whole model, into which the adapter is merged.
        prompts: what becomes of the prompt format of the training: `command`, where the command gives a chat template;
            `files`, where the files have it; `user`, who has to see to it.
        unwindowed: types of models whose sliding windows it passes over: every token there attends to all before it.
    """

    reader: str
    find_unsupported: Callable[[ExportCase], Iterator[str]]
    write: Callable[[ExportCase, Path], None]
    command: Callable[[ExportCase], str]
    plain: bool = True
    dora: bool = False
    needs: Callable[[ExportCase], list[str]] = lambda case: []
    whole: bool = False
    prompts: Literal["command", "files", "user"] = "user"
    unwindowed: Collection[str] = ()


def _accept_all(case: ExportCase) -> Iterator[str]:
    return iter(())


_UNWINDOWED: Final = ("mistral", "phi3", "qwen2", "qwen3")
"""Seen in llama.cpp 0.5.0 and mlx-lm 0.32.2: only beyond the window do their logits differ from ours."""
ADAPTER_TARGETS: Final = {
    "peft": ExportTarget("PEFT", _accept_all, servers.write_peft, servers.format_peft_command, plain=False, dora=True),
    "vllm": ExportTarget(
        "vLLM",
        servers.find_unsupported_by_vllm,
        servers.write_plain,
        servers.format_vllm_command,
        needs=servers.list_vllm_requirements,
        prompts="command",
    ),
    "sglang": ExportTarget(
        "SGLang",
        servers.find_unsupported_by_sglang,
        servers.write_plain,
        servers.format_sglang_command,
        prompts="command",
    ),
    "tgi": ExportTarget(
        "Text Generation Inference", servers.find_unsupported_by_tgi, servers.write_plain, servers.format_tgi_command
    ),
    "gguf": ExportTarget(
        "llama.cpp",
        llama_cpp.find_unsupported,
        llama_cpp.write,
        llama_cpp.format_command,
        prompts="command",
        unwindowed=_UNWINDOWED,
    ),
    "ollama": ExportTarget(
        "Ollama",
        ollama.find_unsupported,
        ollama.write,
        ollama.format_command,
        needs=ollama.list_requirements,
        prompts="files",
        unwindowed=_UNWINDOWED,
    ),
    "mlx": ExportTarget(
        "mlx-lm",
        mlx.find_unsupported,
        mlx.write,
        mlx.format_command,
        dora=True,
        unwindowed=(*_UNWINDOWED, "gemma2"),
    ),
    "gguf-model": ExportTarget(
        "llama.cpp",
        _accept_all,
        whole_model.write_gguf_model,
        whole_model.format_gguf_command,
        plain=False,
        dora=True,
        whole=True,
        prompts="files",
        unwindowed=_UNWINDOWED,
    ),
    "ollama-model": ExportTarget(
        "Ollama",
        _accept_all,
        whole_model.write_ollama_model,
        whole_model.format_ollama_command,
        plain=False,
        dora=True,
        whole=True,
        prompts="files",
        unwindowed=_UNWINDOWED,
    ),
}
"""By name; `MERGED` is beside them."""
MERGED: Final = "merged"
