"""Data sets of the hub as records, through `datasets`: `owner/name`, `owner/name:split`, `owner/name/config:split`.

A file that is here is always meant first. Code that comes with a data set is never run.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Final

from lora_kit.data.readers import READABLE_SUFFIXES, Contents, resolve_class_names
from lora_kit.errors import DataError
from lora_kit.models.silence import silence_datasets

_DATASET_NAME: Final = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:/(\w[\w.-]*))?(?::([^/]+))?")


def is_dataset(given: Path) -> bool:
    """Whether a name is one of a data set: not that of a file or a folder here, and not like one."""
    name = _DATASET_NAME.fullmatch(str(given))
    if name is None or given.exists() or Path(given.parts[0]).exists():
        return False
    return Path(name[1]).suffix.lower() not in READABLE_SUFFIXES


def read_dataset(given: Path, *, split: str) -> Contents:
    """The rows of a data set, numbered from 1.

    Args:
        given: a name for which `is_dataset` holds.
        split: where the name holds none.

    Raises:
        DataError: it cannot be read; says what was tried.
    """
    name = _DATASET_NAME.fullmatch(str(given))
    assert name is not None
    repository, config, split = name[1], name[2], name[3] or split
    tried = f"{given}: no such file here, and no data set of the hub that can be read"
    try:
        with silence_datasets():
            found = _load_split(repository, config, split)
    except Exception as error:  # whatever datasets and the network raise
        told = " ".join(str(error).split()) or type(error).__name__
        what = f"{repository}, {f'config {config}, ' if config else ''}split {split}"
        hint = "owner/name:split or owner/name/config:split; what was read once needs no network (HF_HUB_OFFLINE=1)"
        raise DataError(f"{tried} ({what}): {told}", hint=hint) from None
    rows = resolve_class_names(found.to_list(), found.features)
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
    return Contents(list(enumerate(rows, start=1)), [], digest.hexdigest())


def _load_split(repository: str, config: str | None, split: str) -> Any:
    from datasets import load_dataset  # type: ignore[import-untyped]
    from huggingface_hub import HfApi, constants

    if not constants.HF_HUB_OFFLINE:
        # One request with a time limit, before anything that would try again and again.
        HfApi().dataset_info(repository, timeout=10)
    return load_dataset(repository, config, split=split)
