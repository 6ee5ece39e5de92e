"""The text of an answer as it grows: whole characters only, and nothing that may become a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from lora_kit.models.protocols import Tokenizer

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decodes tokens one by one.

    A few tokens before the new ones are decoded with them, since a token's text may depend on those before it; so the
    cost of a token does not depend on how long the answer is.

    Attributes:
        text: all that was handed out.
        stopped: whether a stop text was found; it and what follows are never handed out.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._context = 0  # where decoding begins
        self._decoded = 0  # up to which token the text is known
        self._held = ""  # decoded, and not handed out: the beginning of a stop text, perhaps

    def push(self, token: int) -> str:
        """Take a token, and return the text that it adds; empty while a character or a stop text may still be open."""
        self._ids.append(token)
        before = self._decode(self._context, self._decoded)
        now = self._decode(self._context, len(self._ids))
        if len(now) <= len(before) or now.endswith(_REPLACEMENT):
            return ""
        self._context, self._decoded = self._decoded, len(self._ids)
        return self._hand_out(now[len(before) :])

    def finish(self) -> str:
        """Return the text that was held back, since no token follows."""
        if self.stopped:
            return ""
        rest = self._decode(self._context, len(self._ids))[len(self._decode(self._context, self._decoded)) :]
        released = self._hand_out(rest)
        held, self._held = self._held, ""  # empty if that was a stop text
        self.text += held
        return released + held

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)

    def _hand_out(self, added: str) -> str:
        """Return what of the text can be handed out: up to a stop text, or to where one may begin."""
        text = self._held + added
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            text = text[: min(found)]
        else:
            open_end = max((_overlap(text, stop) for stop in self._stop), default=0)
            text, self._held = text[: len(text) - open_end], text[len(text) - open_end :]
        self.text += text
        return text


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text are the beginning of a stop text."""
    longest = min(len(text), len(stop) - 1)
    return next((count for count in range(longest, 0, -1) if text.endswith(stop[:count])), 0)
