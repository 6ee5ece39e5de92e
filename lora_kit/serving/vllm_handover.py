"""`write_vllm_handover`: the adapters of a server, the command that lets vLLM serve them, and their chat template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Final

from lora_kit.adapter.adapter import Adapter
from lora_kit.errors import ConfigError, ExportError
from lora_kit.exporters.export import export
from lora_kit.exporters.servers import choose_vllm_rank, format_vllm_module
from lora_kit.generation.prompts import find_template
from lora_kit.io.atomic_write import stage_folder
from lora_kit.io.text import escape_text
from lora_kit.models.locate import find_local_folder
from lora_kit.serving.adapter_labels import AdapterLabels, list_adapter_folders, set_aliases
from lora_kit.serving.adapter_tasks import describe_not_offered
from lora_kit.serving.open_base import choose_task
from lora_kit.serving.server_settings import ServerSettings
from lora_kit.torch_utils import parse_float_dtype

LAUNCH: Final = "launch.sh"
TEMPLATE: Final = "chat_template.jinja"
_ADAPTERS: Final = "adapters"
_TEMPLATES: Final = "templates"


def write_vllm_handover(settings: ServerSettings, out: Path) -> list[str]:
    """Write a folder from which vLLM serves what this server does, all of it or nothing.

    vLLM gets one slot more than there are adapters: with as many it was seen to answer requests to the base with an
    adapter.

    Returns:
        What has to be known of the hand-over, a sentence each.

    Raises:
        ConfigError: the store has no adapter.
        ExportError: vLLM cannot read an adapter; the message lists every one.
        StorageError: the folder exists, or cannot be written.
    """
    base_name = Path(settings.base).name or settings.base
    task = choose_task(settings, list_adapter_folders(settings.store))
    labels = AdapterLabels(settings.store, base_name=base_name, task=task, state_file=settings.state)
    set_aliases(settings.aliases, labels)
    adapters = {name: labels.resolve(name) for name in labels.list_store()}
    if not adapters:
        raise ConfigError(f"{escape_text(settings.store)} has no adapter to hand over")
    targets = {label: labels.target_of(label) for label in labels.names()}
    templates = {name: template.text for name, own in adapters.items() if (template := find_template(own)) is not None}
    with stage_folder(out, needed=2 * sum(adapter.nbytes for adapter in adapters.values())) as folder:
        _export_all(adapters, settings, folder / _ADAPTERS)
        is_common = len(set(templates.values())) == 1 and len(templates) == len(adapters)
        if is_common:
            (folder / TEMPLATE).write_text(next(iter(templates.values())), "utf-8")
        for name, text in () if is_common else templates.items():
            (folder / _TEMPLATES).mkdir(exist_ok=True)
            (folder / _TEMPLATES / f"{name}.jinja").write_text(text, "utf-8")
        command = _format_launch(settings, base_name, adapters, targets, has_template=is_common)
        (folder / LAUNCH).write_text(command, "utf-8")
        (folder / LAUNCH).chmod(0o755)
    not_offered = [f"not offered: {line}" for line in describe_not_offered(labels.list_not_offered())]
    return [*not_offered, *_list_notes(templates, is_common=is_common, count=len(adapters))]


def _export_all(adapters: Mapping[str, Adapter], settings: ServerSettings, folder: Path) -> None:
    problems = []
    for name, adapter in adapters.items():
        try:
            export(adapter, "vllm", folder / name, base=settings.base)
        except ExportError as error:
            problems.append(f"{name}: {error.message}")
    if problems:
        raise ExportError(
            "\n  ".join(["vLLM cannot read these adapters", *problems]), hint="merge them, or move them out"
        )


def _format_launch(
    settings: ServerSettings,
    base_name: str,
    adapters: Mapping[str, Adapter],
    targets: Mapping[str, str],
    *,
    has_template: bool,
) -> str:
    folder = find_local_folder(settings.base)
    rank = choose_vllm_rank(max(adapter.config.largest_rank for adapter in adapters.values()))
    modules = [format_vllm_module(label, f"{_ADAPTERS}/{name}") for label, name in targets.items()]
    flags = [
        f"--served-model-name {quote(base_name)}",
        f"--host {quote(settings.host)} --port {settings.port}",
        f"--enable-lora --max-loras {len(adapters) + 1} --max-lora-rank {rank}",
        *([] if settings.context is None else [f"--max-model-len {settings.context}"]),
        *([] if settings.dtype == "auto" else [f"--dtype {str(parse_float_dtype(settings.dtype)).rpartition('.')[2]}"]),
        *([f"--chat-template {TEMPLATE}"] if has_template else []),
        f"--lora-modules {' '.join(modules)}",
    ]
    base = quote(settings.base if folder is None else str(folder.resolve()))
    lines = [f"exec vllm serve {base}", *(f"  {flag}" for flag in flags)]
    return "\n".join(["#!/bin/sh", 'cd "$(dirname "$0")" || exit 1', " \\\n".join(lines), ""])


def _list_notes(templates: Mapping[str, str], *, is_common: bool, count: int) -> list[str]:
    notes = [f"{count} adapters, {count + 1} slots: with as many slots as adapters vLLM answered the base wrongly"]
    if templates and not is_common:
        notes.append(
            f"vLLM has one chat template for all: those of {', '.join(sorted(templates))} are in {_TEMPLATES}/"
        )
    return [*notes, "`lora-kit parity URL` compares its answers with ours, alone and mixed"]
