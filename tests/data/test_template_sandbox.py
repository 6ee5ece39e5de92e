"""Chat templates end: those that would not are refused, all others render what transformers renders."""

from __future__ import annotations

import pytest

from lora_kit.data import template_sandbox
from lora_kit.data.messages import Conversation, Message
from lora_kit.data.template_sandbox import TemplateLimitError, compile_template, render_template
from lora_kit.data.templates import ChatTemplate, MessageShape
from lora_kit.errors import DataError
from tests.support import texts
from tools import chat_templates

SET = "{% set ns = namespace(x='aaaa') %}"


@pytest.mark.parametrize(
    "text",
    [
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "{% macro again(n) %}{% for a in range(99) %}{{ n }}{% endfor %}{% endmacro %}"
        "{% for a in range(9999) %}{{ again(a) }}{% endfor %}",
        "{{ 'a' * 10**9 }}",
        "{{ 9**(9**9) }}",
        "{{ 'a'.ljust(10**10) }}",
        "{{ 'a'|center(10**10) }}",
        "{{ 'a'|indent(10**9) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '{:>9999999999}'.format(1) }}",
        SET + "{% set ns.x = ns.x ~ ns.x %}" * 60,
        SET + "{% set ns.x = ns.x + ns.x %}" * 60,
        SET + "{% set ns.x = ns.x|replace('a', ns.x) %}" * 60,
        SET + "{% set ns.x = ns.x.replace('a', ns.x) %}" * 60,
        SET + "{% set ns.x = [ns.x, ns.x] %}" * 60 + "{{ ns.x }}",
        SET + "{% set ns.x = [ns.x, ns.x] %}" * 60 + "{{ ns.x|string }}",
        SET + "{% set ns.x = ([ns.x] * 999)|join %}" * 9,
        "{% for a in range(9999) %}{{ 'a' * 9999 }}{% endfor %}",
    ],
)
def test_a_template_that_would_not_end_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_STEPS", 20_000)
    with pytest.raises(TemplateLimitError):
        render_template(compile_template(text), {})


TALK = Conversation((Message("user", "hi"), Message("assistant", "yo")))


def test_a_template_that_does_not_end_is_rendered_once_and_not_in_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_STEPS", 2_000)
    renderings: list[None] = []
    render = template_sandbox.render_template
    counted = "lora_kit.data.templates.render_template"
    monkeypatch.setattr(counted, lambda *given: (renderings.append(None), render(*given))[1])
    template = ChatTemplate("{% for a in range(9999) %}{{ a }}{% endfor %}", "the template")
    with pytest.raises(DataError, match="the template takes more than 2,000 steps"):
        template.render(texts.tokenizer(), TALK)
    assert len(renderings) == 1


@pytest.mark.parametrize("ask", ["render", "find_marks"])
@pytest.mark.parametrize(
    "text",
    ["{{ raise_exception('no ' * 9999) }}", "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "{{ 1 / 0 }}", "{% x"],
)
def test_what_a_template_raises_is_one_short_error_of_ours(text: str, ask: str) -> None:
    template = ChatTemplate("{% generation %}{% endgeneration %}" + text, "the template")
    assert template.list_variables() == []
    with pytest.raises(DataError, match=r"^the template: .{3,310}$"):
        getattr(template, ask)(texts.tokenizer(), TALK)


def test_a_long_conversation_is_no_attack() -> None:
    text = "{% for m in messages %}{% for other in messages %}{% endfor %}{{ m.content }}{% endfor %}"
    rendered = render_template(compile_template(text), {"messages": [{"content": "x" * 1000}] * 400})
    assert len(rendered) == 400_000


@pytest.mark.skipif(not chat_templates.load_trl_templates(), reason="TRL is not installed")
def test_templates_render_what_transformers_renders() -> None:
    cases = chat_templates.build_cases()
    for name, text in list(chat_templates.load_trl_templates().items())[::3]:
        tokenizer = chat_templates.build_byte_level_tokenizer(chat_templates.list_specials(text))
        for case in ("five", "tools", "reasoning"):
            conversation = cases[case]
            messages = [MessageShape().describe_message(message) for message in conversation.messages]
            given = {"messages": messages, "tools": conversation.tool_schemas, "add_generation_prompt": True}
            try:
                judge = tokenizer.apply_chat_template(
                    messages, tools=given["tools"], chat_template=text, tokenize=False, add_generation_prompt=True
                )
            except Exception as error:
                with pytest.raises(type(error)):
                    render_template(compile_template(text), {**tokenizer.special_tokens_map, **given})
                continue
            assert render_template(compile_template(text), {**tokenizer.special_tokens_map, **given}) == judge, name
