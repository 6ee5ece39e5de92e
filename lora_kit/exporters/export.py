"""`export` and `check`: which reader wants what, and the folder that is written for it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.adapter_location import resolve_adapter
from lora_kit.adapter.folder import ALLOWANCES
from lora_kit.adapter.model_card import format_table, render_card
from lora_kit.adapter.store import sum_file_sizes, to_json_value
from lora_kit.algebra.sources import AdapterLike, SourceAdapter
from lora_kit.errors import ConfigError, ExportError, format_list, suggest_nearest
from lora_kit.exporters import llama_cpp, mlx, ollama, servers
from lora_kit.exporters.plain_lora import ExportCase
from lora_kit.io.atomic_write import check_output, stage_folder
from lora_kit.io.text import escape_text
from lora_kit.merging.merge import merge
from lora_kit.models.infer_base import NamedBase

RECORD: Final = "lora_kit_export.json"
CARD: Final = "README.md"
MERGED: Final = "merged"


@dataclass(frozen=True)
class ExportTarget:
    """A reader.

    Attributes:
        reader: what people call it.
        unfit: what of an adapter it cannot take, in words that name the field.
        write: writes its files into a folder.
        command: how they are loaded, in Markdown.
        plain: whether it needs one rank and one scaling.
        needs: what it must be started with.
    """

    reader: str
    find_unsupported: Callable[[ExportCase], Iterator[str]]
    write: Callable[[ExportCase, Path], None]
    command: Callable[[ExportCase], str]
    plain: bool = True
    needs: Callable[[ExportCase], list[str]] = lambda case: []


def _accept_all(case: ExportCase) -> Iterator[str]:
    return iter(())


_TARGETS: Final = {
    "peft": ExportTarget("PEFT", _accept_all, servers.write_peft, servers.format_peft_command, plain=False),
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
    "mlx": ExportTarget("mlx-lm", mlx.find_unsupported, mlx.write, mlx.format_command),
}
TARGETS: Final = (*_TARGETS, MERGED)


@dataclass(frozen=True)
class Verdict:
    """Whether a reader takes an adapter.

    Attributes:
        target, reader: which.
        refused: what it cannot take, each naming the field; nothing where it fits.
        changed: what exporting does to it, its updates staying what they are.
        needed: what the reader must be started with.
    """

    target: str
    reader: str
    refused: tuple[str, ...]
    changed: tuple[str, ...]
    needed: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = to_json_value(self)
        return found

    def demand(self) -> None:
        """Raise ExportError unless it fits."""
        if self.refused:
            told = "\n  ".join(self.refused)
            raise ExportError(
                f"{self.reader} cannot take this adapter:\n  {told}", hint=f"target {MERGED!r} writes a whole model"
            )


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        out: the folder. target: for which reader. changed: what was done to the adapter. bytes: of the folder.
    """

    out: Path
    target: str
    changed: tuple[str, ...]
    bytes: int

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = to_json_value(self)
        return found


def check(
    adapter: AdapterLike,
    target: str,
    *,
    base: str | Path | None = None,
    max_lora_rank: int | None = None,
    allow: Collection[str] = (),
) -> Verdict:
    """Say in advance whether a reader takes an adapter, and what exporting would do to it.

    Args:
        adapter: a folder, a name in the store or an Adapter.
        target: one of `TARGETS`.
        base: hub id, local folder or `kit-base`; None for the one that the adapter names, where it is here. Where it is
            known, the adapter must fit a model of its config.
        max_lora_rank: what the reader is started with.
        allow: what `Adapter.load` allows.

    Raises:
        ConfigError: an unknown target. ExportError: the base is needed and not known.
        BaseModelError: its config cannot be read.
        AdapterError, UnknownAdapterError: the adapter does not fit it, cannot be read, or is not there.
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
    """Write an adapter for another reader, saying the same there as here.

    What a reader ignores is made plain: rank-stabilised scaling and alpha patterns go into B, ranks are filled up to
    one. What it cannot take is refused, the field named. The folder has a README with the command that loads it.

    Args:
        adapter: a folder, a name in the store or an Adapter.
        target: `peft`, `vllm`, `sglang`, `tgi`, `gguf`, `ollama`, `mlx`; or `merged`, a whole model (`lk.merge`).
        out: the folder to write.
        base: hub id, local folder or `kit-base`, needed by `gguf`, `ollama` and `merged`; None for the one that the
            adapter names, where it is here.
        max_lora_rank: what the reader is started with: a larger rank is refused.
        replace: an earlier export in `out` may be replaced; anything else there never is.
        allow: what `Adapter.load` allows; with `merged`, what `merge` does.

    Raises:
        ExportError: the reader cannot take it, every reason being listed; or the output lies in the adapter.
        ConfigError, BaseModelError, AdapterError, UnknownAdapterError: as in `check`.
        StorageError: the output exists, or the disk refuses.

    Example:
        lk.export("adapters/sql", "vllm", "out/sql", max_lora_rank=16)
    """
    _check_target(target)
    out = Path(out)
    if not isinstance(adapter, Adapter):
        adapter = resolve_adapter(adapter).folder
        _check_not_in_adapter(out, adapter)
    parent = SourceAdapter.of(
        adapter, allow=[name for name in allow if name in ALLOWANCES] if target == MERGED else allow
    )
    case = dataclasses.replace(_build_case(parent, base), out=Path(os.path.abspath(out)))
    if target == MERGED:
        return _export_merged(case, out, replace=replace, allow=allow)
    check_output(out, replace=replace, owned=is_export)
    verdict = _judge_case(case, target, max_lora_rank, allow)
    verdict.demand()
    with stage_folder(out, replace=replace, owned=is_export, needed=2 * parent.adapter.nbytes) as folder:
        _TARGETS[target].write(case, folder)
        (folder / CARD).write_text(_format_card(case, verdict), "utf-8")
        record = {"adapter": parent.adapter.digest, "base": case.base, "changed": verdict.changed, "target": target}
        (folder / RECORD).write_text(f"{json.dumps(record, indent=2)}\n", "utf-8")
        size = sum_file_sizes(folder)
    return Export(out, target, verdict.changed, size)


def is_export(folder: Path) -> bool:
    """Whether a folder was written by an export, so that another export may replace it."""
    return (folder / RECORD).is_file()


def _check_target(target: str) -> None:
    if target not in TARGETS:
        raise ConfigError(
            f"target {target!r} is not known", hint=suggest_nearest(target, TARGETS) or format_list(TARGETS)
        )


def _check_not_in_adapter(out: Path, folder: Path) -> None:
    """Refuse to write over what is read."""
    if out.resolve() == folder.resolve() or out.resolve().is_relative_to(folder.resolve()):
        raise ExportError(
            f"the output {escape_text(out)} lies in the adapter it is made of", hint="choose an output beside it"
        )


def _build_case(parent: SourceAdapter, base: str | Path | None) -> ExportCase:
    if base is not None:
        return ExportCase(parent.name, parent.adapter, str(base), known=True)
    named = NamedBase.of(parent.adapter.config, parent.adapter.base)
    return ExportCase(parent.name, parent.adapter, named.name, known=named.problem is None)


def _judge_case(case: ExportCase, target: str, limit: int | None, allow: Collection[str]) -> Verdict:
    _check_target(target)
    if target == MERGED:
        return Verdict(MERGED, "any reader", (), (), ("the base, which is merged into",))
    goal, config = _TARGETS[target], case.adapter.config
    if goal.plain and config.target_parameters:
        why = f"target_parameters: {format_list(config.target_parameters)} would be left out"
        return Verdict(target, goal.reader, (why,), (), ())
    if goal.plain:
        case.check_base(allow)
    refused = list(goal.find_unsupported(case))
    rank = case.plain.rank if goal.plain else config.largest_rank
    if limit is not None and rank > limit:
        refused.append(f"r: rank {rank} is above max_lora_rank {limit}; resize it to {limit}")
    changed = case.plain.changes if goal.plain else ()
    return Verdict(target, goal.reader, tuple(refused), changed, tuple(goal.needs(case)))


def _export_merged(case: ExportCase, out: Path, *, replace: bool, allow: Collection[str]) -> Export:
    """Write a whole model, by `merge`."""
    if case.base is None or not case.known:
        refusal = NamedBase.of(case.adapter.config, case.adapter.base).refusal
        message = f"the base is needed to merge into: the adapter {refusal}"
        raise ExportError(message, hint="give the base: a folder or a hub id")
    report = merge(case.base, case.adapter, out, replace=replace, allow=allow)
    return Export(out, MERGED, (), report.bytes)


def _format_card(case: ExportCase, verdict: Verdict) -> str:
    goal = _TARGETS[verdict.target]
    rows = [("base", case.base or "not said"), ("adapter", case.adapter.digest)]
    if goal.plain:
        rows.append(("rank, alpha", f"{case.plain.rank}, {case.plain.alpha}"))
    return render_card(
        f"{case.name} for {goal.reader}",
        goal.command(case),
        format_table(rows),
        "Exported by lora_kit; the updates are the adapter's own. What was rewritten so that this reader does not "
        "pass over it:",
        "\n".join(f"- {change}" for change in verdict.changed or ("nothing",)),
    )
