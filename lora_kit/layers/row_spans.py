"""Rows of a batch that are trained, as spans of tokens: each adapter's rows, which are neighbors, computed as alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from lora_kit.layers.initialization import MAGNITUDE, has_initialization, lora_weights_of
from lora_kit.layers.slot_entry import SlotEntry
from lora_kit.ops.lora_spans import LoraSpan


def is_plain_lora(entry: SlotEntry) -> bool:
    """Return whether an adapter is its LoRA weights here and nothing else."""
    return MAGNITUDE not in entry.tensors and not has_initialization(entry)


def can_span(entries: Sequence[SlotEntry | None]) -> bool:
    """Return whether rows can be computed as spans: those of each adapter are neighbors, and it is plain LoRA weights.

    Args:
        entries: what each row uses; None for the base.
    """
    runs = [entry for entry, _ in _iterate_runs(entries) if entry is not None]
    return len({id(entry) for entry in runs}) == len(runs) and all(map(is_plain_lora, runs))


def list_row_spans(entries: Sequence[SlotEntry | None], tokens: int, *, training: bool) -> list[LoraSpan]:
    """Return the spans of rows for which `can_span` holds; no span for rows of the base.

    Args:
        entries: what each row uses; None for the base.
        tokens: of all rows, each of which has as many.
        training: whether the layer is in training mode, in which its input is dropped.
    """
    size, start, spans = tokens // len(entries), 0, list[LoraSpan]()
    for entry, count in _iterate_runs(entries):
        end = start + count * size
        if entry is not None:
            dropout = entry.dropout if training else 0.0
            spans.append(LoraSpan(start, end, *lora_weights_of(entry), entry.scaling, dropout))
        start = end
    return spans


def _iterate_runs(entries: Sequence[SlotEntry | None]) -> Iterator[tuple[SlotEntry | None, int]]:
    """Yield what consecutive rows use, and how many they are."""
    for _, rows in itertools.groupby(entries, key=id):
        own = list(rows)
        yield own[0], len(own)
