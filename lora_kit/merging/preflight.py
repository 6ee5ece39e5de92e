"""What can be refused before any work: outputs that would destroy an input, adapters that a base has already."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from lora_kit.adapter.adapter import Adapter
from lora_kit.errors import AdapterError, MergeError
from lora_kit.io.atomic_write import check_path
from lora_kit.io.read import read_json
from lora_kit.io.text import escape_text

MERGE_RECORD: Final = "lora_kit_merge.json"
"""In a merged folder: what was merged into what, and what the checks found."""
_RECORD_LIMIT: Final = 16 * 2**20


def refuse_overlap(out: Path, inputs: Sequence[Path]) -> None:
    """Raise MergeError where the output is an input, or one lies inside the other, and StorageError for no path."""
    check_path(out)
    out = out.resolve()
    for folder in (path.resolve() for path in inputs if "\0" not in str(path)):  # which reading it refuses
        if out == folder:
            raise MergeError(
                f"the output {escape_text(out)} is itself an input of this merge", hint="choose another output"
            )
        if out.is_relative_to(folder) or folder.is_relative_to(out):
            raise MergeError(
                f"the output {escape_text(out)} and the input {escape_text(folder)} lie inside each other",
                hint="choose an output beside it",
            )


def refuse_merged(base: Path, adapters: Sequence[Adapter]) -> None:
    """Raise MergeError for a base into which one of these adapters was merged already, and for one given twice."""
    merged, seen = read_merged_digests(base), set[str]()
    for digest in (adapter.digest for adapter in adapters):
        if digest in merged:
            told = f"this adapter ({digest[:12]}) was merged into {escape_text(base)} already"
            raise MergeError(told, hint="use it as it is")
        if digest in seen:
            raise MergeError(
                f"the adapter {digest[:12]} was given twice", hint="give it once, with the sum of the weights"
            )
        seen.add(digest)


def read_quantization_config(config: Path) -> Any:
    """The `quantization_config` of a base's config; None where there is none."""
    try:
        return json.loads(config.read_text("utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # loading the base says what is wrong with it


def read_merged_digests(base: Path) -> tuple[str, ...]:
    """Digests of the adapters that are in this base already, oldest first; none where it has no record of a merge.

    Raises:
        MergeError: there is a record, and it cannot be read.
    """
    file = base / MERGE_RECORD
    if not file.exists():
        return ()
    try:
        merged = read_json(file, limit=_RECORD_LIMIT).get("merged")
    except AdapterError as error:
        raise MergeError(error.message, hint="the base's record of its merges is damaged") from None
    if not isinstance(merged, list) or not all(isinstance(digest, str) for digest in merged):
        raise MergeError(f"{escape_text(file)}: 'merged' is not a list of digests", hint="the record is damaged")
    return tuple(merged)


def is_merged_folder(folder: Path) -> bool:
    """Whether a folder was written by a merge, so that another merge may replace it."""
    return (folder / MERGE_RECORD).is_file()
