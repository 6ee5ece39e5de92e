"""`export` and `check`: what each program can read, and the folder that is written for it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.adapter_like import AdapterLike
from lora_kit.adapter.adapter_location import resolve_adapter
from lora_kit.adapter.folder import ALLOWANCES
from lora_kit.adapter.model_card import escape_markdown, format_inline_code, format_table, render_card
from lora_kit.adapter.store import to_json_value
from lora_kit.algebra.sources import SourceAdapter
from lora_kit.errors import ConfigError, ExportError, format_list, suggest_nearest
from lora_kit.exporters import servers
from lora_kit.exporters.export_targets import ADAPTER_TARGETS, MERGED, ExportTarget
from lora_kit.exporters.plain_lora import ExportCase
from lora_kit.generation.prompts import find_separator
from lora_kit.io.atomic_write import check_output, stage_folder
from lora_kit.io.given_values import parse_path
from lora_kit.io.output_overlap import refuse_overlap
from lora_kit.io.portable_paths import make_folder_portable
from lora_kit.models.infer_base import NamedBase
from lora_kit.names import CHAT_TEMPLATE_FILE

RECORD: Final = "lora_kit_export.json"
CARD: Final = "README.md"


_WHOLE_MODELS: Final = (MERGED, *(name for name, target in ADAPTER_TARGETS.items() if target.whole))
TARGETS: Final = (*ADAPTER_TARGETS, MERGED)


@dataclass(frozen=True)
class Verdict:
    """Whether a program can read an adapter.

    Attributes:
        target: one of `TARGETS`.
        reader: name of the program.
        refused: what it cannot read, each naming the field; empty where it can read all.
        changed: what exporting changes, while the updates stay the same.
        needed: what the program must be started with.
    """

    target: str
    reader: str
    refused: tuple[str, ...]
    changed: tuple[str, ...]
    needed: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        fields: dict[str, object] = to_json_value(self)
        return fields

    def demand(self) -> None:
        """Raise ExportError unless the program can read the adapter."""
        if self.refused:
            message = "\n  ".join([f"{self.reader} cannot read this adapter:", *self.refused])
            raise ExportError(message, hint=f"target {MERGED!r} writes a whole model")


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        out: the folder.
        target: one of `TARGETS`.
        changed: what was changed of the adapter.
        bytes: size of the folder.
        commands: that load it, for a shell; empty where a program of Python does.
    """

    out: Path
    target: str
    changed: tuple[str, ...]
    bytes: int
    commands: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        fields: dict[str, object] = to_json_value(self)
        return fields


def check(
    adapter: AdapterLike,
    target: str,
    *,
    base: str | Path | None = None,
    max_lora_rank: int | None = None,
    allow: Collection[str] = (),
) -> Verdict:
    """Return whether a program can read an adapter, and what exporting would change.

    Args:
        adapter: a folder, a name in the store, a hub id or an Adapter.
        target: one of `TARGETS`.
        base: hub id, local folder or `kit-base`; None for the one that the adapter names, where it is here. If the base
            is known, the adapter must match a model of its config.
        max_lora_rank: that the program is started with.
        allow: what `Adapter.load` allows.

    Raises:
        ConfigError: the target is unknown.
        ExportError: the base is needed and not given.
        BaseModelError: its config cannot be read.
        AdapterError, UnknownAdapterError: the adapter does not match it, cannot be read, or is not there.
    """
    return _judge_case(_build_case(SourceAdapter.of(adapter, allow=allow), base), target, max_lora_rank, allow)


def export(
    adapter: AdapterLike,
    target: str,
    out: str | Path,
    *,
    base: str | Path | None = None,
    max_lora_rank: int | None = None,
    replace: bool = False,
    allow: Collection[str] = (),
) -> Export:
    """Write an adapter for another program, with the same updates there as here.

    Fields that programs ignore are folded in: rank-stabilized scaling and alpha patterns into B, smaller ranks padded
    to the largest. What a program cannot read is an error that names the field. The folder's README has the command
    that loads it.

    Args:
        adapter: a folder, a name in the store, a hub id or an Adapter.
        target: `peft`, `vllm`, `sglang`, `tgi`, `gguf`, `ollama`, `mlx`; or a whole model: `merged` (`lk.merge`),
            `gguf-model`, `ollama-model`.
        out: the folder to write.
        base: hub id, local folder or `kit-base`, needed by `gguf`, `ollama` and whole models; None for the one that the
            adapter names, where it is here.
        max_lora_rank: that the program is started with; a larger rank is an error.
        replace: whether an earlier export in `out` may be replaced; anything else there never is.
        allow: what `Adapter.load` allows; for whole models, what `merge` allows.

    Raises:
        ExportError: the program cannot read it (the message lists every reason), or the output overlaps an input.
        ConfigError, BaseModelError, AdapterError, UnknownAdapterError: as in `check`.
        StorageError: the output exists, or it cannot be written.

    Example:
        lk.export("adapters/sql", "vllm", "out/sql", max_lora_rank=16)
    """
    _check_target(target)
    out = parse_path(out, name="out")
    if not isinstance(adapter, Adapter):
        adapter = resolve_adapter(adapter).folder
        refuse_overlap(out, [adapter, *([base] if base else [])], error=ExportError)
    loading = [name for name in allow if name in ALLOWANCES] if target in _WHOLE_MODELS else allow
    source = SourceAdapter.of(adapter, allow=loading)
    case = dataclasses.replace(_build_case(source, base), out=Path(os.path.abspath(out)), allow=tuple(allow))
    if target == MERGED:
        return _export_merged(case, out, replace=replace, allow=allow)
    check_output(out, replace=replace, owned=is_export)
    verdict = _judge_case(case, target, max_lora_rank, allow)
    verdict.demand()
    with stage_folder(out, replace=replace, owned=is_export, needed=2 * source.adapter.nbytes) as folder:
        _write_files(case, ADAPTER_TARGETS[target], folder)
        (folder / CARD).write_text(_format_card(case, verdict), "utf-8")
        record = {
            "adapter": source.adapter.digest,
            "base": case.base and make_folder_portable(case.base),
            "changed": verdict.changed,
            "target": target,
        }
        (folder / RECORD).write_text(f"{json.dumps(record, indent=2)}\n", "utf-8")
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Export(out, target, verdict.changed, size, _list_shell_commands(ADAPTER_TARGETS[target].command(case)))


def _write_files(case: ExportCase, goal: ExportTarget, folder: Path) -> None:
    goal.write(case, folder)
    if case.chat_template is not None and goal.prompts != "files":
        (folder / CHAT_TEMPLATE_FILE).write_text(case.chat_template, "utf-8")


def is_export(folder: Path) -> bool:
    """Whether a folder was written by an export, so that another export may replace it."""
    return (folder / RECORD).is_file()


def _check_target(target: str) -> None:
    if target not in TARGETS:
        raise ConfigError(
            f"target {target!r} is not known", hint=suggest_nearest(target, TARGETS) or format_list(TARGETS)
        )


def _build_case(source: SourceAdapter, base: str | Path | None) -> ExportCase:
    if base is not None:
        return ExportCase(source.name, source.adapter, str(base), known=True)
    named = NamedBase.of(source.adapter.config, source.adapter.base)
    return ExportCase(source.name, source.adapter, named.name, known=named.problem is None)


def _judge_case(case: ExportCase, target: str, limit: int | None, allow: Collection[str]) -> Verdict:
    _check_target(target)
    if target == MERGED:
        return Verdict(MERGED, "any reader", (), (), ("the base, to merge into",))
    program, config = ADAPTER_TARGETS[target], case.adapter.config
    unlike_layers = tuple(servers.find_unlike_layers(case)) if program.plain else ()
    if unlike_layers:
        return Verdict(target, program.reader, unlike_layers, (), ())
    if program.plain:
        case.check_base(allow)
    unsupported = [] if program.dora else list(servers.find_dora(case))
    unsupported += servers.find_unsupported_by_all(case) if program.plain else ()
    unsupported += program.find_unsupported(case)
    if program.whole:
        return Verdict(target, program.reader, (), (), ("the base, to merge into", *_list_window_limits(case, program)))
    rank = case.plain.rank if program.plain else config.largest_rank
    if limit is not None and rank > limit:
        unsupported.append(f"r: rank {rank} is above max_lora_rank {limit}; resize it to {limit}")
    changed = case.plain.changes if program.plain else ()
    needed = (*program.needs(case), *_list_window_limits(case, program))
    return Verdict(target, program.reader, tuple(unsupported), changed, needed)


def _list_window_limits(case: ExportCase, program: ExportTarget) -> list[str]:
    """Return how long texts may be where a program passes over the base's sliding window."""
    config = case.base_config if program.unwindowed else None
    window = (config or {}).get("sliding_window")
    if config is None or not window or config.get("model_type") not in program.unwindowed:
        return []
    return [
        f"texts of at most {window:,} tokens, for the same outputs as here: of a longer one {program.reader} attends "
        f"to all, this base to the last {window:,} tokens alone"
    ]


def _export_merged(case: ExportCase, out: Path, *, replace: bool, allow: Collection[str]) -> Export:
    """Write a whole model, by `merge`."""
    from lora_kit.merging.merge import merge  # here, since exports of adapters do without

    report = merge(case.require_base(), case.adapter, out, replace=replace, allow=allow)
    return Export(out, MERGED, (), report.bytes)


def _list_shell_commands(markdown: str) -> tuple[str, ...]:
    """Return the lines of the first block of shell commands."""
    block = re.search(r"^```sh\n(.*?)\n```$", markdown, re.DOTALL | re.MULTILINE)
    return tuple(block[1].split("\n")) if block else ()


def _format_card(case: ExportCase, verdict: Verdict) -> str:
    goal = ADAPTER_TARGETS[verdict.target]
    rows = [("base", make_folder_portable(case.base) if case.base else "unknown"), ("adapter", case.adapter.digest)]
    if goal.plain:
        rows.append(("rank, alpha", f"{case.plain.rank}, {case.plain.alpha}"))
    changes = ["Exported by lora_kit; the updates are the adapter's own."]
    if verdict.changed:
        changes[0] += " This reader would pass over some of its fields, which were rewritten:"
        changes.append("\n".join(f"- {escape_markdown(change)}" for change in verdict.changed))
    return render_card(
        f"{case.name} for {goal.reader}",
        goal.command(case),
        *_describe_prompts(case, goal),
        *(f"It needs {limit}." for limit in _list_window_limits(case, goal)),
        format_table(rows),
        *changes,
    )


def _describe_prompts(case: ExportCase, goal: ExportTarget) -> Iterator[str]:
    """Yield what whoever asks the adapter there has to know of the prompts of its training, in Markdown."""
    separator = find_separator(case.adapter)
    if case.chat_template is not None and goal.prompts != "files":
        given = "The command above gives it to the server."
        if goal.prompts == "user":
            given = "Give conversations in it: the base's own, which is used otherwise, is another one."
        yield f"{format_inline_code(CHAT_TEMPLATE_FILE)} is the chat template that it was trained with. {given}"
    elif case.chat_template is None and separator and goal.prompts != "files":
        yield f"In its training {format_inline_code(json.dumps(separator))} followed each prompt: end prompts so."
