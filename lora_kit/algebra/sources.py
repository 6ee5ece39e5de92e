"""Where an adapter made of others comes from: the adapters, the base they share, what is recorded of them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.adapter_location import label_adapter_folder, resolve_adapter
from lora_kit.adapter.folder import check_allowances
from lora_kit.algebra.low_rank import LowRankUpdate
from lora_kit.errors import BaseMismatchError, MergeError
from lora_kit.io.text import escape_text
from lora_kit.targets.fingerprint import list_fingerprint_mismatches

logger = logging.getLogger(__name__)

AdapterLike = str | Path | Adapter
"""An adapter: a folder, a name in the store, an id of the hub, or the value itself."""


@dataclass(frozen=True)
class SourceAdapter:
    """An adapter, and what it is called in messages."""

    name: str
    adapter: Adapter

    @classmethod
    def of(cls, source: AdapterLike, *, allow: Collection[str] = ()) -> SourceAdapter:
        check_allowances(allow)
        if isinstance(source, Adapter):
            return cls(source.digest[:12], source)
        folder = resolve_adapter(source).folder
        return cls(label_adapter_folder(folder), Adapter.load(folder, allow=allow))

    def check_linear(self, verb: str) -> None:
        """Raise MergeError for a DoRA, whose update is not `B A`."""
        if self.adapter.config.use_dora:
            raise MergeError(
                f"{self.name!r} is a DoRA (use_dora): it rescales every row of the whole weight, so it is no low-rank "
                f"update and cannot be {verb}",
                hint="merge it into its base, and extract an adapter from the result",
            )

    def updates(self) -> dict[str, tuple[str, LowRankUpdate]]:
        """Kind and `scaling · B A` of every layer, by path."""
        config = self.adapter.config
        return {
            path: (pair.kind, LowRankUpdate.of(pair, config.scaling_of(path)))
            for path, pair in self.adapter.pairs().items()
        }


def find_common_base(parents: Sequence[SourceAdapter], *, allow: Collection[str]) -> Mapping[str, Any] | None:
    """The fingerprint of the base that these adapters were made for; None where none says it, or where they differ.

    Raises:
        BaseMismatchError: two were made for different bases, and `other-base` is not allowed.
    """
    known = [(parent, parent.adapter.base) for parent in parents if isinstance(parent.adapter.base, Mapping)]
    unknown = [parent for parent in parents if not isinstance(parent.adapter.base, Mapping)]
    told = []
    for parent, base in known[1:]:
        (first, origin), saved = known[0], {key.rpartition(".")[0] for key in parent.adapter.saved()}
        told += [
            f"{first.name!r} and {parent.name!r}: {why}"
            for why in list_fingerprint_mismatches(origin, base, ignore=saved)
        ]
    names = {parent.name: parent.adapter.config.base_model_name_or_path for parent in parents}
    if unknown and len({name for name in names.values() if name}) > 1:
        said = ", ".join(f"{name!r} for {escape_text(base)}" for name, base in names.items() if base)
        told.append(f"{said}; nothing else says whether these are one")
    if told and "other-base" not in allow:
        raise BaseMismatchError(
            "the adapters were made for different bases: " + "; ".join(told),
            hint="allow 'other-base' if you know that they fit one",
        )
    for name in dict.fromkeys(parent.name for parent in unknown if len(parents) > 1):
        logger.warning("%r does not say which base it was made for: only its shapes can be checked", name)
    if told:
        logger.warning("the adapters were made for different bases: %s", "; ".join(told))
        return None
    return known[0][1] if known else None


def describe_sources(parents: Sequence[SourceAdapter], weights: Sequence[float] | None = None) -> list[dict[str, Any]]:
    """What the record says of the parents: their digests, and the weight each came with."""
    weights = weights or [1.0] * len(parents)
    return [
        {"digest": parent.adapter.digest, "name": parent.name, "weight": weight}
        for parent, weight in zip(parents, weights, strict=True)
    ]
