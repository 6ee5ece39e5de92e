"""Checks of a merge before any work: the output must not destroy an input, nor an adapter be merged twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from lora_kit.adapter.adapter import Adapter
from lora_kit.errors import AdapterError, MergeError
from lora_kit.io.read import read_text
from lora_kit.io.sealed_json import SELF_DIGEST, is_intact
from lora_kit.io.strict_json import parse_object
from lora_kit.io.text import escape_text

MERGE_RECORD: Final = "lora_kit_merge.json"
"""The file of a merged folder that records what was merged into which base, and the results of the checks."""
_RECORD_LIMIT: Final = 16 * 2**20
_UNPROTECTED_FORMAT: Final = 2
"""Of records without a digest of themselves, which are read too."""


def refuse_merged(base: Path, adapters: Sequence[Adapter]) -> None:
    """Raise MergeError if an adapter was merged into this base already, or is given twice."""
    merged, seen = read_merged_digests(base), set[str]()
    for digest in (adapter.digest for adapter in adapters):
        if digest in merged:
            message = f"this adapter ({digest[:12]}) was merged into {escape_text(base)} already"
            raise MergeError(message, hint="use that base as it is")
        if digest in seen:
            raise MergeError(
                f"the adapter {digest[:12]} was given twice", hint="give it once, with the sum of the weights"
            )
        seen.add(digest)


def read_quantization_config(config: Path) -> object:
    """Return the `quantization_config` of a base's config file; None without one."""
    try:
        return json.loads(config.read_text("utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # loading the base reports what is wrong with it


def read_merged_digests(base: Path) -> tuple[str, ...]:
    """Return the digests of the adapters that were merged into this base, oldest first.

    Raises:
        MergeError: its record of merges cannot be read.
    """
    file = base / MERGE_RECORD
    if not file.exists():
        return ()
    try:
        text = read_text(file, limit=_RECORD_LIMIT)
        record = parse_object(text)
    except (AdapterError, ValueError) as error:
        message = error.message if isinstance(error, AdapterError) else f"{escape_text(file)}: {error}"
        raise MergeError(message, hint="the base's record of its merges is damaged") from None
    if (SELF_DIGEST in record or record.get("format") != _UNPROTECTED_FORMAT) and not is_intact(record, text):
        raise MergeError(f"{escape_text(file)} was changed since it was written", hint="the record is damaged")
    merged = record.get("merged")
    if not isinstance(merged, list) or not all(isinstance(digest, str) for digest in merged):
        raise MergeError(f"{escape_text(file)}: 'merged' is not a list of digests", hint="the record is damaged")
    return tuple(merged)


def is_merged_folder(folder: Path) -> bool:
    """Whether a folder was written by a merge, so that another merge may replace it."""
    return (folder / MERGE_RECORD).is_file()
