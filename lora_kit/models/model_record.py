"""The record of a whole model that was merged, or trained in every weight: how it is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from lora_kit.adapter.use_record import MODEL_RECORD
from lora_kit.errors import AdapterError, BaseModelError
from lora_kit.io.read import read_json
from lora_kit.io.strict_json import JsonObject
from lora_kit.models.locate import BaseSource

_SIZE_LIMIT: Final = 16 * 2**20


def read_model_record(source: BaseSource) -> JsonObject:
    """Return the content of `lora_kit_model.json`; empty for a base without one.

    Raises:
        BaseModelError: it is damaged.
    """
    file = _find_file(source)
    return {} if file is None else _read_record(file)


def read_folder_record(folder: Path) -> JsonObject:
    """Return the same of a model folder."""
    file = folder / MODEL_RECORD
    return _read_record(file) if file.is_file() else {}


def _read_record(file: Path) -> JsonObject:
    try:
        return read_json(file, limit=_SIZE_LIMIT)
    except AdapterError as error:
        raise BaseModelError(error.message, hint="without that file the model is asked as any other") from None


def _find_file(source: BaseSource) -> Path | None:
    if source.folder is not None:
        file = source.folder / MODEL_RECORD
        return file if file.is_file() else None
    from transformers.utils.hub import cached_file

    options = {key: value for key, value in source.loading_options.items() if key != "trust_remote_code"}
    found = cached_file(
        source.location,
        MODEL_RECORD,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **options,
    )
    return Path(found).resolve() if found else None
