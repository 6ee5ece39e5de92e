"""Choose the next token of a request from its logits: every request by its own settings, its neighbors never matter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from lora_kit.config.validation import check_range
from lora_kit.errors import ConfigError

MAX_LOGPROBS: Final = 20
MAX_STOPS: Final = 16
MAX_TOKENS: Final = 2**31 - 1
_MAX_STOP_LENGTH: Final = 200
_LOWEST_TEMPERATURE: Final = 1e-30
_LOWEST_REPETITION_PENALTY: Final = 0.01


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How the tokens of one request are chosen.

    Attributes:
        max_tokens: most tokens of the answer.
        temperature: 0 takes the most probable token; above 0 samples after dividing the logits by it.
        top_p: samples from the fewest most probable tokens whose probabilities add up to at least this.
        top_k: samples from so many most probable tokens; 0 for all.
        min_p: samples from tokens at least this probable, relative to the most probable one.
        seed: of the sampling; None for one that is drawn.
        presence_penalty: is taken from the logit of every token that the answer has.
        frequency_penalty: is taken from it as often as the answer has the token.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens in prompt or answer.
        logit_bias: is added to the logits of these tokens.
        logprobs: how many most probable tokens are reported with each token; None for no probabilities at all.
        stop: texts that end the answer and are no part of it.
        ignore_eos: whether an end token is a token like any other.
        min_tokens: tokens of the answer before an end token or a stop text may end it.

    Raises:
        ConfigError: on construction, for a value out of range.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    min_tokens: int = 0

    def __post_init__(self) -> None:
        check_range("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        check_range("temperature", self.temperature, 0, 100)
        check_range("top_p", self.top_p, 0, 1, excludes_low=True)
        check_range("top_k", self.top_k, 0, 2**31)
        check_range("min_p", self.min_p, 0, 1)
        check_range("presence_penalty", self.presence_penalty, -2, 2)
        check_range("frequency_penalty", self.frequency_penalty, -2, 2)
        check_range("repetition_penalty", self.repetition_penalty, _LOWEST_REPETITION_PENALTY, 10)
        check_range("min_tokens", self.min_tokens, 0, self.max_tokens)
        if self.seed is not None:
            check_range("seed", self.seed, 0, 2**63 - 1)
        if self.logprobs is not None:
            check_range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        for token, bias in self.logit_bias.items():
            check_range(f"logit_bias of {token}", bias, -100, 100)
        if len(self.stop) > MAX_STOPS or any(not 0 < len(text) <= _MAX_STOP_LENGTH for text in self.stop):
            raise ConfigError(f"stop has at most {MAX_STOPS} texts of 1 to {_MAX_STOP_LENGTH} characters")

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.temperature == 0

    @property
    def changes_logits(self) -> bool:
        """Whether logits are changed before a token is chosen."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return bool(penalties or self.logit_bias)


@dataclass(frozen=True)
class ChosenToken:
    """A token and how probable it was.

    Attributes:
        token: its id.
        logprob: natural logarithm of its probability before any setting; None unless asked for.
        top: the most probable tokens with theirs, the most probable first.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one request.

    Attributes:
        settings: of the request.
    """

    def __init__(self, settings: SamplingSettings, prompt: Sequence[int], end_tokens: frozenset[int]) -> None:
        self.settings = settings
        self._prompt = sorted(set(prompt))
        self._end_tokens = sorted(end_tokens)
        self._counts: dict[int, int] = {}
        self._generator = torch.Generator()
        if settings.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(settings.seed)

    def choose(self, logits: Tensor) -> ChosenToken:
        """Choose the next token.

        Args:
            logits: of the whole vocabulary, float (vocabulary,).

        Raises:
            ValueError: a logit is not a number.
        """
        logits = logits.float().cpu()
        changed = self._change_logits(logits)
        token = int(changed.argmax()) if self.settings.is_greedy else self._sample(changed)
        if not math.isfinite(float(changed[token])):
            raise ValueError("the logits are not finite")
        self._counts[token] = self._counts.get(token, 0) + 1
        return self._report(token, logits)

    def _change_logits(self, logits: Tensor) -> Tensor:
        """Return the logits with penalties and biases, and without end tokens before `min_tokens`."""
        settings, generated = self.settings, sum(self._counts.values())
        is_too_short = generated < settings.min_tokens and self._end_tokens
        if not settings.changes_logits and not is_too_short:
            return logits
        logits = logits.clone()
        if settings.repetition_penalty != 1:
            seen = torch.tensor(sorted({*self._prompt, *self._counts}))
            own = logits[seen]
            logits[seen] = torch.where(own > 0, own / settings.repetition_penalty, own * settings.repetition_penalty)
        for token, count in self._counts.items():
            logits[token] -= settings.presence_penalty + settings.frequency_penalty * count
        for token, bias in settings.logit_bias.items():
            logits[token] += bias
        if is_too_short:
            logits[self._end_tokens] = -math.inf
        return logits

    def _sample(self, logits: Tensor) -> int:
        """Draw a token of those that `min_p`, `top_k` and `top_p` leave, in this order."""
        settings = self.settings
        # The largest logit is 0, and the divisor a normal number: no temperature makes them infinite.
        scaled = (logits - logits.max()) / max(settings.temperature, _LOWEST_TEMPERATURE)
        probabilities, order = torch.softmax(scaled, dim=-1).sort(descending=True)
        keep = probabilities >= settings.min_p * probabilities[0]
        if settings.top_k:
            keep[settings.top_k :] = False
        before = (probabilities * keep).cumsum(0) - probabilities * keep
        keep &= before < settings.top_p * (probabilities * keep).sum()
        keep[0] = True  # also where top_p is 0 in fp32
        drawn = torch.multinomial(probabilities * keep, 1, generator=self._generator)
        return int(order[drawn])

    def _report(self, token: int, logits: Tensor) -> ChosenToken:
        count = self.settings.logprobs
        if count is None:
            return ChosenToken(token)
        logprobs = torch.log_softmax(logits, dim=-1)
        values, tokens = logprobs.topk(count)
        return ChosenToken(token, float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
