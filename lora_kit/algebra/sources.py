"""The adapters that another one is made of, the base they share, and what the record says of them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.adapter_like import AdapterLike, short_label_of
from lora_kit.adapter.adapter_location import resolve_adapter
from lora_kit.adapter.folder import check_allowances
from lora_kit.algebra.low_rank import LowRankUpdate
from lora_kit.errors import BaseMismatchError, MergeError
from lora_kit.io.text import escape_text
from lora_kit.targets.fingerprint import list_fingerprint_mismatches

logger = logging.getLogger(__name__)

Fingerprint = Mapping[str, object]
"""The `base` of `lora_kit.json`."""


@dataclass(frozen=True)
class SourceAdapter:
    """An adapter that another one is made of.

    Attributes:
        name: what messages call it.
        adapter: its value.
    """

    name: str
    adapter: Adapter

    @classmethod
    def of(cls, source: AdapterLike, *, allow: Collection[str] = ()) -> SourceAdapter:
        """Read an adapter given as a folder, a name in the store, a hub id or a value.

        Raises:
            UnknownAdapterError: it is not there.
            AdapterError: it cannot be read.
        """
        check_allowances(allow)
        source = source if isinstance(source, Adapter) else resolve_adapter(source).folder
        adapter = source if isinstance(source, Adapter) else Adapter.load(source, allow=allow)
        return cls(short_label_of(source, adapter), adapter)

    def check_linear(self, verb: str) -> None:
        """Raise MergeError for a DoRA, whose update is not `B A`.

        Args:
            verb: what cannot be done with it, for the message.
        """
        if self.adapter.config.use_dora:
            raise MergeError(
                f"{self.name!r} is a DoRA (use_dora): it rescales every row of the whole weight, which is not a "
                f"low-rank update and cannot be {verb}",
                hint="merge it into its base, and extract an adapter from the result",
            )

    def updates(self) -> dict[str, tuple[str, LowRankUpdate]]:
        """Return the kind of every layer and its `scaling · B A`, by path."""
        config = self.adapter.config
        return {
            path: (weights.kind, LowRankUpdate.of(weights, config.scaling_of(path)))
            for path, weights in self.adapter.pairs().items()
        }


def find_common_base(sources: Sequence[SourceAdapter], *, allow: Collection[str]) -> Fingerprint | None:
    """Return the fingerprint of the base that these adapters were made for.

    Returns:
        None where no adapter names its base, or where the bases differ and `other-base` is allowed.

    Raises:
        BaseMismatchError: two were made for different bases, and `other-base` is not allowed.
    """
    known = [(source, source.adapter.base) for source in sources if isinstance(source.adapter.base, Mapping)]
    unknown = [source for source in sources if not isinstance(source.adapter.base, Mapping)]
    mismatches = []
    for source, base in known[1:]:
        (first, first_base), saved = known[0], {key.rpartition(".")[0] for key in source.adapter.saved()}
        mismatches += [
            f"{first.name!r} and {source.name!r}: {why}"
            for why in list_fingerprint_mismatches(first_base, base, ignore=saved)
        ]
    names = {source.name: source.adapter.config.base_model_name_or_path for source in sources}
    if unknown and len({name for name in names.values() if name}) > 1:
        listed = ", ".join(f"{name!r} for {escape_text(base)}" for name, base in names.items() if base)
        mismatches.append(f"{listed}; nothing else says whether these are one")
    message = "the adapters were made for different bases: " + "; ".join(mismatches)
    if mismatches and "other-base" not in allow:
        raise BaseMismatchError(message, hint="allow 'other-base' if you know that they fit one")
    for name in dict.fromkeys(source.name for source in unknown if len(sources) > 1):
        logger.warning("%r does not say which base it was made for: only its shapes can be checked", name)
    if mismatches:
        logger.warning("%s", message)
        return None
    return known[0][1] if known else None


def describe_sources(sources: Sequence[SourceAdapter], weights: Sequence[float] = (1.0,)) -> list[dict[str, object]]:
    """Return what the record says of the adapters: digest, name, and the weight of each."""
    return [
        {"digest": source.adapter.digest, "name": source.name, "weight": weight}
        for source, weight in zip(sources, weights, strict=True)
    ]
