"""Data sets of the hub as records, through `datasets`: `owner/name`, `owner/name:split`, `owner/name/config:split`.

A file that exists here always takes precedence. Code that comes with a data set is never run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lora_kit.data.parquet import resolve_class_names
from lora_kit.data.readers import READABLE_SUFFIXES
from lora_kit.data.records import Contents, Record
from lora_kit.errors import DataError
from lora_kit.models.silence import silence_datasets

if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]

_DATASET_NAME: Final = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:/(\w[\w.-]*))?(?::([^/]+))?")
_REQUEST_TIMEOUT: Final = 10
"""Seconds."""


def is_dataset(path: Path) -> bool:
    """Return whether a path names a data set: it reads like one, and no file or folder here has that name."""
    name = _DATASET_NAME.fullmatch(str(path))
    if name is None or path.exists() or Path(path.parts[0]).exists():
        return False
    return Path(name[1]).suffix.lower() not in READABLE_SUFFIXES


def read_dataset(path: Path, *, split: str) -> Contents:
    """Read the rows of a data set, numbered from 1.

    Args:
        path: a name for which `is_dataset` holds.
        split: the split to read if the name holds none.

    Raises:
        DataError: the data set cannot be read; the message says what was tried.
    """
    dataset = _load_dataset(path, split)
    rows = list(resolve_class_names(dataset.to_list(), dataset.features))
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
    return Contents(list(enumerate(rows, start=1)), [], digest.hexdigest())


def iterate_dataset(path: Path, *, split: str) -> Iterator[Record]:
    """Yield the rows of a data set one by one, as `datasets` maps them from the disk, numbered from 1.

    Raises:
        DataError: as `read_dataset`.
    """
    dataset = _load_dataset(path, split)
    yield from enumerate(resolve_class_names(dataset, dataset.features), start=1)


def _load_dataset(path: Path, split: str) -> Dataset:
    """Return the split that a name names, or else this one."""
    name = _DATASET_NAME.fullmatch(str(path))
    assert name is not None
    repository, config, split = name[1], name[2], name[3] or split
    try:
        with silence_datasets():
            return _load_split(repository, config, split)
    except Exception as error:  # whatever datasets and the network raise
        reason = " ".join(str(error).split()) or type(error).__name__
        tried = f"{repository}, {f'config {config}, ' if config else ''}split {split}"
        hint = "owner/name:split or owner/name/config:split; what was read once needs no network (HF_HUB_OFFLINE=1)"
        message = f"{path}: no such file here, and no data set of the hub that can be read ({tried}): {reason}"
        raise DataError(message, hint=hint) from None


def _load_split(repository: str, config: str | None, split: str) -> Dataset:
    from datasets import load_dataset
    from huggingface_hub import HfApi, constants

    if not constants.HF_HUB_OFFLINE:
        # One request with a time limit first: load_dataset retries for minutes when the hub cannot be reached.
        HfApi().dataset_info(repository, timeout=_REQUEST_TIMEOUT)
    return load_dataset(repository, config, split=split)
