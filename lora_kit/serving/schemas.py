"""The bodies of requests, in the names of OpenAI's API and of vLLM's additions to it."""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from lora_kit.errors import suggest_nearest
from lora_kit.serving.api_errors import ApiError
from lora_kit.serving.sampler import MAX_LOGPROBS, MAX_TOKENS, SamplingSettings

MAX_ANSWERS: Final = 16
_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "length_penalty": (1.0,),
    "use_beam_search": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "allowed_token_ids": ([],),
    "stop_token_ids": ([],),
    "add_special_tokens": (True, False),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "modalities": (["text"],),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "user": (),
    "safety_identifier": (),
    "prompt_cache_key": (),
    "request_id": (),
    "priority": (0,),
}
"""Fields that are not supported, with the values that ask for nothing; null is one of each."""
_ANY_TEXT: Final = ("user", "safety_identifier", "prompt_cache_key", "request_id")
"""Fields that only name something for the client's own use."""


class _SamplingBody(BaseModel):
    """What both kinds of completions have in common."""

    model_config = ConfigDict(extra="allow")

    model: str = Field(min_length=1, max_length=200)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_ANSWERS)
    seed: int | None = Field(None, ge=0, le=2**63 - 1)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: dict[str, bool] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0)
    lora_scale: float | None = Field(None, ge=-100, le=100)
    return_token_ids: bool | None = None

    def check_extra(self) -> None:
        """Let fields pass that ask for nothing.

        Raises:
            ApiError: one is unknown, or asks for something that is not supported.
        """
        for name, value in (self.model_extra or {}).items():
            if name not in _NEUTRAL:
                known = [*type(self).model_fields, *_NEUTRAL]
                hint = suggest_nearest(name, known)
                raise ApiError(400, f"unknown field {name!r}" + (f": {hint}" if hint else ""), param=name)
            is_text = name in _ANY_TEXT and isinstance(value, str)
            if value is not None and value not in _NEUTRAL[name] and not is_text:
                raise ApiError(400, f"{name} is not supported here: leave it out", param=name, code="unsupported")

    def build_settings(self, *, max_tokens: int) -> SamplingSettings:
        """Return how tokens are chosen.

        Raises:
            ConfigError: a value is out of range.
            ApiError: a key of `logit_bias` is not a token.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingSettings(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            seed=self.seed,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            logit_bias=self._parse_logit_bias(),
            logprobs=self.logprobs_count,
            stop=tuple(stop),
            ignore_eos=bool(self.ignore_eos),
            min_tokens=min(self.min_tokens or 0, max_tokens),
        )

    def _parse_logit_bias(self) -> dict[int, float]:
        try:
            return {int(token): bias for token, bias in (self.logit_bias or {}).items()}
        except ValueError:
            raise ApiError(400, "logit_bias: keys are ids of tokens", param="logit_bias") from None

    @property
    def logprobs_count(self) -> int | None:
        """How many most probable tokens are reported with each; None for none."""
        raise NotImplementedError


class CompletionBody(_SamplingBody):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def logprobs_count(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [item for item in self.prompt if isinstance(item, int)]
        return [ids] if ids else [item for item in self.prompt if not isinstance(item, int)]


class ChatMessage(BaseModel):
    """A message of a conversation; what else it has goes to the template."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None


class ChatCompletionBody(_SamplingBody):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def logprobs_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class ClassifyBody(BaseModel):
    """`POST /v1/classify`: texts, or lists of two texts."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1, max_length=200)
    input: str | list[str] | list[tuple[str, str]]
    user: str | None = None

    @property
    def texts(self) -> list[str | tuple[str, str]]:
        """The texts, each one or two."""
        return [self.input] if isinstance(self.input, str) else list(self.input)


class EmbeddingBody(BaseModel):
    """`POST /v1/embeddings`."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1, max_length=200)
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: None = None
    user: str | None = None

    @property
    def texts(self) -> list[str | list[int]]:
        """The texts, or their token ids."""
        if isinstance(self.input, str):
            return [self.input]
        ids = [item for item in self.input if isinstance(item, int)]
        return [ids] if ids else [item for item in self.input if not isinstance(item, int)]


class TokenizeBody(BaseModel):
    """`POST /tokenize`."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True


class DetokenizeBody(BaseModel):
    """`POST /detokenize`."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    tokens: list[int]


class LoadBody(BaseModel):
    """`POST /v1/load_lora_adapter`: `lora_path` is a name in the store."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str
    lora_path: str


class UnloadBody(BaseModel):
    """`POST /v1/unload_lora_adapter`."""

    model_config = ConfigDict(extra="ignore")

    lora_name: str


class AliasBody(BaseModel):
    """`PUT /v1/aliases/{alias}`."""

    model_config = ConfigDict(extra="forbid")

    label: str
