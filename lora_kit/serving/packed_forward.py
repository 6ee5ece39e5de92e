"""One packed forward of a base: tokens of many requests, each run of them by its own adapter."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Final

import torch
from torch import Tensor

from lora_kit.bank.bank import AdapterBank
from lora_kit.bank.routes import Lease
from lora_kit.models.loading import Base
from lora_kit.serving.kv_rows import ATTENTION, KeyValueRows, PackedStep, PromptChunk, register_attention

_PROBE_TOKENS: Final = 16


class PackedForward:
    """Computes logits of packed tokens; the model has the attention of `kv_rows` until `close`.

    Args:
        base: a decoder.
        bank: of its adapters; None for the base alone.
    """

    def __init__(self, base: Base, bank: AdapterBank | None) -> None:
        register_attention()
        self._base, self._bank = base, bank
        self._attention = base.model.config._attn_implementation
        base.model.set_attn_implementation(ATTENTION)

    def close(self) -> None:
        """Give the model its own attention back."""
        self._base.model.set_attn_implementation(self._attention)

    def compute(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        last: Sequence[int],
        step: PackedStep,
        runs: Sequence[tuple[Lease | None, int]],
    ) -> Tensor:
        """Return the logits at some places of a packed forward, fp32 (places, vocabulary).

        Args:
            last: those places: the last token of each run.
            runs: which adapter computes how many tokens.
        """
        with nullcontext() if self._bank is None else self._bank.runs(runs):
            output = self._base.model(
                input_ids=self.to_tensor(tokens).unsqueeze(0),
                position_ids=self.to_tensor(positions).unsqueeze(0),
                use_cache=False,
                logits_to_keep=self.to_tensor(last),
                lora_kit_step=step,
            )
        logits: Tensor = output.logits[0].float()
        return logits

    def to_tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._base.device)

    @torch.inference_mode()
    def measure_effect(self, lease: Lease) -> float:
        """Return the largest change of a logit by an adapter, over a few tokens spread over the vocabulary."""
        vocabulary = self._base.model.config.get_text_config().vocab_size
        tokens = [place * vocabulary // _PROBE_TOKENS for place in range(_PROBE_TOKENS)]
        none = self.to_tensor([])

        def compute_last(adapter: Lease | None) -> Tensor:
            chunk = PromptChunk(row=0, start=0, count=_PROBE_TOKENS, offset=0)
            step = PackedStep(KeyValueRows(1, _PROBE_TOKENS), none, none, [chunk])
            return self.compute(tokens, range(_PROBE_TOKENS), [_PROBE_TOKENS - 1], step, [(adapter, _PROBE_TOKENS)])

        return float((compute_last(lease) - compute_last(None)).abs().max())
