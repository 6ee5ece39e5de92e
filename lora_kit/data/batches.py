"""Samples that a model can be trained on: tokens with their labels, and padded batches of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lora_kit.models.tasks import LABEL, TARGET

IGNORE_INDEX: Final = -100
"""The label of a position without a loss."""


@dataclass(frozen=True)
class EncodedDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Samples, stored one after another.

    Attributes:
        ids: tokens of all samples: int32 (tokens,).
        offsets: index of the first token of each sample, and the number of tokens: int64 (samples + 1,).
        labels: labels of all samples, `IGNORE_INDEX` where there is no loss: int32 (labels,).
        kind: `token` or `word`: one label for each token; `label`: one for each sample; `target`: one for each token
            that a decoder shall write.
        label_offsets: index of the first label of each sample, and the number of labels: int64 (samples + 1,).
    """

    ids: Tensor
    offsets: Tensor
    labels: Tensor
    kind: str
    label_offsets: Tensor

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return `input_ids`, int64 (length,), and `labels`, int64 (labels,), or () for a label of the whole text."""
        labels = self.labels[_slice_at(self.label_offsets, index)].long()
        return {
            "input_ids": self.ids[_slice_at(self.offsets, index)].long(),
            "labels": labels[0] if self.kind == LABEL else labels,
        }

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[index] for index in range(len(self)))

    def only(self, indices: Sequence[int]) -> EncodedDataset:
        """Return the samples at these indices, in this order."""
        ids, labels = (
            [values[_slice_at(offsets, index)].tolist() for index in indices]
            for values, offsets in ((self.ids, self.offsets), (self.labels, self.label_offsets))
        )
        return join_samples(list(zip(ids, labels, strict=True)), kind=self.kind)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sample, without those that a decoder shall write: int64 (samples,)."""
        return self.offsets.diff()

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples, with those that a decoder shall write."""
        return len(self.ids) + (len(self.labels) if self.kind == TARGET else 0)

    @property
    def num_labels(self) -> int:
        """Positions with a loss: tokens to be written, words, or texts."""
        return int((self.labels != IGNORE_INDEX).sum())


def _slice_at(offsets: Tensor, index: int) -> slice:
    return slice(int(offsets[index]), int(offsets[index + 1]))


def join_samples(samples: Sequence[tuple[Sequence[int], Sequence[int]]], *, kind: str) -> EncodedDataset:
    """Return samples of (tokens, labels) as one data set."""
    return EncodedDataset(
        ids=torch.tensor([token for ids, _ in samples for token in ids], dtype=torch.int32),
        offsets=_compute_offsets([len(ids) for ids, _ in samples]),
        labels=torch.tensor([label for _, labels in samples for label in labels], dtype=torch.int32),
        kind=kind,
        label_offsets=_compute_offsets([len(labels) for _, labels in samples]),
    )


def _compute_offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


@dataclass(frozen=True)
class Collator:
    """Pads samples on the right to the longest: `input_ids`, `attention_mask` and `labels`, as transformers takes them.

    Padding is recognized by its position, not by its id, so the pad token may also be the EOS.

    Attributes:
        pad_token_id: the token of padding.
        decoder_inputs: for samples of the kind `target`: returns what the decoder reads, given the labels.
    """

    pad_token_id: int
    decoder_inputs: Callable[[Tensor], Tensor] | None = None

    def __call__(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return a batch, all int64 (rows, longest).

        `labels` are (rows,) if each text has one label, and (rows, longest target) for a decoder, with
        `decoder_input_ids` of that shape. Packed rows keep their `position_ids`; give a model those in place of the
        mask.
        """
        ids = [sample["input_ids"] for sample in samples]
        labels = [sample["labels"] for sample in samples]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": torch.stack(labels)
            if labels[0].ndim == 0
            else pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        }
        if self.decoder_inputs is not None:
            batch["decoder_input_ids"] = self.decoder_inputs(batch["labels"])
        if "position_ids" in samples[0]:
            # Positions of 0: every token of padding begins a sample of its own.
            batch["position_ids"] = pad_sequence([sample["position_ids"] for sample in samples], batch_first=True)
        return batch
