"""Token embeddings in a merge: collected from the adapters, written in place of the base's rows, and checked.

They replace rows of an embedding and of every layer tied to it, so these need not be untied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lora_kit.adapter.peft_keys import TokenEmbeddings
from lora_kit.errors import MergeError, VerificationError, format_list
from lora_kit.layers.fold import round_to_dtype
from lora_kit.merging.checkpoint.meta_model import MetaModel
from lora_kit.merging.planned_tensors import PlannedTensor, WeightedAdapter
from lora_kit.merging.writing.fold_blocks import ReserveMemory, split_rows
from lora_kit.targets.coverage import Coverage, survey_adapter

TokenEmbeddingsByKey = dict[str, TokenEmbeddings]
"""Token embeddings by the state dict key of their table."""


def add_token_embeddings(rows: TokenEmbeddingsByKey, weighted: WeightedAdapter, coverage: Coverage) -> None:
    """Add the token embeddings of an adapter, under every key of their table.

    Raises:
        MergeError: they come with a weight, or another adapter replaces one of the rows too.
    """
    if coverage.tokens and weighted.weight != 1:
        paths = format_list([target.path for target in coverage.tokens])
        raise MergeError(f"{weighted.name!r} replaces rows of {paths}, which cannot be weighted", hint="give weight 1")
    tokens = weighted.adapter.tokens()
    for target in coverage.tokens:
        own = tokens[target.path]
        for key in (f"{path}.weight" for path in target.all_paths):
            rows[key] = _concatenate_rows(key, rows[key], own) if key in rows else own


def collect_token_embeddings(base: MetaModel, adapters: Sequence[WeightedAdapter]) -> TokenEmbeddingsByKey:
    """Return the token embeddings of adapters, by the state dict keys of a model."""
    rows: TokenEmbeddingsByKey = {}
    for weighted in adapters:
        add_token_embeddings(rows, weighted, survey_adapter(base.model, weighted.adapter))
    return rows


def _concatenate_rows(key: str, one: TokenEmbeddings, other: TokenEmbeddings) -> TokenEmbeddings:
    twice = sorted({*one.indices} & {*other.indices})
    if twice:
        raise MergeError(f"two of the adapters replace row {twice[0]} of {key}", hint="merge them one after the other")
    return TokenEmbeddings((*one.indices, *other.indices), torch.cat([one.rows.float(), other.rows.float()]))


def has_equal_rows(rows: Mapping[str, TokenEmbeddings], keys: Sequence[str]) -> bool:
    """Whether keys of one parameter all get the same rows, so that they can stay tied."""
    first, *others = [rows.get(key) for key in keys]
    return first is not None and all(
        one is not None and one.indices == first.indices and torch.equal(one.rows, first.rows) for one in others
    )


class TokenReplacement:
    """A table in which an adapter's token embeddings replace some rows.

    Attributes:
        retention: what survives of the change of these rows.
    """

    def __init__(self, entry: PlannedTensor) -> None:
        assert entry.rows is not None
        assert isinstance(entry.source, Tensor)
        self._entry, self._source = entry, entry.source
        indices, order = torch.tensor(entry.rows.indices).sort()
        self._indices = indices
        before = self._source[indices].float()
        self._rows, self.retention = round_to_dtype(entry.path, before, entry.rows.rows[order].float(), entry.dtype)

    def write_into(self, reserve: ReserveMemory) -> Iterator[int]:
        """Write the table block by block, each into memory that is reserved for it; yield the bytes of each."""
        for rows in split_rows(*self._source.shape):
            own = self._source[rows]
            block = reserve(own.numel(), self._entry.dtype).view(own.shape).copy_(own)
            first, last = (int(torch.searchsorted(self._indices, end)) for end in (rows.start, rows.stop))
            block[self._indices[first:last] - rows.start] = self._rows[first:last]
            yield block.nbytes


def check_token_embeddings(key: str, written: Tensor, own: Tensor, embeddings: TokenEmbeddings, sampled: Tensor) -> int:
    """Check that a table is the base's with an adapter's rows.

    Args:
        key: of the table.
        written: the table as it was read back.
        own: the base's table.
        embeddings: the adapter's rows.
        sampled: indices of the rows to compare with the base's, where the adapter does not replace them.

    Returns:
        How many values were compared.

    Raises:
        VerificationError: it is another table.
    """
    indices = torch.tensor(embeddings.indices)
    unchanged = sampled[~torch.isin(sampled, indices)]
    same = torch.equal(written[indices], embeddings.rows.to(written.dtype)) and has_same_bytes(
        written[unchanged], own[unchanged].to(written.dtype)
    )
    if written.shape != own.shape or not same:
        raise VerificationError(f"{key} was written with other rows than it should have")
    return written.shape[1] * (len(indices) + len(unchanged))


def has_same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same bytes; NaN, which a base may hold, does not equal itself."""
    one, other = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(one, other)
