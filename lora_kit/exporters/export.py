"""`export` and `check`: what each program can read, and the folder that is written for it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.adapter_like import AdapterLike
from lora_kit.adapter.adapter_location import resolve_adapter
from lora_kit.adapter.folder import ALLOWANCES
from lora_kit.adapter.model_card import escape_markdown, format_table, render_card
from lora_kit.adapter.store import to_json_value
from lora_kit.algebra.sources import SourceAdapter
from lora_kit.errors import ConfigError, ExportError, format_list, suggest_nearest
from lora_kit.exporters import llama_cpp, mlx, ollama, servers, whole_model
from lora_kit.exporters.plain_lora import ExportCase
from lora_kit.io.atomic_write import check_output, stage_folder
from lora_kit.io.given_values import parse_path
from lora_kit.io.output_overlap import OTHER_OUTPUT, reason_overlap
from lora_kit.io.output_path import check_path
from lora_kit.io.portable_paths import make_folder_portable
from lora_kit.merging.merge import merge
from lora_kit.models.infer_base import NamedBase

RECORD: Final = "lora_kit_export.json"
CARD: Final = "README.md"
MERGED: Final = "merged"


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
    """

    reader: str
    find_unsupported: Callable[[ExportCase], Iterator[str]]
    write: Callable[[ExportCase, Path], None]
    command: Callable[[ExportCase], str]
    plain: bool = True
    dora: bool = False
    needs: Callable[[ExportCase], list[str]] = lambda case: []
    whole: bool = False


def _accept_all(case: ExportCase) -> Iterator[str]:
    return iter(())


_TARGETS: Final = {
    "peft": ExportTarget("PEFT", _accept_all, servers.write_peft, servers.format_peft_command, plain=False, dora=True),
    "vllm": ExportTarget(
        "vLLM",
        servers.find_unsupported_by_vllm,
        servers.write_plain,
        servers.format_vllm_command,
        needs=servers.list_vllm_requirements,
    ),
    "sglang": ExportTarget(
        "SGLang", servers.find_unsupported_by_sglang, servers.write_plain, servers.format_sglang_command
    ),
    "tgi": ExportTarget(
        "Text Generation Inference", servers.find_unsupported_by_tgi, servers.write_plain, servers.format_tgi_command
    ),
    "gguf": ExportTarget("llama.cpp", llama_cpp.find_unsupported, llama_cpp.write, llama_cpp.format_command),
    "ollama": ExportTarget(
        "Ollama", ollama.find_unsupported, ollama.write, ollama.format_command, needs=ollama.list_requirements
    ),
    "mlx": ExportTarget("mlx-lm", mlx.find_unsupported, mlx.write, mlx.format_command, dora=True),
    "gguf-model": ExportTarget(
        "llama.cpp",
        _accept_all,
        whole_model.write_gguf_model,
        whole_model.format_gguf_command,
        plain=False,
        dora=True,
        whole=True,
    ),
    "ollama-model": ExportTarget(
        "Ollama",
        _accept_all,
        whole_model.write_ollama_model,
        whole_model.format_ollama_command,
        plain=False,
        dora=True,
        whole=True,
    ),
}
_WHOLE_MODELS: Final = (MERGED, *(name for name, target in _TARGETS.items() if target.whole))
TARGETS: Final = (*_TARGETS, MERGED)


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
        _check_apart(out, [adapter, *([base] if base else [])])
    loading = [name for name in allow if name in ALLOWANCES] if target in _WHOLE_MODELS else allow
    source = SourceAdapter.of(adapter, allow=loading)
    case = dataclasses.replace(_build_case(source, base), out=Path(os.path.abspath(out)), allow=tuple(allow))
    if target == MERGED:
        return _export_merged(case, out, replace=replace, allow=allow)
    check_output(out, replace=replace, owned=is_export)
    verdict = _judge_case(case, target, max_lora_rank, allow)
    verdict.demand()
    with stage_folder(out, replace=replace, owned=is_export, needed=2 * source.adapter.nbytes) as folder:
        _TARGETS[target].write(case, folder)
        (folder / CARD).write_text(_format_card(case, verdict), "utf-8")
        record = {
            "adapter": source.adapter.digest,
            "base": case.base and make_folder_portable(case.base),
            "changed": verdict.changed,
            "target": target,
        }
        (folder / RECORD).write_text(f"{json.dumps(record, indent=2)}\n", "utf-8")
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Export(out, target, verdict.changed, size, _list_shell_commands(_TARGETS[target].command(case)))


def is_export(folder: Path) -> bool:
    """Whether a folder was written by an export, so that another export may replace it."""
    return (folder / RECORD).is_file()


def _check_target(target: str) -> None:
    if target not in TARGETS:
        raise ConfigError(
            f"target {target!r} is not known", hint=suggest_nearest(target, TARGETS) or format_list(TARGETS)
        )


def _check_apart(out: Path, inputs: Sequence[str | Path]) -> None:
    """Raise ExportError if the output is not apart from what it is made of."""
    check_path(out)
    reason = reason_overlap(out, inputs)
    if reason:
        raise ExportError(reason, hint=OTHER_OUTPUT)


def _build_case(source: SourceAdapter, base: str | Path | None) -> ExportCase:
    if base is not None:
        return ExportCase(source.name, source.adapter, str(base), known=True)
    named = NamedBase.of(source.adapter.config, source.adapter.base)
    return ExportCase(source.name, source.adapter, named.name, known=named.problem is None)


def _judge_case(case: ExportCase, target: str, limit: int | None, allow: Collection[str]) -> Verdict:
    _check_target(target)
    if target == MERGED:
        return Verdict(MERGED, "any reader", (), (), ("the base, to merge into",))
    program, config = _TARGETS[target], case.adapter.config
    unlike_layers = tuple(servers.find_unlike_layers(case)) if program.plain else ()
    if unlike_layers:
        return Verdict(target, program.reader, unlike_layers, (), ())
    if program.plain:
        case.check_base(allow)
    unsupported = [] if program.dora else list(servers.find_dora(case))
    unsupported += servers.find_unsupported_by_all(case) if program.plain else ()
    unsupported += program.find_unsupported(case)
    if program.whole:
        return Verdict(target, program.reader, (), (), ("the base, to merge into",))
    rank = case.plain.rank if program.plain else config.largest_rank
    if limit is not None and rank > limit:
        unsupported.append(f"r: rank {rank} is above max_lora_rank {limit}; resize it to {limit}")
    changed = case.plain.changes if program.plain else ()
    return Verdict(target, program.reader, tuple(unsupported), changed, tuple(program.needs(case)))


def _export_merged(case: ExportCase, out: Path, *, replace: bool, allow: Collection[str]) -> Export:
    """Write a whole model, by `merge`."""
    report = merge(case.require_base(), case.adapter, out, replace=replace, allow=allow)
    return Export(out, MERGED, (), report.bytes)


def _list_shell_commands(markdown: str) -> tuple[str, ...]:
    """Return the lines of the first block of shell commands."""
    block = re.search(r"^```sh\n(.*?)\n```$", markdown, re.DOTALL | re.MULTILINE)
    return tuple(block[1].split("\n")) if block else ()


def _format_card(case: ExportCase, verdict: Verdict) -> str:
    goal = _TARGETS[verdict.target]
    rows = [("base", make_folder_portable(case.base) if case.base else "unknown"), ("adapter", case.adapter.digest)]
    if goal.plain:
        rows.append(("rank, alpha", f"{case.plain.rank}, {case.plain.alpha}"))
    return render_card(
        f"{case.name} for {goal.reader}",
        goal.command(case),
        format_table(rows),
        "Exported by lora_kit; the updates are the adapter's own. What was rewritten so that this reader does not "
        "pass over it:",
        "\n".join(f"- {escape_markdown(change)}" for change in verdict.changed or ("nothing",)),
    )
