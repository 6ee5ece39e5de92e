"""A conversation in a terminal: one history, any adapter for the next answer, the server's own engine."""

from __future__ import annotations

import itertools
import json
import queue
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.adapter_like import AdapterLike, short_label_of
from lora_kit.errors import ConfigError, DataError, suggest_nearest
from lora_kit.generation.adapter_args import read_adapter
from lora_kit.generation.prompts import EncodedPrompt
from lora_kit.io.atomic_write import write_file
from lora_kit.serving.engine import Event, RequestError
from lora_kit.serving.sampler import SamplingSettings
from lora_kit.serving.scaled_adapter import scale_adapter
from lora_kit.serving.served_model import ServedModel
from lora_kit.serving.tickets import Ticket

COMMANDS: Final = {
    "/use NAME": "let another adapter answer from now on; the history stays",
    "/base": "let the base answer",
    "/scale FACTOR": "make the adapter's update so many times as large",
    "/system TEXT": "begin the conversation with other instructions",
    "/undo": "take the last exchange back",
    "/clear": "forget the history",
    "/save FILE": "write the conversation as a line of JSONL that can be trained on",
    "/help": "list these commands",
    "/quit": "end",
}
"""What can be typed instead of a message."""


@dataclass
class ChatSession:
    """A conversation with a served model.

    Keys and values are kept by content: after a swap nothing of another adapter's is read.

    Attributes:
        served: the base and the thread that runs it.
        settings: how tokens are chosen; `max_tokens` is cut to what fits.
        store: where adapters are looked up by name.
        adapter: who answers; None for the base.
        label: what that one is called.
        scale: of the adapter's update.
        messages: the history.
    """

    served: ServedModel
    settings: SamplingSettings
    store: Path
    adapter: Adapter | None = None
    label: str = ""
    scale: float = 1.0
    messages: list[dict[str, str]] = field(default_factory=list)
    _presenting: Adapter | None = field(default=None, init=False, repr=False)
    _numbers: Iterator[int] = field(default_factory=itertools.count, init=False, repr=False)

    def use(self, adapter: AdapterLike | None) -> None:
        """Let an adapter answer from now on, or the base with None.

        Raises:
            UnknownAdapterError, AdapterError, ConfigError: it is not there, or cannot be read; nothing has changed.
        """
        read = read_adapter(adapter, store=self.store)
        if adapter is None or read is None:
            self.adapter, self.label, self.scale = None, self.served.base_name, 1.0
            return
        self.adapter, self.label, self.scale = read, short_label_of(adapter, read), 1.0
        self._presenting = read

    def set_scale(self, scale: float) -> None:
        """Set the factor of the adapter's update.

        Raises:
            ConfigError: the base answers, or the adapter cannot be scaled.
        """
        if self.adapter is None:
            raise ConfigError("the base answers, which has no scale", hint="/use NAME first")
        scale_adapter(self.adapter, scale)
        self.scale = scale

    def set_system(self, text: str) -> None:
        """Begin the conversation with other instructions; none with an empty text."""
        rest = [message for message in self.messages if message["role"] != "system"]
        self.messages = [{"role": "system", "content": text}, *rest] if text else rest

    def undo(self) -> None:
        """Take the last message of the user and its answer back."""
        last = max((n for n, message in enumerate(self.messages) if message["role"] == "user"), default=None)
        if last is not None:
            del self.messages[last:]

    def clear(self) -> None:
        """Forget the history, but for the instructions."""
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def save(self, path: Path) -> None:
        """Write the conversation as one line of JSONL.

        Raises:
            DataError: nothing was answered yet.
            StorageError: the file exists, or cannot be written.
        """
        if not any(message["role"] == "assistant" for message in self.messages):
            raise DataError("nothing was answered yet", hint="ask something first")
        line = json.dumps({"messages": self.messages}, ensure_ascii=False)
        write_file(path, f"{line}\n".encode())

    def ask(self, text: str) -> Generator[str, None, None]:
        """Yield the answer to a message as it grows; both are in the history once it is whole.

        An answer that the caller does not read to its end is cancelled, and nothing is added to the history.

        Raises:
            RequestError: the history does not fit, or the template rejects it.
            DataError: the answer failed.
        """
        asked: list[dict[str, str]] = [*self.messages, {"role": "user", "content": text}]
        adapter = self.adapter if self.adapter is None or self.scale == 1 else scale_adapter(self.adapter, self.scale)
        prompt = self._encode(asked)
        events = queue.SimpleQueue[Event]()
        ticket = Ticket(
            f"chat-{id(self):x}-{next(self._numbers)}",
            tuple(prompt.ids),
            self._fit_settings(len(prompt.ids)),
            adapter,
            prompt.ends,
            events.put,
        )
        self.served.worker.submit(ticket).result()
        answer, is_whole = "", False
        try:
            while not is_whole:
                event = events.get()
                answer += event.text
                if event.text:
                    yield event.text
                if event.finish is not None and event.finish.reason in ("error", "cancelled"):
                    raise DataError(f"the answer failed: {event.finish.message or event.finish.reason}")
                is_whole = event.finish is not None
        finally:
            if not is_whole:
                self.served.worker.cancel(ticket.request_id)
        self.messages = [*asked, {"role": "assistant", "content": answer}]

    def _encode(self, messages: Sequence[dict[str, str]]) -> EncodedPrompt:
        """Return the conversation as tokens; for the base as the adapter before it reads it."""
        presenting = self._presenting if self.adapter is None else self.adapter
        try:
            return self.served.prompts.encode_messages(messages, presenting, None)
        except RequestError as error:
            if error.code != "no_chat_template":
                raise
            hint = "/use an adapter that was trained on conversations; lora-kit generate takes a prompt"
            raise DataError(f"{self.label} has no chat template", hint=hint) from None

    def _fit_settings(self, prompt_tokens: int) -> SamplingSettings:
        left = self.served.choose_max_tokens(None, longest=prompt_tokens, is_chat=True)
        fields: dict[str, Any] = {**vars(self.settings), "max_tokens": min(self.settings.max_tokens, left)}
        return SamplingSettings(**fields)


def run_command(session: ChatSession, line: str) -> str:
    """Run a command of `COMMANDS`, and return what to show; `/quit` and `/help` are the caller's.

    Raises:
        ConfigError: it is unknown, or what follows it is invalid.
        LoraKitError: it failed; nothing has changed.
    """
    verb, _, rest = line.partition(" ")
    rest = rest.strip()
    if verb in ("/use", "/scale", "/save") and not rest:
        raise ConfigError(f"{verb} needs something after it", hint=_describe_command(verb))
    if verb == "/use":
        session.use(rest)
    elif verb == "/base":
        session.use(None)
    elif verb == "/scale":
        session.set_scale(_parse_factor(rest))
    elif verb == "/system":
        session.set_system(rest)
    elif verb == "/undo":
        session.undo()
    elif verb == "/clear":
        session.clear()
    elif verb == "/save":
        session.save(Path(rest))
        return f"written: {rest}"
    else:
        verbs = [command.split()[0] for command in COMMANDS]
        raise ConfigError(f"{verb} is not a command", hint=suggest_nearest(verb, verbs) or "/help lists them")
    scaled = "" if session.scale == 1 else f" × {session.scale:g}"
    return f"{session.label}{scaled} answers; {len(session.messages)} messages in the history"


def _describe_command(verb: str) -> str:
    return next(f"{usage}: {text}" for usage, text in COMMANDS.items() if usage.split()[0] == verb)


def _parse_factor(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{text!r} is not a number", hint="/scale 0.5") from None


def list_commands() -> Sequence[str]:
    """Return a line for each command."""
    width = max(map(len, COMMANDS))
    return [f"{usage:<{width}}  {text}" for usage, text in COMMANDS.items()]
