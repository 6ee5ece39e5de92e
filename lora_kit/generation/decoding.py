"""One batch of prompts, each written on to its own end; a loaded base with whatever is attached to it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_kit.errors import ConfigError
from lora_kit.generation.prompts import EncodedPrompt, end_tokens_of
from lora_kit.models.loading import Base
from lora_kit.models.tasks import SEQ2SEQ

if TYPE_CHECKING:
    from transformers import GenerationConfig


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: most tokens a row may write.
        temperature: 0 takes the likeliest token; above 0 samples, after dividing the logits by it.
        top_p: samples from the likeliest tokens whose probabilities first add up to this.
        seed: of the sampling; the same seed and the same batch give the same text on one machine.

    Raises:
        ConfigError: on construction, for a value out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        finite = math.isfinite(self.temperature) and self.temperature >= 0
        _require(finite, "temperature", self.temperature, "0 or a finite number above it")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "from 0 to below 2^63")


@dataclass(frozen=True)
class Completion:
    """What a row wrote: its text, its tokens with the one that ended it, and whether one did."""

    text: str
    ids: list[int]
    ended: bool


def generate_batch(
    base: Base, rows: Sequence[EncodedPrompt], *, sampling: Sampling, limit: int, streamer: Any = None
) -> list[Completion]:
    """What the model writes after each prompt, as one batch, with whatever is routed to its rows.

    The random generator is as it was afterwards.

    Args:
        limit: most tokens that a row may write, so that the longest one still fits into the base's context.
        streamer: one of transformers, which is shown each token as it comes.
    """
    inputs = _pad_rows(base, [row.ids for row in rows])
    # Where rows end differently, each goes on until its own end and what follows that is cut off.
    ends = frozenset.intersection(*(row.ends for row in rows))
    start = 1 if base.task == SEQ2SEQ else inputs["input_ids"].shape[1]
    with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        config = _build_generation_config(base, sampling, start + limit, ends=ends)
        out = base.model.generate(**inputs, generation_config=config, streamer=streamer)
    return [
        _build_completion(base.tokenizer, ids, row.ends) for ids, row in zip(out[:, start:].tolist(), rows, strict=True)
    ]


def decode_ids(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text


def _build_completion(tokenizer: Any, ids: Sequence[int], ends: Collection[int]) -> Completion:
    """The tokens up to and with the first that ends the text; what follows it is padding or another row's."""
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    own = list(ids if end is None else ids[: end + 1])
    return Completion(decode_ids(tokenizer, own), own, end is not None)


def _pad_rows(base: Base, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """int64 (rows, longest), with a mask: padding before a text that goes on, after one that an encoder reads."""
    longest, pad = max(map(len, rows)), _pad_token_of(base)
    before = base.task != SEQ2SEQ
    ids = [
        [pad] * (longest - len(row)) + list(row) if before else [*row, *[pad] * (longest - len(row))] for row in rows
    ]
    kept = [[0] * (longest - len(row)) + [1] * len(row) if before else [1] * len(row) + [0] * (longest - len(row))
            for row in rows]  # fmt: skip
    return {
        "input_ids": torch.tensor(ids, device=base.device),
        "attention_mask": torch.tensor(kept, device=base.device),
    }


def _build_generation_config(base: Base, sampling: Sampling, length: int, *, ends: Collection[int]) -> GenerationConfig:
    from transformers import GenerationConfig

    chosen: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        chosen = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    if base.task == SEQ2SEQ:
        own = base.model.generation_config
        chosen["decoder_start_token_id"] = _start_token_of(base.model)
        chosen["forced_bos_token_id"] = getattr(own, "forced_bos_token_id", None)
    return GenerationConfig(
        max_length=length, eos_token_id=sorted(ends) or None, pad_token_id=_pad_token_of(base), **chosen
    )


def _start_token_of(model: Any) -> int | None:
    """What a decoder begins with."""
    own = getattr(model.generation_config, "decoder_start_token_id", None)
    start: int | None = own if own is not None else model.config.decoder_start_token_id
    return start


def _pad_token_of(base: Base) -> int:
    pad = base.tokenizer.pad_token_id
    return int(pad) if pad is not None else min(end_tokens_of(base), default=0)


def _require(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{name} must be {expected}; {value!r} was given")
