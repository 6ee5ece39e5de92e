"""Ollama's Modelfile: the prompt format as a TEMPLATE, where it is one that is known.

A format is not guessed from its marks: the model's own chat template renders two conversations, and they must be what
the format makes of them, character for character (the BOS aside, which Ollama adds by itself).

Ollama knows no escapes in a value: it is what stands between quotes, without characters that do not print, and ends
with a line that ends with the quotes. A template is one of Go, whose strings say what a value cannot.
https://docs.ollama.com/modelfile
https://github.com/ollama/ollama/blob/main/parser/parser.go (`ParseFile`, `unquote`)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from lora_kit.data.messages import Conversation, Message
from lora_kit.data.templates import ChatTemplate
from lora_kit.errors import DataError
from lora_kit.exporters.plain_lora import ExportCase
from lora_kit.generation.prompts import find_separator, find_template, find_training_data
from lora_kit.merging.model_files import load_folder_tokenizer
from lora_kit.models.protocols import Tokenizer

MODELFILE: Final = "Modelfile"
GGUF_MODEL: Final = "model.gguf"
PROMPT_NOTE: Final = (
    "The Modelfile has the prompt format of the adapter's training as its TEMPLATE where that is ChatML, that "
    "of Llama 3, Gemma, Phi 3, Zephyr or lora_kit, or a separator after the prompt. Without a TEMPLATE in it, give "
    "Ollama prompts as the model expects them."
)
"""What whoever reads the README of a folder with a Modelfile has to know."""
_EOS: Final = "<eos>"
"""Stands for the tokenizer's own end of text in a format."""
_NO_NAME: Final = re.compile(r"[^A-Za-z0-9_.-]+")
_PARTS: Final = re.compile(r'\{+|"""|.', re.DOTALL)
_TURNS: Final = (Message("user", "What is it?"), Message("assistant", "A crossing."), Message("user", "And this?"))
_INSTRUCTION: Final = Message("system", "Answer in few words.")


@dataclass(frozen=True)
class ChatFormat:
    """A prompt format whose messages stand one after the other.

    Attributes:
        system, user, assistant: a message of each role, with `{}` for its content; None where there is no such role.
        opening: what the next answer begins after.
        stop: text that ends an answer.
    """

    system: str | None
    user: str
    assistant: str
    opening: str
    stop: str

    def with_end(self, end: str) -> ChatFormat:
        """Return the format with a tokenizer's end of text in it."""
        return ChatFormat(
            self.system, self.user, self.assistant.replace(_EOS, end), self.opening, self.stop.replace(_EOS, end)
        )

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt for the answer to these messages."""
        turns = {"system": self.system, "user": self.user, "assistant": self.assistant}
        return "".join((turns[m.role] or "").replace("{}", m.content) for m in messages) + self.opening

    def to_ollama(self) -> str:
        """Return the format as a template of Go."""
        roles = {"system": self.system, "user": self.user, "assistant": self.assistant}
        branches = [
            f'if eq .Role "{role}" }}}}{"{{ .Content }}".join(map(_escape_for_go, turn.split("{}")))}{{{{ '
            for role, turn in roles.items()
            if turn is not None
        ]
        loop = "{{ range .Messages }}{{ " + "else ".join(branches) + "end }}{{ end }}"
        return loop + _escape_for_go(self.opening)


FORMATS: Final = {
    "ChatML": ChatFormat(
        "<|im_start|>system\n{}<|im_end|>\n",
        "<|im_start|>user\n{}<|im_end|>\n",
        "<|im_start|>assistant\n{}<|im_end|>\n",
        "<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "Llama 3": ChatFormat(
        "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n{}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "Gemma": ChatFormat(
        None,
        "<start_of_turn>user\n{}<end_of_turn>\n",
        "<start_of_turn>model\n{}<end_of_turn>\n",
        "<start_of_turn>model\n",
        "<end_of_turn>",
    ),
    "Phi 3": ChatFormat(
        "<|system|>\n{}<|end|>\n",
        "<|user|>\n{}<|end|>\n",
        "<|assistant|>\n{}<|end|>\n",
        "<|assistant|>\n",
        "<|end|>",
    ),
    "Zephyr": ChatFormat(
        f"<|system|>\n{{}}{_EOS}\n", f"<|user|>\n{{}}{_EOS}\n", f"<|assistant|>\n{{}}{_EOS}\n", "<|assistant|>\n", _EOS
    ),
    "plain": ChatFormat("System:\n{}\n\n", "User:\n{}\n\n", f"Assistant:\n{{}}{_EOS}\n\n", "Assistant:\n", _EOS),
}
"""By name; `plain` is the template of this package."""


@dataclass(frozen=True)
class KnownFormat:
    """A chat template that is one of `FORMATS`.

    Attributes:
        name: of the format.
        format: with the tokenizer's end of text.
        system: the instruction that the template adds where a conversation has none; None where it adds none.
    """

    name: str
    format: ChatFormat
    system: str | None

    def to_ollama(self) -> str:
        """Return the format as a template of Go, which adds the instruction as well."""
        if not self.system:
            return self.format.to_ollama()
        turn = _escape_for_go((self.format.system or "").replace("{}", self.system))
        return "{{ if not .System }}" + turn + "{{ end }}" + self.format.to_ollama()


def make_ollama_name(name: str) -> str:
    """Return a name that Ollama takes for a model: letters, digits and `_.-` of ASCII, at most 80, a letter first.

    https://github.com/ollama/ollama/blob/main/types/model/name.go
    """
    return _NO_NAME.sub("-", name).strip("-.")[:80] or "adapter"


def find_style(case: ExportCase, model: Path) -> KnownFormat | str | None:
    """Return how prompts are presented: a known chat format, a separator, or None.

    Args:
        case: whose adapter it is.
        model: folder with the tokenizer.
    """
    template = find_template(case.adapter)
    if template is None and find_training_data(case.adapter) is not None:
        return find_separator(case.adapter)
    tokenizer = cast("Tokenizer | None", load_folder_tokenizer(model))
    if tokenizer is None:
        return None
    if template is None and isinstance(tokenizer.chat_template, str):
        template = ChatTemplate(tokenizer.chat_template, "the model's chat template")
    return recognize_format(template, tokenizer) if template is not None else None


def recognize_format(template: ChatTemplate, tokenizer: Tokenizer) -> KnownFormat | None:
    """Return the format that a chat template renders; None where that is not in `FORMATS`."""
    alone = _render(template, tokenizer, _TURNS)
    instructed = _render(template, tokenizer, (_INSTRUCTION, *_TURNS))
    if alone is None:
        return None
    for name, each in FORMATS.items():
        known = each.with_end(tokenizer.eos_token or "")
        if known.system is not None and instructed != known.render((_INSTRUCTION, *_TURNS)):
            continue
        if alone == known.render(_TURNS):
            return KnownFormat(name, known, None)
        system = _find_own_instruction(alone, known)
        if system is not None:
            return KnownFormat(name, known, system)
    return None


def _render(template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message]) -> str | None:
    """Return a prompt without its BOS; None where the template rejects the conversation."""
    try:
        text = template.render_prompt(tokenizer, Conversation(tuple(messages)))
    except DataError:
        return None
    bos = getattr(tokenizer, "bos_token", None)
    return text.removeprefix(bos) if bos else text


def _find_own_instruction(text: str, known: ChatFormat) -> str | None:
    """Return the instruction that a template put before a conversation that has none."""
    if known.system is None:
        return None
    before, _, after = known.system.partition("{}")
    pattern = f"{re.escape(before)}(.*?){re.escape(after)}{re.escape(known.render(_TURNS))}"
    match = re.fullmatch(pattern, text, re.DOTALL)
    return match[1] if match else None


def format_modelfile(style: KnownFormat | str | None, *, sources: Sequence[str] = (f"FROM ./{GGUF_MODEL}",)) -> str:
    """Return a Modelfile.

    Args:
        style: a chat format; the separator that a training put after each prompt; None where nothing is known.
        sources: the lines that name the model, and an adapter.
    """
    lines = [*sources]
    if isinstance(style, KnownFormat):
        lines.append(f'TEMPLATE """{style.to_ollama()}"""')
        if _is_value(style.format.stop):  # else it is the end of text, at which Ollama stops by itself
            lines.append(f'PARAMETER stop """{style.format.stop}"""')
    elif style is not None:
        lines.append(f'TEMPLATE """{{{{ .Prompt }}}}{_escape_for_go(style)}"""')
    return "\n".join(lines) + "\n"


def _is_value(text: str) -> bool:
    """Whether Ollama reads a text from a Modelfile as it is."""
    return bool(text) and text.isprintable() and '"' not in text


def _escape_for_go(text: str) -> str:
    """Return a text for a template in a Modelfile: what one of the two would read as its own is a string of Go."""
    return "".join(_quote_for_go(part) if _needs_quoting(part) else part for part in _PARTS.findall(text))


def _needs_quoting(part: str) -> bool:
    return part[0] == "{" or part == '"""' or not (part.isprintable() or part in "\n\t")


def _quote_for_go(text: str) -> str:
    characters = (c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text)
    return '{{ "' + "".join(characters) + '" }}'
