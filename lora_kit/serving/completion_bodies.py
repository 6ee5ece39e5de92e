"""The bodies of answers: completions and chat completions, whole or in chunks, as OpenAI's API has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_kit.models.protocols import Tokenizer
from lora_kit.serving.answering import Answers, ServedAnswer
from lora_kit.serving.engine import Event
from lora_kit.serving.sampler import ChosenToken


@dataclass(frozen=True)
class CompletionForm:
    """How answers are written.

    Attributes:
        tokenizer: of the base.
        model: as the client called it.
        created: seconds since 1970.
        fingerprint: of the base.
        is_chat: whether these are messages.
        has_logprobs: whether probabilities are reported.
        has_token_ids: whether token ids are.
    """

    tokenizer: Tokenizer
    model: str
    created: int
    fingerprint: str
    is_chat: bool
    has_logprobs: bool
    has_token_ids: bool = False

    def write_whole(self, answers: Answers) -> dict[str, Any]:
        """Return the body of an answer that is not streamed."""
        kind = "chat.completion" if self.is_chat else "text_completion"
        choices = [self._write_choice(answer) for answer in answers.all]
        return {**self._write_head(answers, kind), "choices": choices, "usage": answers.usage}

    def write_first_chunk(self, answers: Answers, answer: ServedAnswer) -> dict[str, Any]:
        """Return the chunk that begins a message."""
        choice = {"index": answer.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return {**self._write_head(answers, "chat.completion.chunk"), "choices": [choice]}

    def write_chunk(self, answers: Answers, answer: ServedAnswer, event: Event) -> dict[str, Any]:
        """Return the chunk of one event."""
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        tokens = [event.chosen] if event.chosen is not None else []
        choice: dict[str, Any] = {"index": answer.index}
        choice |= {"delta": {"content": event.text}} if self.is_chat else {"text": event.text}
        choice |= self._write_details(tokens, offset=len(answer.text) - len(event.text))
        choice["finish_reason"] = event.finish.reason if event.finish else None
        return {**self._write_head(answers, kind), "choices": [choice]}

    def write_usage(self, answers: Answers) -> dict[str, Any]:
        """Return the chunk that ends a stream whose client asked for the usage."""
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {**self._write_head(answers, kind), "choices": [], "usage": answers.usage}

    def _write_head(self, answers: Answers, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        return {
            "id": f"{prefix}-{answers.request_id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _write_choice(self, answer: ServedAnswer) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": answer.index}
        if self.is_chat:
            choice["message"] = {"role": "assistant", "content": answer.text}
        else:
            choice["text"] = answer.text
        choice |= self._write_details(answer.tokens, offset=0)
        choice["finish_reason"] = answer.finish.reason if answer.finish else None
        return choice

    def _write_details(self, tokens: Sequence[ChosenToken], *, offset: int) -> dict[str, Any]:
        details: dict[str, Any] = {"logprobs": None}
        if self.has_logprobs:
            details["logprobs"] = (
                self._write_chat_logprobs(tokens) if self.is_chat else self._write_logprobs(tokens, offset)
            )
        if self.has_token_ids:
            details["token_ids"] = [chosen.token for chosen in tokens]
        return details

    def _write_chat_logprobs(self, tokens: Sequence[ChosenToken]) -> dict[str, Any]:
        def write(token: int, logprob: float | None) -> dict[str, Any]:
            text = self._decode(token)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8"))}

        return {
            "content": [
                {**write(chosen.token, chosen.logprob), "top_logprobs": [write(*top) for top in chosen.top]}
                for chosen in tokens
            ]
        }

    def _write_logprobs(self, tokens: Sequence[ChosenToken], offset: int) -> dict[str, Any]:
        texts, offsets = [self._decode(chosen.token) for chosen in tokens], []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [chosen.logprob for chosen in tokens],
            "top_logprobs": [{self._decode(token): value for token, value in chosen.top} for chosen in tokens],
            "text_offset": offsets,
        }

    def _decode(self, token: int) -> str:
        return self.tokenizer.decode([token])
