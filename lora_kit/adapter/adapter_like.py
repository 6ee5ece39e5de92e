"""An adapter as people give it: a folder, a name in the store, a hub id, or the value itself."""

from __future__ import annotations

from pathlib import Path

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.adapter_location import label_adapter_folder

AdapterLike = str | Path | Adapter
"""A folder, a name in the store, a hub id, or an Adapter. Where the base itself can be meant: `AdapterLike | None`."""


def short_label_of(source: AdapterLike, adapter: Adapter) -> str:
    """Return what an adapter is called in messages: the name of its folder; of a value, the start of its digest.

    Args:
        source: what was given.
        adapter: what was read from it.
    """
    return adapter.digest[:12] if isinstance(source, Adapter) else label_adapter_folder(source)
