"""From a file as people have it to rows that can be trained on: looked at, mended on request, split and written down.

The folder that comes out holds `train.jsonl`, `validation.jsonl`, a `recipe.yaml` to train with, and `manifest.json`:
what was read, with digests, what was found and left out, line by line, and the settings. The same file and the same
settings give the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from lora_kit.data.chat import PLAIN, ChatTemplate, chat_template, chat_template_of
from lora_kit.data.encode import DEFAULT_MAX_LENGTH
from lora_kit.data.layouts import FORMATS
from lora_kit.data.preparation.examine import ExaminedFile, ReadOptions, bin_lengths, examine, find_leaks
from lora_kit.data.preparation.split import split
from lora_kit.data.readers import BAD, EMPTY, LONG, NOT_UTF8
from lora_kit.data.rows import Rows, build_fault_error
from lora_kit.errors import DataError, format_list, suggest_nearest
from lora_kit.io.atomic_write import check_output, write_folder
from lora_kit.models.loading import load_input_spec
from lora_kit.models.prompt_tokens import DEFAULT_SEPARATOR
from lora_kit.names import KIT_BASE, RECIPE_FILE

MANIFEST: Final = "manifest.json"
TRAIN: Final = "train.jsonl"
VALIDATION: Final = "validation.jsonl"
DUPLICATES, CONFLICTS, LEAKS = "duplicates", "conflicts", "leaks"
DROPPABLE: Final = (BAD, EMPTY, LONG, DUPLICATES, CONFLICTS, LEAKS)
"""What can be left out: rows that cannot be read, without text, too long; repeats; training rows validated on."""
DEFAULT_VALIDATION_SHARE: Final = 0.05
_MANIFEST_VERSION: Final = 1


@dataclass(frozen=True, kw_only=True)
class PreparedFile:
    """One of the files that were read, and what became of it.

    Attributes:
        path: the file.
        examined: what is in it.
        leaks: of training rows: their line → the line of the validation row with the same input.
        dropped: kind of what was left out → lines.
        kept: places in `examined.rows` of the rows that are left.
    """

    path: Path
    examined: ExaminedFile
    leaks: Mapping[int, int]
    dropped: Mapping[str, Sequence[int]]
    kept: Sequence[int]

    @property
    def tokens(self) -> dict[str, Any]:
        """Lengths of the rows in tokens, before anything is cut, and the share of tokens that are learned."""
        lengths = sorted(length for length in self.examined.measured.lengths if length) or [0]
        return {
            "shortest": lengths[0],
            "median": lengths[len(lengths) // 2],
            "longest": lengths[-1],
            "histogram": [list(found) for found in bin_lengths(lengths)],
            "learned": round(self.examined.learned, 6),
        }

    def to_json(self) -> dict[str, Any]:
        found = self.examined
        return {
            "path": str(self.path),
            "sha256": found.sha256,
            "rows": found.total,
            "kept": len(self.kept),
            "faults": [{"line": fault.line, "kind": fault.kind, "what": fault.what} for fault in found.faults],
            "duplicates": _lines_to_json(found.duplicates),
            "conflicts": _lines_to_json(found.conflicts),
            "leaks": _lines_to_json(self.leaks),
            "dropped": {kind: list(lines) for kind, lines in self.dropped.items()},
            "unused": list(found.unused),
            "labels": found.labels,
            "lookalikes": found.lookalikes,
            "tokens": self.tokens,
            "cut": list(found.measured.cut),
        }


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What `prepare` found, and wrote.

    Attributes:
        parts: the file, and the one for validation if there is one.
        format, layout: of the rows; see `lora_kit.data.layouts`.
        task: that the rows are for.
        train, validation: the rows of the split.
        settings: all that decides about the result, besides the files.
        out: the folder that was written; None if none was asked for.
        files: what was written, with rows and digests.
    """

    parts: tuple[PreparedFile, ...]
    format: str
    layout: str
    task: str
    train: Rows
    validation: Rows | None
    settings: Mapping[str, Any]
    out: Path | None = None
    files: Mapping[str, Any]

    @property
    def recipe(self) -> Path | None:
        """The recipe to train with."""
        return self.out / RECIPE_FILE if self.out else None

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": _MANIFEST_VERSION,
            "layout": self.layout,
            "format": self.format,
            "settings": dict(self.settings),
            "sources": [part.to_json() for part in self.parts],
            "rows": {"train": len(self.train), "validation": len(self.validation or ())},
            "files": dict(self.files),
        }


def prepare(
    source: str | Path,
    out: str | Path | None = None,
    *,
    validation: str | Path | None = None,
    share: float = DEFAULT_VALIDATION_SHARE,
    base: str = KIT_BASE,
    max_length: int | None = None,
    template: str | None = None,
    rename: Mapping[str, str] | None = None,
    relabel: Mapping[str, str] | None = None,
    encoding: str = "utf-8",
    drop: Collection[str] = (),
    seed: int = 0,
    replace: bool = False,
) -> Preparation:
    """Look at a file of rows, mend it as asked, and write it split for training, all or nothing.

    Args:
        source: the file or data set; `lora_kit.data.readers` lists the kinds of files, `lora_kit.data.hub_datasets` the
            names of            data sets, `lora_kit.data.layouts` the layouts.
        out: the folder to write; None to look only.
        validation: a file of its own for validation; None to set a share of the rows aside, see
            `lora_kit.data.preparation.split`.
        share: the share to set aside; 0 for none. Means nothing beside a file for validation.
        base: whose tokens are counted, and what the recipe trains on.
        max_length: tokens of a sample at the most; None for what the base can see, 2,048 at the most.
        template: of conversations: `plain`, a Jinja file or the text of one; None for the tokenizer's own, and `plain`
            for a base without one.
        rename: columns to the names they are to go by.
        relabel: labels to the names they are to have.
        encoding: of the files.
        drop: what to leave out, of `DROPPABLE`. Of repeats the first row stays; leaks are taken from the training rows.
        seed: of the split.
        replace: an earlier result at `out` may be replaced.

    Raises:
        DataError: the files cannot be read, or rows that cannot be trained on are neither mended nor left out.
        BaseModelError: the base's tokenizer cannot be read.
        StorageError: `out` exists, or cannot be written.
    """
    _check_arguments(drop, share)
    folder = None if out is None else Path(out)
    if folder is not None:
        check_output(folder, replace=replace, owned=is_prepared)
    reader = load_input_spec(base)
    tokenizer, limit = reader.tokenizer, reader.max_length
    length = max_length or min(limit, DEFAULT_MAX_LENGTH)
    if not 2 <= length <= limit:
        raise DataError(f"max_length is {length}; it must be 2 at least, and {base} sees {limit} tokens at once")
    reading = ReadOptions(
        tokenizer=tokenizer,
        max_length=length,
        separator=DEFAULT_SEPARATOR,
        task=reader.generative_task,
        rename=dict(rename or {}),
        relabel=dict(relabel or {}),
        encoding=encoding,
    )
    chosen = _resolve_template(template, tokenizer, base)
    parts = _examine_files(Path(source), None if validation is None else Path(validation), reading, chosen, drop)
    rows = parts[0].examined.rows
    if template is not None and rows.format != "chat":
        raise DataError(f"a chat template was given, and {source} has rows of the format {rows.format}")
    settings = {
        "base": base,
        "max_length": length,
        "chat_template": _resolve_template_name(template, tokenizer) if rows.format == "chat" else None,
        "rename": reading.rename,
        "relabel": reading.relabel,
        "encoding": encoding,
        "drop": sorted(drop),
        "share": 0.0 if validation is not None else share,
        "seed": seed,
    }
    if folder is not None:
        _refuse_remaining_faults(parts)
    sides = _split_rows(parts, share=share, seed=seed)
    found = Preparation(
        parts=parts,
        format=rows.format,
        layout=rows.layout,
        task=next(task for task in (reading.task, *FORMATS) if rows.format in FORMATS[task]),
        train=sides[0],
        validation=sides[1],
        settings=settings,
        out=folder,
        files={},
    )
    return found if folder is None else _write_preparation(found, folder, replace=replace)


def is_prepared(folder: Path) -> bool:
    """Whether a folder is one that `prepare` wrote, which may be replaced."""
    return (folder / MANIFEST).is_file() and (folder / TRAIN).is_file()


def _check_arguments(drop: Collection[str], share: float) -> None:
    unknown = sorted(set(drop) - set(DROPPABLE))
    if unknown:
        hint = suggest_nearest(unknown[0], DROPPABLE) or f"known: {format_list(DROPPABLE)}"
        raise DataError(f"drop {format_list(unknown)} is not known", hint=hint)
    if not 0 <= share < 1:
        raise DataError(f"the share for validation must be 0 or above and below 1; {share} was given")


def _resolve_template(given: str | None, tokenizer: Any, base: str) -> ChatTemplate:
    return chat_template(_resolve_template_name(given, tokenizer), tokenizer, base=base)


def _resolve_template_name(given: str | None, tokenizer: Any) -> str | None:
    """The template by the name that a recipe has for it."""
    return given if given is not None or chat_template_of(tokenizer) else PLAIN


# Reading and mending


def _examine_files(
    source: Path, validation: Path | None, reading: ReadOptions, template: ChatTemplate, drop: Collection[str]
) -> tuple[PreparedFile, ...]:
    train = examine(source, reading, template=template)
    if not len(train.rows):
        raise build_fault_error(source, train.faults)
    _refuse_another_encoding(source, train, drop)
    if validation is None:
        return (_clean_file(source, train, {}, drop),)
    label2id = {name: number for number, name in enumerate(train.labels)} if train.labels else None
    other = examine(validation, reading, template=template, label2id=label2id, split="validation")
    _refuse_another_encoding(validation, other, drop)
    if other.rows.format != train.rows.format:
        kinds = f"{source} has rows of the format {train.rows.format}, {validation} of the format {other.rows.format}"
        raise DataError(kinds, hint="both files have one format")
    leaked = find_leaks(train.rows, other.rows)
    return _clean_file(source, train, leaked, drop), _clean_file(validation, other, {}, drop)


def _refuse_another_encoding(path: Path, found: ExaminedFile, drop: Collection[str]) -> None:
    """Rows that are not UTF-8 are more likely a file in another encoding than rows to be left out."""
    faults = [fault for fault in found.faults if fault.what.startswith(NOT_UTF8)]
    if faults and BAD not in drop:
        raise build_fault_error(path, faults, hint=f"to leave these rows out: --drop {BAD}")


def _clean_file(path: Path, found: ExaminedFile, leaked: Mapping[int, int], drop: Collection[str]) -> PreparedFile:
    wrong = {
        **{kind: found.lines_of(kind) for kind in (BAD, EMPTY, LONG)},
        DUPLICATES: list(found.duplicates),
        # Nobody knows which of them is right.
        CONFLICTS: sorted({*found.conflicts, *found.conflicts.values()}),
        LEAKS: list(leaked),
    }
    dropped = {kind: lines for kind, lines in wrong.items() if kind in drop and lines}
    gone = {line for lines in dropped.values() for line in lines}
    kept = [place for place, line in enumerate(found.rows.lines) if line not in gone]
    return PreparedFile(path=path, examined=found, leaks=leaked, dropped=dropped, kept=kept)


def _refuse_remaining_faults(parts: Sequence[PreparedFile]) -> None:
    """Faults that were not to be left out: what was written with them could not be trained on."""
    for part in parts:
        left = [fault for fault in part.examined.faults if fault.kind not in part.dropped]
        if left:
            kinds = [kind for kind in DROPPABLE if any(fault.kind == kind for fault in left)]
            raise build_fault_error(
                part.path, left, hint=f"mend these rows, or leave them out: --drop {' '.join(kinds)}"
            )


def _split_rows(parts: Sequence[PreparedFile], *, share: float, seed: int) -> tuple[Rows, Rows | None]:
    """The rows to train on, and those to validate on."""
    kept = [part.examined.rows.only(part.kept) for part in parts]
    for part, rows in zip(parts, kept, strict=True):
        if not len(rows):
            raise DataError(f"{part.path}: no row is left")
    if len(kept) > 1 or not share:
        return kept[0], kept[1] if len(kept) > 1 else None
    train, aside = split(kept[0], share=share, seed=seed)
    return kept[0].only(train), kept[0].only(aside)


# Writing


def _write_preparation(found: Preparation, folder: Path, *, replace: bool) -> Preparation:
    sides = {TRAIN: found.train, **({VALIDATION: found.validation} if found.validation is not None else {})}
    files = {name: "".join(_format_row(rows, value) for value in rows.values).encode() for name, rows in sides.items()}
    listing = {name: _describe_file(data, rows=len(sides[name])) for name, data in files.items()}
    files[RECIPE_FILE] = _render_recipe(found, folder).encode()
    listing[RECIPE_FILE] = _describe_file(files[RECIPE_FILE])
    found = dataclasses.replace(found, files=listing)
    files[MANIFEST] = (json.dumps(found.to_json(), indent=1, ensure_ascii=False) + "\n").encode()
    write_folder(folder, files, replace=replace, owned=is_prepared)
    return found


def _format_row(rows: Rows, value: Sequence[Any]) -> str:
    """A row in the layout its format is written in."""
    if rows.format == "words":
        row: dict[str, Any] = {"words": list(value[0]), "labels": list(value[1])}
    elif rows.format == "chat":
        row = {"messages": [{"role": role, "content": content} for role, content in value[0]]}
    else:
        keys = {"completion": ("prompt", "completion"), "label": ("text", "label"), "text": ("text",)}[rows.format]
        row = dict(zip(keys, value, strict=True))
    return json.dumps(row, ensure_ascii=False) + "\n"


def _describe_file(data: bytes, **more: Any) -> dict[str, Any]:
    return {**more, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _render_recipe(found: Preparation, folder: Path) -> str:
    """A recipe that trains on the folder; its paths count from the working directory, as those of every recipe."""
    data: dict[str, Any] = {"train": str(folder / TRAIN)}
    if found.validation is not None:
        data["validation"] = str(folder / VALIDATION)
    data["max_length"] = found.settings["max_length"]
    if found.settings["chat_template"]:
        data["chat_template"] = found.settings["chat_template"]
    recipe = {
        "base": found.settings["base"],
        "data": data,
        "task": found.task,
        "lora": {"r": 16, "lora_alpha": 32},
        "train": {"num_train_epochs": 3, "per_device_train_batch_size": 8, "learning_rate": 5e-4, "seed": 0},
        "out": f"adapters/{folder.absolute().name}",
    }
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120)


def _lines_to_json(lines: Mapping[int, int]) -> list[list[int]]:
    return [[line, earlier] for line, earlier in lines.items()]
