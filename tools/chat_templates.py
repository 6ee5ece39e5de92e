"""What becomes of conversations in the chat templates that TRL ships: `python -m tools.chat_templates` writes the page.

Each cell is tried: a conversation is encoded, and what is learned is compared with what `generate` is given and would
have to write. A cell is learned, or refused with a reason; a cell that would be learned wrongly ends the run.
"""

from __future__ import annotations

import functools
import re
import sys
from importlib import metadata, util
from pathlib import Path
from typing import Any, Final

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from lora_kit.data.answer_ends import find_template_ends
from lora_kit.data.cells import RowError
from lora_kit.data.chat import ChatEncoder, EncodedConversation
from lora_kit.data.messages import Conversation, Message, ToolCall, find_learned_answers
from lora_kit.data.rendered_checks import split_inline_thought
from lora_kit.data.templates import ChatTemplate
from lora_kit.errors import DataError
from lora_kit.models.prompt_tokens import tokenize_text

PAGE: Final = Path(__file__).resolve().parents[1] / "docs" / "chat-templates.md"
TOOLS: Final = (
    '[{"type": "function", "function": {"name": "find_city", "description": "Find it.", "parameters": {"type": '
    '"object", "properties": {"city": {"type": "string", "description": "Where."}}, "required": ["city"]}}}]'
)
CALL: Final = ToolCall("find_city", '{"city": "Bonn"}', "abcdefgh1")
_SPECIAL: Final = re.compile(
    r"<\|[\w\"]+\|?>|<\w+\|>|<｜[^>]*?｜>|<(?:start|end)_of_\w+>|\[/?[A-Z_]+\]|\[gMASK\]|<sop>|<end_of_utterance>"
)
"""What looks like a special token in a template."""
_SPEECH: Final = "Assistant:\n\nUser: hello world, the answer is here\n ▁the ▁answer question reply thought assistant"
_HEAD: Final = """# Chat templates

What becomes of conversations in the chat templates that TRL {version} ships, each tried with a byte-level tokenizer by
`python -m tools.chat_templates`. `yes`: every answer is learned as `generate` would have to write it, after the tokens
that it is given, in one sample; `yes (2)`: the same in two samples, because an earlier answer is rendered, or
tokenized, differently once the conversation goes on. Anything else is rejected before training, with the reason.
Nothing is learned in any other way.

What to do about a rejection: what a template does not render (thoughts, calls, a system message) cannot be learned with
it. Take it out of the rows, write it into the content as the model shall write it, set a variable of the template
(`data.chat_template_kwargs`), or name another template (`data.chat_template`).

One exchange: {one} of {total} templates. Two exchanges: {two} of {total}. Those whose name ends in `_training` are
TRL's own variants with `{{% generation %}}` marks.

| template | one | two | five | reasoning | tools | system |
|---|---|---|---|---|---|---|
"""


@functools.cache
def load_trl_templates() -> dict[str, str]:
    """Return the chat templates of the installed TRL by name; empty without TRL."""
    spec = util.find_spec("trl")
    if spec is None or spec.origin is None:
        return {}
    folder = Path(spec.origin).parent / "chat_templates"
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}


def list_specials(text: str) -> list[str]:
    """Return what looks like a special token in a template."""
    return sorted({*_SPECIAL.findall(text)})


def build_byte_level_tokenizer(specials: list[str]) -> Any:
    """Build a byte-level BPE like those of GPT-2, Llama 3 and Qwen: any text becomes tokens and itself again."""
    return wrap_tokenizer(_train_byte_level(), specials)


def build_prefix_space_tokenizer(specials: list[str], *, scheme: str = "first") -> Any:
    """Build a BPE like Llama 2's: it puts a space before a text, and bytes stand for letters that it does not know.

    Args:
        scheme: `first` to put it before a text, `always` to put it after every special token, too.
    """
    return wrap_tokenizer(_train_prefix_space(scheme), specials)


@functools.cache
def _train_byte_level() -> str:
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator([_SPEECH] * 9, trainer)
    return str(model.to_str())


@functools.cache
def _train_prefix_space(scheme: str) -> str:
    model = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    model.decoder = decoders.Sequence(steps)
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", *bytes_], show_progress=False)
    model.train_from_iterator([_SPEECH] * 9, trainer)
    return str(model.to_str())


def wrap_tokenizer(trained: str, specials: list[str]) -> Any:
    """Return a tokenizer of transformers with a BOS, an EOS and further special tokens."""
    model = Tokenizer.from_str(trained)
    model.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ["<s>", "</s>", *specials]])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=10**6
    )


# What is learned, judged by what generation is given and stops at


def encode_conversation(template: ChatTemplate, tokenizer: Any, conversation: Conversation) -> EncodedConversation:
    """Return a conversation as samples of any length."""
    return ChatEncoder(tokenizer, template, max_length=10**6).encode(conversation)


def check_samples(template: ChatTemplate, tokenizer: Any, conversation: Conversation) -> int:
    """Return how many samples a conversation becomes; each learned answer stands in one of them.

    Raises:
        RowError, DataError: it is refused.
        AssertionError: it is learned wrongly.
    """
    encoded = encode_conversation(template, tokenizer, conversation)
    ends = find_template_ends(template, tokenizer)
    found: list[int] = []
    for sample in encoded.samples:
        expected = [False] * len(sample.ids)
        for index in sample.learned:
            prompt = tokenize_text(tokenizer, template.render_prompt(tokenizer, conversation.until(index)))
            assert sample.ids[: len(prompt)] == prompt, "another prompt than generation is given"
            after = sample.ids[len(prompt) :]
            length = next(place for place, token in enumerate(after) if token in ends) + 1
            answer = range(len(prompt), len(prompt) + length)
            for place in answer:
                expected[place] = not template.has_marks or sample.loss_mask[place]
            assert sample.loss_mask[answer[-1]], "the end of an answer is not learned"
            learned = [sample.ids[place] for place in answer if sample.loss_mask[place]]
            _check_text(tokenizer.decode(learned), conversation, index)
        assert sample.loss_mask == expected, "something else than answers is learned"
        found += sample.learned
    assert sorted(found) == find_learned_answers(conversation), "an answer is learned twice or never"
    return len(encoded.samples)


def _check_text(text: str, conversation: Conversation, index: int) -> None:
    """Assert that what is learned of an answer says what its message says, and nothing that anybody else says."""
    message = conversation.messages[index]
    wanted = [split_inline_thought(message.content)[1], message.reasoning.strip()]
    wanted += [word for call in message.tool_calls for word in (call.name, call.arguments.split('"')[3])]
    assert all(word in text for word in wanted), "a part of an answer is not learned"
    own = message.content + message.reasoning
    others = [other.content.strip() for other in conversation.messages if len(other.content.strip()) > 4]
    assert not [other for other in others if other not in own and other in text], "another message is learned"


# The page


def build_cases() -> dict[str, Conversation]:
    """Return the conversations of the table, by column."""

    def exchange(number: int, reasoning: str = "") -> list[Message]:
        answer = Message("assistant", f"reply number {number}", reasoning=reasoning)
        return [Message("user", f"question number {number}"), answer]

    def build(*parts: list[Message], tools: str = "") -> Conversation:
        return Conversation(tuple(message for part in parts for message in part), tools)

    result = Message("tool", "it is there", name=CALL.name, tool_call_id=CALL.id)
    calling = [Message("user", "where is it"), Message("assistant", "", tool_calls=(CALL,)), result]
    return {
        "one": build(exchange(1)),
        "two": build(exchange(1), exchange(2)),
        "five": build(*(exchange(number) for number in range(1, 6))),
        "reasoning": build(exchange(1, "thought number 1"), exchange(2, "thought number 2")),
        "tools": build(calling, [Message("assistant", "here you are")], tools=TOOLS),
        "system": build([Message("system", "be as kind as you can")], exchange(1), exchange(2)),
    }


def try_case(name: str, text: str, conversation: Conversation) -> str:
    """Return a cell of the table: `yes` with the number of samples, or why the conversation is refused."""
    template, tokenizer = ChatTemplate(text, "the template"), build_byte_level_tokenizer(list_specials(text))
    try:
        samples = check_samples(template, tokenizer, conversation)
    except (RowError, DataError) as error:
        reason = re.sub(r"^the template:? | of message \d+|, which would be lost", "", " ".join(str(error).split()))
        return reason.replace("|", "\\|")
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from None
    return "yes" if samples == 1 else f"yes ({samples})"


def build_page() -> str:
    """Return the page, with every cell tried."""
    cases, templates = build_cases(), load_trl_templates()
    rows = {name: [try_case(name, text, case) for case in cases.values()] for name, text in templates.items()}
    columns = list(zip(*rows.values(), strict=True))
    learned = [sum(cell.startswith("yes") for cell in column) for column in columns]
    head = _HEAD.format(version=metadata.version("trl"), one=learned[0], two=learned[1], total=len(rows))
    return head + "".join(f"| `{name}` | {' | '.join(cells)} |\n" for name, cells in rows.items())


def main() -> int:
    """Write the page."""
    PAGE.write_text(build_page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
