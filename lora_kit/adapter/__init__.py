"""Adapter: an immutable value of config and tensors that knows no model, and the folder it is on disk.

`value` is the adapter, `folder` its files, `sorting` the way from a file's keys to the pairs and saved modules they
stand for.
"""

from lora_kit.adapter.folder import (
    ALLOWANCES,
    CARD,
    CONFIG,
    FORMAT,
    OLD_WEIGHTS,
    RECORD,
    WEIGHTS,
    AdapterFolder,
    check_allowances,
    is_adapter_folder,
)
from lora_kit.adapter.sorting import PREFIX, Pair, TokenRows, magnitude_key, pair_keys, tokens_key
from lora_kit.adapter.value import Adapter

__all__ = [
    "ALLOWANCES",
    "CARD",
    "CONFIG",
    "FORMAT",
    "OLD_WEIGHTS",
    "PREFIX",
    "RECORD",
    "WEIGHTS",
    "Adapter",
    "AdapterFolder",
    "Pair",
    "TokenRows",
    "check_allowances",
    "is_adapter_folder",
    "magnitude_key",
    "pair_keys",
    "tokens_key",
]
