"""Chat templates: Jinja texts that render conversations, in the sandbox of transformers.

The template decides about the BOS: nothing is added to what it renders, in training or in generation. Templates differ
in what they take: most read a content as a text and some as a list of parts; most read the arguments of a tool call as
an object and some as JSON text. Which of them a template reads is tried out once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Final

from lora_kit.data.messages import Conversation, Message, ToolCall
from lora_kit.data.template_sandbox import TemplateLimitError, compile_template, render_marks, render_template
from lora_kit.errors import DataError, format_list, suggest_nearest
from lora_kit.io.text import shorten
from lora_kit.models.prompt_tokens import find_special_tokens
from lora_kit.models.protocols import Tokenizer

logger = logging.getLogger(__name__)

PLAIN: Final = "plain"
"""The name of the template of this package."""
_PLAIN_TEMPLATE: Final = (
    "{% for message in messages %}{{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    # transformers' Jinja removes a line break after a block, but not one in an expression.
    "{{ eos_token if message['role'] == 'assistant' }}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
_MAX_TEMPLATE_BYTES: Final = 2**20
_MAX_RAISED: Final = 300
"""Characters of what a template raises that are shown."""
_GENERATION_TAG: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")
_RESERVED: Final = (
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
)
"""Variables of a template that nobody may set: they are the conversation itself."""
_PROBE: Final = "zebra crossing"
PROBE_QUESTION: Final = Message("user", _PROBE)
PROBE_CALL: Final = ToolCall("find_zebra", '{"street": "crossing"}', "call00001")
PROBE_TOOLS: Final = (
    '[{"type": "function", "function": {"name": "find_zebra", "description": "Find.", "parameters": {"type": "object", '
    '"properties": {"street": {"type": "string", "description": "Where."}}, "required": ["street"]}}}]'
)


@dataclass(frozen=True)
class MessageShape:
    """How a template takes messages.

    Attributes:
        content_as_parts: as a list of parts, `{"type": "text", "text": …}`; otherwise as a text.
        arguments_as_text: arguments of a tool call as JSON text; otherwise as an object.
    """

    content_as_parts: bool = False
    arguments_as_text: bool = False

    def describe_message(self, message: Message) -> dict[str, object]:
        """Return a message as templates read it; they call what the assistant thought by any of three names."""
        parts = [{"type": "text", "text": message.content}] if message.content else []
        further = {
            "reasoning_content": message.reasoning,
            "thinking": message.reasoning,
            "reasoning": message.reasoning,
            "tool_calls": [call.to_json(arguments_as_text=self.arguments_as_text) for call in message.tool_calls],
            "name": message.name,
            "tool_call_id": message.tool_call_id,
        }
        content = parts if self.content_as_parts else message.content
        return {"role": message.role, "content": content, **{key: value for key, value in further.items() if value}}


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template, rendered in the sandbox of transformers and within limits.

    Attributes:
        text: the template itself.
        name: how errors call it.
        variables: what the template is given in every conversation, such as `enable_thinking`; a conversation's own
            variables win.
    """

    text: str
    name: str
    variables: Mapping[str, object] = field(default_factory=dict, hash=False)

    @property
    def has_marks(self) -> bool:
        """Whether the template marks what the assistant generates: `{% generation %}`."""
        return bool(_GENERATION_TAG.search(self.text))

    def render_prompt(self, tokenizer: Tokenizer, conversation: Conversation) -> str:
        """Render a conversation and the beginning of the next answer, which generation continues.

        Raises:
            DataError: the template rejects this conversation.
        """
        return self._render(tokenizer, conversation, find_shape(self, tokenizer), add_generation_prompt=True)

    def render(self, tokenizer: Tokenizer, conversation: Conversation) -> str:
        """Render a conversation; raises as `render_prompt` does."""
        return self._render(tokenizer, conversation, find_shape(self, tokenizer), add_generation_prompt=False)

    def find_marks(self, tokenizer: Tokenizer, conversation: Conversation) -> list[tuple[int, int]]:
        """Return where the rendered conversation is marked as generated: (start, end) in characters.

        Raises:
            DataError: the template rejects this conversation.
        """
        shape = find_shape(self, tokenizer)
        variables = self._collect_variables(tokenizer, conversation, shape, add_generation_prompt=False)
        with self._translate_errors():
            return render_marks(compile_template(self.text), variables)

    def render_as(self, tokenizer: Tokenizer, conversation: Conversation, shape: MessageShape) -> str | None:
        """Render a conversation whose messages have a shape; None if the template rejects it.

        Raises:
            DataError: the template goes on for too long, which it would in every shape.
        """
        try:
            return self._render(tokenizer, conversation, shape, add_generation_prompt=False)
        except DataError as error:
            if isinstance(error.__cause__, TemplateLimitError):
                raise
            return None

    def _render(
        self, tokenizer: Tokenizer, conversation: Conversation, shape: MessageShape, *, add_generation_prompt: bool
    ) -> str:
        variables = self._collect_variables(tokenizer, conversation, shape, add_generation_prompt=add_generation_prompt)
        with self._translate_errors():
            return render_template(compile_template(self.text), variables)

    @contextlib.contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Raise what a template raises, which may be anything, as DataError; one of a limit has its cause."""
        try:
            yield
        except Exception as error:
            cause = error if isinstance(error, TemplateLimitError) else None
            raise DataError(f"{self.name}: {shorten(error, most=_MAX_RAISED)}") from cause

    def _collect_variables(
        self, tokenizer: Tokenizer, conversation: Conversation, shape: MessageShape, *, add_generation_prompt: bool
    ) -> dict[str, object]:
        """Return all that the template is given; the same as transformers' `apply_chat_template` gives it."""
        own = conversation.variables
        self.check_variables(own)
        return {
            **tokenizer.special_tokens_map,
            **self.variables,
            **own,
            "messages": [shape.describe_message(message) for message in conversation.messages],
            "tools": conversation.tool_schemas,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }

    def check_variables(self, variables: Mapping[str, object]) -> None:
        """Raise DataError for a variable that the template does not read, or that is not the caller's to set."""
        if not variables:
            return
        known = self.list_variables()
        for name in variables:
            if name in _RESERVED:
                raise DataError(f"chat_template_kwargs: {name} is the conversation's own", hint="leave it out")
            if name not in known:
                hint = suggest_nearest(name, known) or f"it reads {format_list(known, most=len(known)) or 'none'}"
                raise DataError(f"chat_template_kwargs: {self.name} reads no variable {name!r}", hint=hint)

    def list_variables(self) -> list[str]:
        """Return the variables that the template reads and that may be set, sorted."""
        return sorted(_list_variables(self.text) - {*_RESERVED})

    def with_variables(self, variables: Mapping[str, object]) -> ChatTemplate:
        """Return the template with other variables."""
        return dataclasses.replace(self, variables=variables)


@lru_cache(maxsize=64)
def _list_variables(text: str) -> frozenset[str]:
    """Return the variables that a template reads and does not define itself."""
    from jinja2 import meta

    try:
        environment = compile_template(text).environment
        return frozenset(meta.find_undeclared_variables(environment.parse(text))) - {*environment.globals}
    except Exception:  # of Jinja, or of Python, which compiles it; rendering says what is wrong with it
        return frozenset()


@lru_cache(maxsize=8)
def find_shape(template: ChatTemplate, tokenizer: Tokenizer) -> MessageShape:
    """Return how a template takes messages: as texts and objects unless only the other shape is rendered."""
    question = Conversation((PROBE_QUESTION,))
    shapes = [MessageShape(), MessageShape(content_as_parts=True)]
    shape = next(
        (each for each in shapes if _PROBE in (template.render_as(tokenizer, question, each) or "")), shapes[0]
    )
    calling = Conversation((PROBE_QUESTION, Message("assistant", "", tool_calls=(PROBE_CALL,))), tools=PROBE_TOOLS)
    if template.render_as(tokenizer, calling, shape) is None:
        other = MessageShape(shape.content_as_parts, arguments_as_text=True)
        return shape if template.render_as(tokenizer, calling, other) is None else other
    return shape


def find_chat_template(tokenizer: Tokenizer) -> str | None:
    """Return the default chat template of a tokenizer, or None if it has none."""
    own = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own


def chat_template(
    given: str | None, tokenizer: Tokenizer, *, base: str, variables: Mapping[str, object] | None = None
) -> ChatTemplate:
    """Return the requested template.

    Args:
        given: None for the tokenizer's own, `plain`, the text of a template (it contains `{{` or `{%`), or its file.
        base: the name of the tokenizer's model.
        variables: what the template is given in every conversation, such as `enable_thinking`.

    Raises:
        DataError: the template does not exist, cannot be read, or reads no such variable.
    """
    text, name = _resolve_template(given, tokenizer, base)
    template = ChatTemplate(text, name, variables or {})
    template.check_variables(template.variables)
    return template


def _resolve_template(given: str | None, tokenizer: Tokenizer, base: str) -> tuple[str, str]:
    """Return the text of a template and its name."""
    if given is None:
        own = find_chat_template(tokenizer)
        if not own:
            hint = f"data.chat_template: {PLAIN}, or the path of a Jinja file"
            raise DataError(f"{base} has no chat template", hint=hint)
        if "strftime_now" in own:
            logger.warning("the chat template of %s writes the current date into every conversation", base)
        return own, f"the chat template of {base}"
    if given == PLAIN:
        prefix, _ = find_special_tokens(tokenizer)
        bos = "{{ bos_token }}" if prefix and prefix[0] == tokenizer.bos_token_id else ""
        return bos + _PLAIN_TEMPLATE, "the plain chat template"
    if _is_template(given):
        return given, "the chat template of the recipe"
    return _read_template(Path(given)), f"the chat template {given}"


def _is_template(text: str) -> bool:
    return "{{" in text or "{%" in text


def _read_template(path: Path) -> str:
    try:
        if not path.is_file():
            hint = f"{PLAIN}, the path of a Jinja file, or a template itself"
            raise DataError(f"chat_template {str(path)!r}: no such file", hint=hint)
        with path.open("rb") as file:
            text = file.read(_MAX_TEMPLATE_BYTES + 1).decode("utf-8")
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"chat_template {str(path)!r} cannot be read: {error}") from None
    if len(text) > _MAX_TEMPLATE_BYTES or not _is_template(text):
        raise DataError(f"{path} is not a chat template", hint="it is a Jinja template, of at most 1 MB")
    return text
