"""Decoding: complete one batch of prompts, each to its own end, with whatever is attached to a loaded base."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lora_kit.config.validation import check_range, require
from lora_kit.errors import VerificationError
from lora_kit.generation.prompts import EncodedPrompt, find_end_tokens
from lora_kit.models.loading import Base
from lora_kit.models.protocols import Tokenizer
from lora_kit.models.tasks import SEQ2SEQ
from lora_kit.torch_utils import is_finite, preserve_random_states

if TYPE_CHECKING:
    from transformers import GenerationConfig


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: most tokens of a completion.
        temperature: 0 decodes greedily; above 0 samples, after dividing the logits by it.
        top_p: samples from the fewest most likely tokens whose probabilities add up to at least this.
        seed: seed of the sampling; the same seed and the same batch give the same text on one machine.

    Raises:
        ConfigError: on construction, for a value out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        finite = math.isfinite(self.temperature) and self.temperature >= 0
        require(finite, "temperature", self.temperature, "0 or a finite number above it")
        check_range("top_p", self.top_p, 0, 1, excludes_low=True)
        check_range("seed", self.seed, 0, 2**63 - 1)


@dataclass(frozen=True)
class Completion:
    """The completion of a prompt.

    Attributes:
        text: the decoded tokens, without special tokens.
        ids: its tokens, including the one that ended it.
        ended: whether a token ended it; False if it was cut off.
    """

    text: str
    ids: list[int]
    ended: bool


class TokenStreamer(Protocol):
    """What transformers calls while it generates."""

    def put(self, value: Tensor) -> None:
        """Receive the prompts, once, then one new token for each row: int64 (rows,)."""

    def end(self) -> None:
        """Receive the end of the generation."""


def generate_batch(
    base: Base, rows: Sequence[EncodedPrompt], *, sampling: Sampling, limit: int, streamer: TokenStreamer | None = None
) -> list[Completion]:
    """Complete each prompt, as one batch, with whatever is routed to its rows.

    The state of the random generator is restored afterwards.

    Args:
        limit: most tokens of a completion, so that the longest row still fits into the base's context.
        streamer: receives each token as it is generated.

    Raises:
        VerificationError: the logits of a row have NaN or infinity, so that no token is the right one.
    """
    inputs = _pad_rows(base, [row.ids for row in rows])
    # Rows with other end tokens continue past their own end; `_build_completion` cuts that off.
    ends = frozenset.intersection(*(row.ends for row in rows))
    start = 1 if base.task == SEQ2SEQ else inputs["input_ids"].shape[1]
    with preserve_random_states(base.device):
        torch.manual_seed(sampling.seed)
        config = _build_generation_config(base, sampling, start + limit, ends=ends)
        out = base.model.generate(
            **inputs, generation_config=config, streamer=streamer, logits_processor=[_check_logits]
        )
    return [
        _build_completion(base.tokenizer, ids, row.ends) for ids, row in zip(out[:, start:].tolist(), rows, strict=True)
    ]


def _check_logits(ids: Tensor, logits: Tensor) -> Tensor:
    """Return logits as they are; raise VerificationError where those of a row have no largest value."""
    # A token may be excluded by -inf; NaN and infinity are what the largest value shows.
    if not is_finite(logits.amax(dim=-1)):
        raise VerificationError(
            "the logits have NaN or infinity",
            hint="is a file of the base or of an adapter damaged, or fp16 too narrow?",
        )
    return logits


def decode_ids(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Decode tokens, without special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True)


def _build_completion(tokenizer: Tokenizer, ids: Sequence[int], ends: Collection[int]) -> Completion:
    """Keep the tokens up to and including the first end token; what follows is padding or was never meant."""
    end = next((index for index, token in enumerate(ids) if token in ends), None)
    own = list(ids if end is None else ids[: end + 1])
    return Completion(decode_ids(tokenizer, own), own, end is not None)


def _pad_rows(base: Base, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask`, int64 (rows, longest): padded on the left for a decoder, else right."""
    longest, pad = max(map(len, rows)), _find_pad_token(base)
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        own = slice(0, len(row)) if base.task == SEQ2SEQ else slice(longest - len(row), longest)
        ids[index, own] = torch.tensor(row)
        mask[index, own] = 1
    return {"input_ids": ids.to(base.device), "attention_mask": mask.to(base.device)}


def _build_generation_config(base: Base, sampling: Sampling, length: int, *, ends: Collection[int]) -> GenerationConfig:
    from transformers import GenerationConfig

    options: dict[str, object] = {"do_sample": False}
    if sampling.temperature > 0:
        options = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    if base.task == SEQ2SEQ:
        own = base.model.generation_config
        start = getattr(own, "decoder_start_token_id", None)
        options["decoder_start_token_id"] = base.model.config.decoder_start_token_id if start is None else start
        options["forced_bos_token_id"] = getattr(own, "forced_bos_token_id", None)
    return GenerationConfig(
        max_length=length, eos_token_id=sorted(ends) or None, pad_token_id=_find_pad_token(base), **options
    )


def _find_pad_token(base: Base) -> int:
    pad = base.tokenizer.pad_token_id
    return int(pad) if pad is not None else min(find_end_tokens(base), default=0)
