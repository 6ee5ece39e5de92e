"""What `prepare` found, and the folder it writes.

The folder holds `train.jsonl`, perhaps `validation.jsonl` and `test.jsonl`, a `recipe.yaml` to train with, and
`manifest.json`: the source files with digests, the faults and what was left out, line by line, and the settings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from lora_kit.data.label_columns import convert_labeled_text, convert_tagged_words
from lora_kit.data.layouts import RowValue
from lora_kit.data.messages import ALL
from lora_kit.data.preferences import is_preference, preference_to_json, suggest_objective
from lora_kit.data.preparation.examine import ExaminedFile, bin_lengths
from lora_kit.data.preparation.training_defaults import choose_generation_section, choose_train_section
from lora_kit.data.prompt_rows import PROMPT_FORMATS, parse_prompt_row
from lora_kit.data.rows import Rows
from lora_kit.io.atomic_write import write_folder
from lora_kit.names import RECIPE_FILE, TEST_FILE

MANIFEST: Final = "manifest.json"
TRAIN: Final = "train.jsonl"
VALIDATION: Final = "validation.jsonl"
TEST: Final = TEST_FILE
_MANIFEST_VERSION: Final = 1
_COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The columns that a value is written under, by format."""

_MAX_RARE_SHARE: Final = 0.1
"""Most rows with rare labels, as a share of all, that are proposed to be left out."""


@dataclass(frozen=True, kw_only=True)
class PreparedFile:
    """A source file, and what is kept of it.

    Attributes:
        path: the file.
        examined: its rows and what is wrong with them.
        leaks: for training rows: their line → the line of the validation row with the same input.
        dropped: lines that were left out, by reason.
        kept: indices in `examined.rows` of the rows that are kept.
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
            "histogram": [list(each) for each in bin_lengths(lengths)],
            "learned": round(self.examined.learned, 6),
        }

    @property
    def has_few_rare_rows(self) -> bool:
        """Whether labels that cannot be learned can go without a loss: few rows have them, and no other spelling."""
        examined = self.examined
        renamed = {*examined.variants, *examined.lookalikes}
        lost = sum(count for label, count in examined.rare_labels.items() if label not in renamed)
        left = len(examined.labels) - len(examined.rare_labels)
        return 0 < lost <= _MAX_RARE_SHARE * examined.total and left > 1

    def to_json(self) -> dict[str, object]:
        """Return the entry of the file in the manifest."""
        examined = self.examined
        return {
            "path": str(self.path),
            "sha256": examined.sha256,
            "encoding": examined.encoding,
            "rows": examined.total,
            "kept": len(self.kept),
            "faults": [{"line": fault.line, "kind": fault.kind, "what": fault.what} for fault in examined.faults],
            "duplicates": _lines_to_json(examined.duplicates),
            "conflicts": _lines_to_json(examined.conflicts),
            "leaks": _lines_to_json(self.leaks),
            "dropped": {kind: list(lines) for kind, lines in self.dropped.items()},
            "unused": list(examined.unused),
            "labels": examined.labels,
            "lookalikes": examined.lookalikes,
            "variants": examined.variants,
            "relabeled": dict(examined.relabeled),
            "joined_by": examined.joined_by,
            "roles": dict(examined.roles),
            "tokens": self.tokens,
            "cut": list(examined.measured.cut),
        }


def _lines_to_json(lines: Mapping[int, int]) -> list[list[int]]:
    return [[line, earlier] for line, earlier in lines.items()]


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What `prepare` found and wrote.

    Attributes:
        parts: the source file, and the validation file if there is one.
        format: format of the rows; see `lora_kit.data.layouts`.
        layout: layout of the rows; see `lora_kit.data.layouts`.
        task: the task that the rows are for.
        train: the rows to train on.
        validation: the rows to validate on, if any.
        test: the rows to test on, if any.
        hidden_size: width of the base; None where its config does not say it.
        settings: everything but the source files that decides the result.
        out: the folder that was written; None if no folder was requested.
        files: the files that were written, with rows and digests.
    """

    parts: tuple[PreparedFile, ...]
    format: str
    layout: str
    task: str
    train: Rows
    validation: Rows | None
    test: Rows | None
    hidden_size: int | None
    settings: Mapping[str, object]
    out: Path | None = None
    files: Mapping[str, object]

    @property
    def recipe(self) -> Path | None:
        """The recipe to train with; None if no folder was written."""
        return self.out / RECIPE_FILE if self.out else None

    def to_json(self) -> dict[str, object]:
        """Return the contents of the manifest."""
        return {
            "format_version": _MANIFEST_VERSION,
            "layout": self.layout,
            "format": self.format,
            "settings": dict(self.settings),
            "sources": [part.to_json() for part in self.parts],
            "rows": {"train": len(self.train), "validation": len(self.validation or ()), "test": len(self.test or ())},
            "files": dict(self.files),
        }


def is_prepared(folder: Path) -> bool:
    """Return whether `prepare` wrote a folder, so that it may be replaced."""
    return (folder / MANIFEST).is_file() and (folder / TRAIN).is_file()


def write_preparation(preparation: Preparation, folder: Path, *, replace: bool) -> Preparation:
    """Write a preparation to a folder, all or nothing, and return it with the list of its files.

    Raises:
        StorageError: the folder exists, or cannot be written.
    """
    optional = {VALIDATION: preparation.validation, TEST: preparation.test}
    sides = {TRAIN: preparation.train} | {name: rows for name, rows in optional.items() if rows is not None}
    files = {name: "".join(_format_row(rows, value) for value in rows.values).encode() for name, rows in sides.items()}
    listing = {name: {"rows": len(sides[name]), **_describe_file(data)} for name, data in files.items()}
    files[RECIPE_FILE] = _render_recipe(preparation, folder).encode()
    listing[RECIPE_FILE] = _describe_file(files[RECIPE_FILE])
    written = dataclasses.replace(preparation, out=folder, files=listing)
    files[MANIFEST] = (json.dumps(written.to_json(), indent=1, ensure_ascii=False) + "\n").encode()
    write_folder(folder, files, replace=replace, owned=is_prepared)
    return written


def _format_row(rows: Rows, value: RowValue) -> str:
    """Return a row as a line of JSON, in the first layout of its format."""
    if rows.format == "label":
        row: dict[str, object] = convert_labeled_text(value)
    elif rows.format == "words":
        row = convert_tagged_words(value)
    elif rows.format == "chat":
        row = value[0].to_json()
    elif is_preference(rows.format):
        row = preference_to_json(rows.format, value)
    elif rows.format in PROMPT_FORMATS:
        row = parse_prompt_row(value)
    else:
        row = dict(zip(_COLUMNS[rows.format], value, strict=True))
    return json.dumps(row, ensure_ascii=False) + "\n"


def _describe_file(data: bytes) -> dict[str, object]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _render_recipe(preparation: Preparation, folder: Path) -> str:
    """Render a recipe that trains on the folder; its paths count from the working directory, as in every recipe."""
    settings = preparation.settings
    data: dict[str, object] = {"train": str(folder / TRAIN)}
    if preparation.validation is not None:
        data["validation"] = str(folder / VALIDATION)
    data["max_length"] = settings["max_length"]
    if settings["chat_template"]:
        data["chat_template"] = settings["chat_template"]
    if settings["chat_template_kwargs"]:
        data["chat_template_kwargs"] = settings["chat_template_kwargs"]
    if settings["learn"] != ALL:
        data["learn"] = settings["learn"]
    objective, rewards = suggest_objective(preparation.format), settings.get("rewards")
    train = choose_train_section(
        rows=len(preparation.train),
        task=preparation.task,
        hidden_size=preparation.hidden_size,
        labels=len(preparation.parts[0].examined.labels),
    )
    if objective:
        del train["learning_rate"]  # an objective has a lower default of its own
    if rewards:
        train |= choose_generation_section(settings["answer_tokens"])
    recipe = {
        "base": settings["base"],
        "data": data,
        "task": preparation.task,
        **({"objective": objective} if objective else {}),
        **({"rewards": rewards} if rewards else {}),
        **({"problem": settings["problem"]} if settings.get("problem") else {}),
        "lora": {"r": 16, "lora_alpha": 32},
        "train": train,
        "out": f"adapters/{folder.absolute().name}",
    }
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120)
