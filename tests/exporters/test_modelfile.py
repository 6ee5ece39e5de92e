"""Prompt formats in Ollama's Modelfile: its template renders what the model's own chat template does."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from lora_kit.data.messages import Conversation, Message
from lora_kit.data.templates import ChatTemplate
from lora_kit.exporters.modelfile import FORMATS, KnownFormat, format_modelfile, recognize_format
from tests.support import texts
from tools import chat_templates

TEMPLATES = chat_templates.load_trl_templates()
KNOWN = {"llama3": "Llama 3", "gemma": "Gemma", "phi3": "Phi 3", "qwen2_5": "ChatML"}
"""Templates of published models that TRL ships, and the format of each."""
TALK = (
    Message("user", "How many?"),
    Message("assistant", "Two."),
    Message("user", "Of {what}?"),
    Message("assistant", "Zebras."),
    Message("user", "Where?"),
)


def read_modelfile(text: str) -> dict[str, str]:
    """Return the values of a Modelfile by name, as Ollama's parser reads them: no escapes, and only what prints."""
    values, name, written = {}, "", ""
    for character in text:
        written += character if character.isprintable() or character in "\t\r\n" else ""
        if character not in "\r\n" or not written.strip():
            continue
        name, _, value = written.strip().partition(" ")
        if name == "PARAMETER":
            name, _, value = value.partition(" ")
        mark = '"""' if value.startswith('"""') else '"' if value.startswith('"') else ""
        if len(value) >= 2 * len(mark) and value.endswith(mark):
            values[name], written = value[len(mark) : len(value) - len(mark)], ""
    assert written == ""
    return values


def go_render(template: str, messages: Sequence[Message], prompt: str = "") -> str:
    """Render a template as Go does, as far as such templates go: a range over messages, roles, strings."""
    has_system = any(m.role == "system" for m in messages)
    default = re.match(r"\{\{ if not \.System \}\}(.*?)\{\{ end \}\}(?=\{\{ range)", template, re.S)
    rest = template[default.end() :] if default else template
    opening = go_text(default[1]) if default and not has_system else ""
    loop = re.fullmatch(r"\{\{ range \.Messages \}\}\{\{ (if .*)\{\{ end \}\}\{\{ end \}\}(.*)", rest, re.S)
    if loop is None:
        return go_text(rest, ".Prompt", prompt)
    branches = dict(re.findall(r'if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ else if|\Z)', loop[1], re.S))
    turns = (go_text(branches.get(m.role, ""), ".Content", m.content) for m in messages)
    return opening + "".join(turns) + go_text(loop[2])


def go_text(template: str, field: str = "", value: str = "") -> str:
    """Render a template of strings and one field."""
    parts = re.split(r"\{\{ (.*?) \}\}", template)
    assert not any("{{" in text for text in parts[::2])
    return "".join(go_action(part, field, value) if i % 2 else part for i, part in enumerate(parts))


def go_action(action: str, field: str, value: str) -> str:
    if action == field:
        return value
    text = re.fullmatch(r'"((?:[^"\\]|\\U[0-9a-f]{8})*)"', action)
    assert text is not None, action
    return re.sub(r"\\U([0-9a-f]{8})", lambda found: chr(int(found[1], 16)), text[1])


@pytest.mark.parametrize("name", KNOWN)
def test_ollamas_template_renders_what_the_models_own_does(name: str) -> None:
    tokenizer = texts.tokenizer()
    template = ChatTemplate(TEMPLATES[name], name)
    known = recognize_format(template, tokenizer)
    assert known is not None
    assert known.name == KNOWN[name]
    values = read_modelfile(format_modelfile(known))
    for talk in (TALK, (Message("system", "Be short."), *TALK)) if known.format.system else (TALK,):
        expected = template.render_prompt(tokenizer, Conversation(talk))
        assert go_render(values["TEMPLATE"], talk) == expected.removeprefix(tokenizer.bos_token or "")
    assert values["FROM"] == "./model.gguf"
    assert values["stop"] == known.format.stop


def test_an_instruction_that_the_template_adds_is_in_the_modelfile() -> None:
    template = ChatTemplate(TEMPLATES["qwen2_5"], "qwen")
    known = recognize_format(template, texts.tokenizer())
    assert known is not None
    assert known.system == "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


def test_a_template_that_differs_in_a_character_is_not_recognized() -> None:
    text = TEMPLATES["llama3"]
    assert recognize_format(ChatTemplate(text.replace("<|eot_id|>", "<|eot_id|> "), "x"), texts.tokenizer()) is None
    assert recognize_format(ChatTemplate("{{ raise_exception('no') }}", "x"), texts.tokenizer()) is None


@pytest.mark.parametrize("end", ["</s>", "<｜end▁of▁sentence｜>", 'say "end"', "a\\n", "no\u200bwidth", ""])
def test_an_end_of_text_is_the_stop_as_it_is_or_none(end: str) -> None:
    for name in ("Zephyr", "plain"):
        known = KnownFormat(name, FORMATS[name].with_end(end), None)
        values = read_modelfile(format_modelfile(known))
        assert values.get("stop", end) == end  # without one Ollama ends at the model's end of text
        assert ("stop" in values) == (end in ("</s>", "<｜end▁of▁sentence｜>", "a\\n"))
        assert go_render(values["TEMPLATE"], TALK) == known.format.render(TALK)


@pytest.mark.parametrize(
    "text", ['Say """ok"""\nor {{ .Nothing }} {', "Tab\tno-break\u00a0\u200d, \U0001f469\u200d\U0001f4bb\r\n"]
)
def test_an_instruction_is_added_whatever_is_in_it(text: str) -> None:
    known = KnownFormat("ChatML", FORMATS["ChatML"], text)
    template = read_modelfile(format_modelfile(known))["TEMPLATE"]
    assert go_render(template, TALK) == known.format.render((Message("system", text), *TALK))
    own = (Message("system", "Mine."), *TALK)
    assert go_render(template, own) == known.format.render(own)


@pytest.mark.parametrize("separator", ["\n", '"""\n=>', "{", "{{ .System }}", ' "', "\u2028\t\r\n", "}} -}}", '""""'])
def test_a_separator_stands_after_the_prompt(separator: str) -> None:
    values = read_modelfile(format_modelfile(separator))
    assert go_render(values["TEMPLATE"], (), prompt="What?") == f"What?{separator}"
    assert format_modelfile("\n") == 'FROM ./model.gguf\nTEMPLATE """{{ .Prompt }}\n"""\n'
    assert format_modelfile(None) == "FROM ./model.gguf\n"


def test_every_format_opens_the_answer_as_it_writes_one() -> None:
    for each in FORMATS.values():
        assert each.assistant.startswith(each.opening)
        assert each.assistant.removeprefix(each.opening).startswith(f"{{}}{each.stop}")
