"""Templates that TRL ships, on tokenizers of three kinds: what is learned is what generation would have to write."""

from __future__ import annotations

import functools
from importlib import metadata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kit.data.cells import RowError
from lora_kit.data.messages import Conversation, Message, ToolCall
from lora_kit.data.templates import PLAIN, ChatTemplate, chat_template
from tests.support import chats
from tools import chat_templates

TEMPLATES = chat_templates.load_trl_templates()
WORDS = st.text("abc xyz\n.,ä€", min_size=1, max_size=12).filter(str.strip)
KINDS = ("bytes", "first", "always")
REASONS = (
    "does not render", "System role", "begins an answer", "has no element", "must alternate",
)  # fmt: skip
"""What a refusal says."""

pytestmark = pytest.mark.skipif(not TEMPLATES, reason="TRL is not installed")


@functools.cache
def tokenizer_for(name: str, kind: str) -> Any:
    specials = chat_templates.list_specials(TEMPLATES.get(name, ""))
    if kind == "bytes":
        return chat_templates.build_byte_level_tokenizer(specials)
    return chat_templates.build_prefix_space_tokenizer(specials, scheme=kind)


def template_for(name: str, tokenizer: Any) -> ChatTemplate:
    return chat_template(PLAIN, tokenizer, base="tiny") if name == PLAIN else ChatTemplate(TEMPLATES[name], name)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """One to four exchanges, perhaps with a system message, thoughts, calls of a tool, and excluded answers."""
    with_tools = draw(st.booleans())
    messages = [Message("system", draw(WORDS))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages.append(Message("user", draw(WORDS)))
        if with_tools and draw(st.booleans()):
            city = draw(st.sampled_from(["Bonn", "Ulm"]))
            call = ToolCall("find_city", f'{{"city": "{city}"}}', "abcdefgh1")
            messages.append(Message("assistant", "", tool_calls=(call,)))
            messages.append(Message("tool", draw(WORDS), name="find_city", tool_call_id="abcdefgh1"))
        reasoning = draw(WORDS) if draw(st.integers(0, 3)) == 0 else ""
        train = None if draw(st.integers(0, 4)) else False
        messages.append(Message("assistant", draw(WORDS), reasoning=reasoning, train=train))
    messages[-1] = Message("assistant", messages[-1].content)
    return Conversation(tuple(messages), chat_templates.TOOLS if with_tools else "")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(name=st.sampled_from([PLAIN, *TEMPLATES]), kind=st.sampled_from(KINDS), conversation=conversations())
def test_what_is_learned_is_what_generation_would_have_to_write(
    name: str, kind: str, conversation: Conversation
) -> None:
    tokenizer = tokenizer_for(name, kind)
    refusal = ""
    try:
        chat_templates.check_samples(template_for(name, tokenizer), tokenizer, conversation)
    except RowError as error:
        refusal = str(error)
    assert not refusal or any(reason in refusal for reason in REASONS), refusal


def test_every_template_learns_one_exchange_and_two() -> None:
    cases = chat_templates.build_cases()
    for name, text in TEMPLATES.items():
        for case in ("one", "two"):
            assert chat_templates.try_case(name, text, cases[case]).startswith("yes"), f"{name}: {case}"


def test_every_cell_of_the_page_is_tried() -> None:
    page = chat_templates.PAGE.read_text(encoding="utf-8")
    if f"TRL {metadata.version('trl')} ships" not in page:
        pytest.skip("the page is about another version of TRL")
    cells = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    assert list(cells) == list(TEMPLATES)
    cases = chat_templates.build_cases()
    for name in list(TEMPLATES)[::5]:
        tried = [chat_templates.try_case(name, TEMPLATES[name], case) for case in cases.values()]
        assert cells[name] == f"| `{name}` | {' | '.join(tried)} |", "python -m tools.chat_templates"


def test_the_marks_of_a_template_are_what_transformers_reads_from_them() -> None:
    name = "qwen3_training"
    tokenizer = tokenizer_for(name, "bytes")
    conversation = chats.conversation(("user", "hi"), ("assistant", "yo"), ("user", "and"), ("assistant", "so"))
    judge = tokenizer.apply_chat_template(
        [message.to_json() for message in conversation.messages],
        chat_template=TEMPLATES[name],
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    (sample,) = chat_templates.encode_conversation(template_for(name, tokenizer), tokenizer, conversation).samples
    assert sample.ids == judge["input_ids"][: len(sample.ids)]
    learned = [bool(each) for each in judge["assistant_masks"][: len(sample.ids)]]
    differing = [place for place, pair in enumerate(zip(learned, sample.loss_mask, strict=True)) if pair[0] != pair[1]]
    # The marks hold the line break after `<|im_end|>`, too, which nobody generates.
    assert tokenizer.convert_ids_to_tokens([sample.ids[place] for place in differing]) == ["Ċ"]
