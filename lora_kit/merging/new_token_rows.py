"""Rows of new tokens in a merge: whose they are, how they are written, and that what was written is them.

They replace the base's rows, in an embedding and in whatever shares its weight, so that these need not be untied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lora_kit.adapter.peft_keys import TokenEmbeddings
from lora_kit.errors import MergeError, VerificationError, format_list
from lora_kit.layers.fold import round_to_dtype
from lora_kit.merging.checkpoint.meta_model import MetaModel
from lora_kit.merging.planned_tensors import PlannedTensor, WeightedAdapter
from lora_kit.merging.writing.fold_blocks import split_rows
from lora_kit.targets.coverage import Coverage, survey_adapter

TokenEmbeddingsByKey = dict[str, TokenEmbeddings]
"""By state dict key of the table."""


def add_token_embeddings(rows: TokenEmbeddingsByKey, part: WeightedAdapter, coverage: Coverage) -> None:
    """Note the rows that an adapter has, of every key that stands for their table.

    Raises:
        MergeError: they come with a weight, or another adapter has some of them too.
    """
    if coverage.tokens and part.weight != 1:
        places = format_list([target.path for target in coverage.tokens])
        raise MergeError(f"{part.name!r} replaces rows of {places}, which cannot be weighted", hint="weight 1")
    for key, held in _token_embeddings_of(part, coverage).items():
        before = rows.get(key)
        rows[key] = held if before is None else _concatenate_rows(key, before, held)


def collect_token_embeddings(base: MetaModel, parts: Sequence[WeightedAdapter]) -> TokenEmbeddingsByKey:
    """What adapters put into the tables of a model, by state dict key."""
    found: TokenEmbeddingsByKey = {}
    for part in parts:
        add_token_embeddings(found, part, survey_adapter(base.model, part.adapter))
    return found


def _token_embeddings_of(part: WeightedAdapter, coverage: Coverage) -> TokenEmbeddingsByKey:
    tokens = part.adapter.tokens()
    return {f"{path}.weight": tokens[target.path] for target in coverage.tokens for path in target.all_paths}


def _concatenate_rows(key: str, one: TokenEmbeddings, other: TokenEmbeddings) -> TokenEmbeddings:
    twice = sorted({*one.indices} & {*other.indices})
    if twice:
        raise MergeError(f"two of the adapters replace row {twice[0]} of {key}", hint="merge them one after the other")
    return TokenEmbeddings((*one.indices, *other.indices), torch.cat([one.rows.float(), other.rows.float()]))


def has_equal_rows(rows: Mapping[str, TokenEmbeddings], group: Sequence[str]) -> bool:
    """Whether keys of one parameter all get the same rows, so that it stays one."""
    first, *others = [rows.get(key) for key in group]
    return first is not None and all(
        one is not None and one.indices == first.indices and torch.equal(one.rows, first.rows) for one in others
    )


class TokenReplacement:
    """A tensor with an adapter's rows in the places of some of its own."""

    def __init__(self, entry: PlannedTensor) -> None:
        assert entry.rows is not None
        assert isinstance(entry.source, Tensor)
        self._entry, self._source = entry, entry.source
        indices, order = torch.tensor(entry.rows.indices).sort()
        self._indices = indices
        before = self._source[indices].float()
        self._rows, self.retention = round_to_dtype(entry.path, before, entry.rows.rows[order].float(), entry.dtype)

    def into(self, room: Callable[[int, torch.dtype], Tensor]) -> Iterator[int]:
        """Put the tensor, block by block, into memory that is asked for; its bytes each time."""
        for rows in split_rows(*self._source.shape):
            part = self._source[rows]
            place = room(part.numel(), self._entry.dtype).view(part.shape).copy_(part)
            first, last = (int(torch.searchsorted(self._indices, end)) for end in (rows.start, rows.stop))
            place[self._indices[first:last] - rows.start] = self._rows[first:last]
            yield place.nbytes


def check_token_embeddings(key: str, found: Tensor, own: Tensor, held: TokenEmbeddings, places: Tensor) -> int:
    """Raise VerificationError unless a table is the base's with an adapter's rows; how many numbers were compared.

    Args:
        found: what was written. own: the base's.
        places: rows that are compared where they are the base's own.
    """
    indices = torch.tensor(held.indices)
    kept = places[~torch.isin(places, indices)]
    same = torch.equal(found[indices], held.rows.to(found.dtype)) and _has_same_bytes(
        found[kept], own[kept].to(found.dtype)
    )
    if found.shape != own.shape or not same:
        raise VerificationError(f"{key} was written with other rows than it should have")
    return found.shape[1] * (len(indices) + len(kept))


def _has_same_bytes(one: Tensor, other: Tensor) -> bool:
    """The same bytes: NaN, which a base may hold, is not equal to itself."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
