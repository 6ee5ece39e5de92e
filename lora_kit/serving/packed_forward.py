"""One packed forward of a base: tokens of many requests, each run of them by its own adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Final

import torch
from torch import Tensor

from lora_kit.bank.bank import AdapterBank
from lora_kit.bank.routes import Lease
from lora_kit.errors import BaseModelError
from lora_kit.models.loading import Base
from lora_kit.serving.kv_rows import ATTENTION, KeyValueRows, PackedStep, PromptChunk, register_attention

_PROBE_TOKENS: Final = 16
_PROBE_TOLERANCE: Final = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""By dtype: how far logits may be off, in parts of the largest, because sums are in another order."""


class PackedForward:
    """Computes logits of packed tokens; the model has the attention of `kv_rows` until `close`.

    Args:
        base: a decoder.
        bank: of its adapters; None for the base alone.

    Raises:
        BaseModelError: its logits are others in a packed forward, since its attention is not plain, or it has none.
    """

    def __init__(self, base: Base, bank: AdapterBank | None) -> None:
        register_attention()
        self._base, self._bank = base, bank
        self._attention = base.model.config._attn_implementation
        expected = self._compute_by_itself()
        base.model.set_attn_implementation(ATTENTION)
        try:
            self._check_probe(expected)
        except BaseException:
            self.close()
            raise

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

    @property
    def _probe(self) -> list[int]:
        """A few tokens spread over the vocabulary."""
        vocabulary = self._base.model.config.get_text_config().vocab_size
        return [place * vocabulary // _PROBE_TOKENS for place in range(_PROBE_TOKENS)]

    @torch.inference_mode()
    def _compute_by_itself(self) -> Tensor:
        """Return the logits after the probe as the model computes them without this."""
        logits: Tensor = self._base.model(input_ids=self.to_tensor(self._probe).unsqueeze(0), use_cache=False).logits
        return logits[0, -1].float()

    @torch.inference_mode()
    def _check_probe(self, expected: Tensor) -> None:
        """Raise BaseModelError unless a prompt in two parts, then a token, give the logits of the whole."""
        cause: Exception | None = None
        try:
            difference = float((self._compute_in_parts() - expected).abs().max())
        except Exception as error:  # a model may do anything with an attention that it does not know
            cause, difference = error, math.inf
        bound = _PROBE_TOLERANCE[self._base.model.dtype] * float(expected.abs().max().clamp(min=1.0))
        if not difference <= bound:
            what = str(cause) if cause is not None else f"logits are {difference:.2g} off"
            raise BaseModelError(
                f"{self._base.name} cannot be served: its attention is not plain, or it has none: {what[:200]}",
                hint="decoders like Llama, Mistral, Qwen and Phi can; merge the adapter and use another server",
            )

    def _compute_in_parts(self) -> Tensor:
        """Return the logits after the probe: its first half, its second but for a token, then that token alone."""
        tokens, memory, device = self._probe, KeyValueRows(2, _PROBE_TOKENS), self._base.device
        half, last = _PROBE_TOKENS // 2, _PROBE_TOKENS - 1
        for start, end in ((0, half), (half, last)):
            chunk = PromptChunk(row=1, start=start, count=end - start, offset=0)
            step = PackedStep(memory, [], [], [chunk], device)
            self.compute(tokens[start:end], range(start, end), [end - start - 1], step, [(None, end - start)])
        step = PackedStep(memory, [1], [last], [], device)
        return self.compute(tokens[last:], [last], [0], step, [(None, 1)])[0]

    @torch.inference_mode()
    def measure_effect(self, lease: Lease) -> float:
        """Return the largest change of a logit by an adapter, over a few tokens spread over the vocabulary."""
        tokens = self._probe

        def compute_last(adapter: Lease | None) -> Tensor:
            chunk = PromptChunk(row=0, start=0, count=_PROBE_TOKENS, offset=0)
            step = PackedStep(KeyValueRows(1, _PROBE_TOKENS), [], [], [chunk], self._base.device)
            return self.compute(tokens, range(_PROBE_TOKENS), [_PROBE_TOKENS - 1], step, [(adapter, _PROBE_TOKENS)])

        return float((compute_last(lease) - compute_last(None)).abs().max())
