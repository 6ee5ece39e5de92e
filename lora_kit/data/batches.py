"""Samples that a model can be trained on: tokens with their labels, and padded batches of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lora_kit.models.tasks import LABEL, LABEL_SET, TARGET, VALUE

IGNORE_INDEX: Final = -100
"""The label of a position without a loss."""
SAMPLE_WEIGHTS: Final = "sample_weights"
"""The key of a batch under which the weights of its samples are; a model does not take it."""
PREFIX_STATES: Final = "prefix_states"
"""The key of a batch under which what frozen layers gave for its samples is; a model does not take it."""
_COUNTED_AT_ONCE: Final = 2**22
"""Labels that are compared at once: those of samples on the disk may be more than fits in memory."""
_FLOAT_KINDS: Final = (LABEL_SET, VALUE)
"""The kinds whose labels are numbers to be predicted, not classes."""


@dataclass(frozen=True)
class EncodedDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Samples, stored one after another.

    Attributes:
        ids: tokens of all samples: int32 (tokens,).
        offsets: index of the first token of each sample, and the number of tokens: int64 (samples + 1,).
        labels: labels of all samples, `IGNORE_INDEX` where there is no loss: int32 (labels,). Of the kind `label-set`
            0 or 1 for each class, of the kind `value` a number: float32.
        kind: `token` or `word`: one label for each token; `label` or `value`: one for each sample; `label-set`: one for
            each class; `target`: one for each token that a decoder shall write.
        label_offsets: index of the first label of each sample, and the number of labels: int64 (samples + 1,).
        types: which of two texts each token belongs to, as the model's `token_type_ids`: int8 (tokens,); None where the
            tokenizer does not say.
        weights: weight of each sample in the loss: float32 (samples,); None where each has the weight 1.
    """

    ids: Tensor
    offsets: Tensor
    labels: Tensor
    kind: str
    label_offsets: Tensor
    types: Tensor | None = None
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return `input_ids`, int64 (length,), and `labels`, int64 (labels,), or () for a label of the whole text.

        Labels of the kinds `label-set` and `value` are float32: (classes,) and (). With types of tokens there is
        `token_type_ids`, int64 (length,); with weights `sample_weights`, float32 ().
        """
        tokens = _slice_at(self.offsets, index)
        labels = self.labels[_slice_at(self.label_offsets, index)]
        labels = labels if self.kind in _FLOAT_KINDS else labels.long()
        sample = {"input_ids": self.ids[tokens].long(), "labels": labels[0] if self.kind in (LABEL, VALUE) else labels}
        if self.types is not None:
            sample["token_type_ids"] = self.types[tokens].long()
        if self.weights is not None:
            sample[SAMPLE_WEIGHTS] = self.weights[index]
        return sample

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[index] for index in range(len(self)))

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
        """Positions with a loss: tokens to be written, words, texts, or the classes of all texts."""
        if self.kind in _FLOAT_KINDS:
            return len(self.labels)
        return sum(int((part != IGNORE_INDEX).sum()) for part in self.labels.split(_COUNTED_AT_ONCE))

    def select(self, indices: Sequence[int]) -> EncodedDataset:
        """Return the samples at these indices, in this order."""
        chosen = [self[index] for index in indices]
        samples = [(sample["input_ids"].tolist(), sample["labels"].reshape(-1).tolist()) for sample in chosen]
        types = None if self.types is None else [sample["token_type_ids"].tolist() for sample in chosen]
        weights = None if self.weights is None else self.weights[list(indices)].tolist()
        return join_samples(samples, kind=self.kind, types=types, weights=weights)


def _slice_at(offsets: Tensor, index: int) -> slice:
    return slice(int(offsets[index]), int(offsets[index + 1]))


def join_samples(
    samples: Sequence[tuple[Sequence[int], Sequence[float]]],
    *,
    kind: str,
    types: Sequence[Sequence[int]] | None = None,
    weights: Sequence[float] | None = None,
) -> EncodedDataset:
    """Return samples of (tokens, labels) as one data set.

    Args:
        types: of the tokens of each sample, as in `EncodedDataset`.
        weights: of each sample.
    """
    dtype = torch.float32 if kind in _FLOAT_KINDS else torch.int32
    return EncodedDataset(
        ids=torch.tensor([token for ids, _ in samples for token in ids], dtype=torch.int32),
        offsets=_compute_offsets([len(ids) for ids, _ in samples]),
        labels=torch.tensor([label for _, labels in samples for label in labels], dtype=dtype),
        kind=kind,
        label_offsets=_compute_offsets([len(labels) for _, labels in samples]),
        types=None if types is None else torch.tensor([each for row in types for each in row], dtype=torch.int8),
        weights=None if weights is None else torch.tensor(weights, dtype=torch.float32),
    )


def concatenate_samples(parts: Sequence[EncodedDataset]) -> EncodedDataset:
    """Return the samples of several data sets of one kind as one.

    Where some have weights, the others have 1; where some have types of tokens, those of the others are 0.
    """
    lengths = torch.cat([part.offsets.diff() for part in parts])
    label_counts = torch.cat([part.label_offsets.diff() for part in parts])
    types = [torch.zeros(len(part.ids), dtype=torch.int8) if part.types is None else part.types for part in parts]
    weights = [torch.ones(len(part)) if part.weights is None else part.weights for part in parts]
    return EncodedDataset(
        ids=torch.cat([part.ids for part in parts]),
        offsets=_compute_offsets(lengths.tolist()),
        labels=torch.cat([part.labels for part in parts]),
        kind=parts[0].kind,
        label_offsets=_compute_offsets(label_counts.tolist()),
        types=torch.cat(types) if any(part.types is not None for part in parts) else None,
        weights=torch.cat(weights) if any(part.weights is not None for part in parts) else None,
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
        takes_types: whether the model reads types of tokens; where it does not, a batch has none.
    """

    pad_token_id: int
    decoder_inputs: Callable[[Tensor], Tensor] | None = None
    takes_types: bool = True

    def __call__(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return a batch, all int64 (rows, longest).

        `labels` are (rows,) if each text has one label, and (rows, longest target) for a decoder, with
        `decoder_input_ids` of that shape; float32 (rows, classes) for sets of labels, and float32 (rows,) for numbers.
        Packed rows keep their `position_ids`; give a model those in place of the mask. Weights of the samples are
        `sample_weights`, float32 (rows,), and what frozen layers gave is `prefix_states`, (rows, longest, width); a
        model does not take them.
        """
        ids = [sample["input_ids"] for sample in samples]
        labels = [sample["labels"] for sample in samples]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": torch.stack(labels)
            if labels[0].ndim == 0 or labels[0].is_floating_point()
            else pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        }
        if self.decoder_inputs is not None:
            batch["decoder_input_ids"] = self.decoder_inputs(batch["labels"])
        if SAMPLE_WEIGHTS in samples[0]:
            batch[SAMPLE_WEIGHTS] = torch.stack([sample[SAMPLE_WEIGHTS] for sample in samples])
        if "token_type_ids" in samples[0] and self.takes_types:
            types = [sample["token_type_ids"] for sample in samples]
            batch["token_type_ids"] = pad_sequence(types, batch_first=True)
        if PREFIX_STATES in samples[0]:
            batch[PREFIX_STATES] = pad_sequence([sample[PREFIX_STATES] for sample in samples], batch_first=True)
        if "position_ids" in samples[0]:
            # Positions of 0: every token of padding begins a sample of its own.
            batch["position_ids"] = pad_sequence([sample["position_ids"] for sample in samples], batch_first=True)
        return batch
