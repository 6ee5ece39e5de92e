"""Samples as a padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lora_kit.data.encode import IGNORED


@dataclass(frozen=True)
class Collator:
    """Pads on the right to the longest sample: `input_ids`, `attention_mask` and, where tokens carry them, `labels`.

    Padding is known by its place, not by its id, so a pad token that is also the EOS does no harm.
    """

    pad_token_id: int

    def __call__(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """All int64: (rows, longest), and `labels` (rows,) where each text has one label."""
        ids = [sample["input_ids"] for sample in samples]
        labels = [sample["labels"] for sample in samples]
        whole = labels[0].ndim == 0
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": torch.stack(labels) if whole else pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }
