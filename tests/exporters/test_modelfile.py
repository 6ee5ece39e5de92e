"""Prompt formats in Ollama's Modelfile: its template renders what the model's own chat template does."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from lora_kit.data.messages import Conversation, Message
from lora_kit.data.templates import ChatTemplate
from lora_kit.exporters.modelfile import FORMATS, format_modelfile, recognize_format
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


def go_render(modelfile: str, messages: Sequence[Message]) -> str:
    """Render a Modelfile's template as Go does, as far as such templates go: a range over messages, and roles."""
    text = re.search(r'TEMPLATE """(.*?)"""', modelfile, re.S)
    assert text is not None
    loop = re.fullmatch(r"\{\{ range \.Messages \}\}\{\{ (if .*)\{\{ end \}\}\{\{ end \}\}(.*)", text[1], re.S)
    assert loop is not None
    branches = dict(re.findall(r'if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ else if|\Z)', loop[1], re.S))
    return "".join(branches.get(m.role, "").replace("{{ .Content }}", m.content) for m in messages) + loop[2]


@pytest.mark.parametrize("name", KNOWN)
def test_ollamas_template_renders_what_the_models_own_does(name: str) -> None:
    tokenizer = texts.tokenizer()
    template = ChatTemplate(TEMPLATES[name], name)
    known = recognize_format(template, tokenizer)
    assert known is not None
    assert known.name == KNOWN[name]
    modelfile = format_modelfile(known)
    system = re.search(r'SYSTEM """(.*?)"""', modelfile)
    talk = (Message("system", system[1]), *TALK) if system else TALK
    expected = template.render_prompt(tokenizer, Conversation(TALK))
    assert go_render(modelfile, talk) == expected.removeprefix(tokenizer.bos_token or "")
    assert f'PARAMETER stop "{known.format.stop}"' in modelfile


def test_an_instruction_that_the_template_adds_is_in_the_modelfile() -> None:
    template = ChatTemplate(TEMPLATES["qwen2_5"], "qwen")
    known = recognize_format(template, texts.tokenizer())
    assert known is not None
    assert known.system == "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


def test_a_template_that_differs_in_a_character_is_not_recognized() -> None:
    text = TEMPLATES["llama3"]
    assert recognize_format(ChatTemplate(text.replace("<|eot_id|>", "<|eot_id|> "), "x"), texts.tokenizer()) is None
    assert recognize_format(ChatTemplate("{{ raise_exception('no') }}", "x"), texts.tokenizer()) is None


def test_a_separator_stands_after_the_prompt() -> None:
    assert format_modelfile("\n") == 'FROM ./model.gguf\nTEMPLATE """{{ .Prompt }}\n"""\n'
    assert format_modelfile(None) == "FROM ./model.gguf\n"


def test_every_format_opens_the_answer_as_it_writes_one() -> None:
    for each in FORMATS.values():
        assert each.assistant.startswith(each.opening)
        assert each.assistant.removeprefix(each.opening).startswith(f"{{}}{each.stop}")
