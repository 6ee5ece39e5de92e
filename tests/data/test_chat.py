"""Conversations: rendered by the template, learned on answers alone, cut between exchanges, asked as trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_kit as lk
from lora_kit.data.answers import locate_answer
from lora_kit.data.batches import IGNORE_INDEX, EncodedDataset
from lora_kit.data.cells import RowError
from lora_kit.data.chat import ChatEncoder
from lora_kit.data.encode import encode
from lora_kit.data.messages import Message
from lora_kit.data.preparation.prepare import prepare
from lora_kit.data.preview import count_learned_by_role, preview_sample
from lora_kit.data.rows import read_rows
from lora_kit.data.sample_format import SampleFormat, convert_rows
from lora_kit.data.templates import ChatTemplate, chat_template
from lora_kit.errors import DataError, RecipeError
from lora_kit.evaluation.generation_metrics import collect_eval_prompts
from lora_kit.generation.decoding import Sampling
from lora_kit.generation.generate import generate
from lora_kit.generation.prompts import find_template
from lora_kit.models.loading import Base, load_input_spec
from lora_kit.training.train import train
from tests.support import chats, texts, tiny

# Like Llama's: a BOS of its own, an end after every turn, and a line break after the end that nobody generates.
TURNS = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Like those that take earlier thoughts out again: an answer is rendered otherwise once the conversation goes on.
FORGETFUL = TURNS.replace("{{ m['content'] }}", "{{ m['content'] if loop.last or m['role'] == 'user' else '' }}")
CHAT = (("system", "be"), ("user", "hi"), ("assistant", "yo"), ("user", "and"), ("assistant", "so"))


def tokenizer(*, bos: str = "<s>") -> Any:
    return texts.tokenizer(bos=bos)


def template(text: str = TURNS) -> ChatTemplate:
    return ChatTemplate(text, "the template")


def rows_of(path: Path, *conversations: tuple[tuple[str, str], ...]) -> Path:
    messages = [[{"role": role, "content": text} for role, text in conversation] for conversation in conversations]
    return texts.write(path / "chat.jsonl", [{"messages": found} for found in messages])


def encoded(path: Path, *conversations: tuple[tuple[str, str], ...], **settings: Any) -> EncodedDataset:
    given = {"max_length": 200, "template": template(), **settings}
    return encode(read_rows(rows_of(path, *conversations)), tokenizer(), **given)


def shown(sample: dict[str, torch.Tensor]) -> str:
    """The tokens of a sample, those with a loss between ‹ and ›."""
    words = tokenizer().convert_ids_to_tokens(sample["input_ids"].tolist())
    learned = (sample["labels"] != IGNORE_INDEX).tolist()
    return "".join(f"‹{w}›" if loss else w for w, loss in zip(words, learned, strict=True)).replace("›‹", "")


# The mask


def test_the_loss_is_on_answers_and_the_tokens_that_end_them(tmp_path: Path) -> None:
    sample = encoded(tmp_path, CHAT)[0]
    assert shown(sample) == ("<s>[system]be</s>\n[user]hi</s>\n[assistant]‹yo</s>›\n[user]and</s>\n[assistant]‹so</s>›")
    labels = sample["labels"]
    assert (labels[labels != IGNORE_INDEX] == sample["input_ids"][labels != IGNORE_INDEX]).all()


def test_bos_is_the_templates_and_stands_once(tmp_path: Path) -> None:
    assert encoded(tmp_path, CHAT)[0]["input_ids"].tolist().count(texts.BOS) == 1
    bare = template(TURNS.replace("{{ bos_token }}", ""))
    assert encoded(tmp_path, CHAT, template=bare)[0]["input_ids"].tolist().count(texts.BOS) == 0


def test_nothing_after_the_last_answer_is_kept(tmp_path: Path) -> None:
    longer = (*CHAT, ("user", "more"))
    assert shown(encoded(tmp_path, longer)[0]) == shown(encoded(tmp_path, CHAT)[0])


def test_what_stands_before_an_answer_is_what_generation_is_given(tmp_path: Path) -> None:
    sample = encoded(tmp_path, CHAT)[0]
    text = template().render_prompt(tokenizer(), chats.conversation(*CHAT[:4]))
    asked = tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert sample["input_ids"].tolist()[: len(asked)] == asked
    assert sample["labels"].tolist()[len(asked) - 1 : len(asked) + 1] == [IGNORE_INDEX, sample["input_ids"][len(asked)]]


def test_a_template_that_rewrites_earlier_turns_gives_each_answer_its_own_sample(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    samples = encoded(tmp_path, CHAT[1:], template=template(FORGETFUL))
    assert [shown(sample) for sample in samples] == [
        "<s>[user]hi</s>\n[assistant]‹yo</s>›",
        "<s>[user]hi</s>\n[assistant]</s>\n[user]and</s>\n[assistant]‹so</s>›",
    ]
    assert "1 of 1 conversations have a sample for each answer that" in caplog.text
    with pytest.raises(DataError, match=r":1: the template does not render message 1 \(system\), which would be lost"):
        encoded(tmp_path, CHAT, template=template(FORGETFUL))


def test_a_template_without_an_end_is_refused(tmp_path: Path) -> None:
    for text in (TURNS.replace("{{ eos_token }}", ""), TURNS.replace("{{ eos_token }}\n", "{{ eos_token }}over\n")):
        with pytest.raises(DataError, match="the template puts no special token after an answer"):
            encoded(tmp_path, CHAT, template=template(text))
    unknown = TURNS.replace("{{ eos_token }}", "#")  # one token, <unk>, which is special and ends nothing
    with pytest.raises(DataError, match="no special token"):
        encoded(tmp_path, CHAT, template=template(unknown))


def test_what_a_template_raises_names_the_line(tmp_path: Path) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + TURNS
    with pytest.raises(DataError, match=r"chat\.jsonl:2: the template: no system here"):
        encoded(tmp_path, CHAT[1:], CHAT, template=template(strict))


def test_conversations_without_a_template_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no chat template was given"):
        encoded(tmp_path, CHAT, template=None)


# Truncation


def test_every_answer_is_learned_once_at_any_length(tmp_path: Path) -> None:
    answers = [f"a{n}" + "b" * n for n in range(6)]
    turns = [turn for n, text in enumerate(answers) for turn in (("user", f"q{n} {'c' * n}"), ("assistant", text))]
    conversation = (("system", "be"), *turns)
    for max_length in range(48, 220, 3):
        samples = encoded(tmp_path, conversation, max_length=max_length)
        assert samples.lengths.max() <= max_length
        learned = [part.split("›")[0] for sample in samples for part in shown(sample).split("‹")[1:]]
        assert learned == [f"{text}</s>" for text in answers]
        assert all(shown(sample).startswith("<s>[system]be</s>\n[user]") for sample in samples)
        assert all(sample["labels"][0] == IGNORE_INDEX for sample in samples)
    assert len(encoded(tmp_path, conversation, max_length=48)) > 3


def test_a_question_that_is_too_long_loses_its_beginning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    conversation = (("user", "0123456789"), ("assistant", "yes"))
    sample = encoded(tmp_path, conversation, max_length=28)[0]
    assert shown(sample) == "<s>[user]6789</s>\n[assistant]‹yes</s>›"
    assert len(sample["input_ids"]) == 28
    assert "1 of 1 conversations" in caplog.text


def test_an_answer_that_does_not_fit_is_refused_with_its_line(tmp_path: Path) -> None:
    long = (("user", "hi"), ("assistant", "x" * 30))
    with pytest.raises(DataError, match=r"chat\.jsonl:2: the answer has 31 tokens.*max_length is 40.*drop long"):
        encoded(tmp_path, CHAT[1:3], long, max_length=40)


# Which template


def test_the_tokenizers_own_template_comes_first(tmp_path: Path) -> None:
    own = tokenizer()
    with pytest.raises(DataError, match=r"tiny has no chat template \(data\.chat_template: plain"):
        chat_template(None, own, base="tiny")
    own.chat_template = TURNS
    assert chat_template(None, own, base="tiny").text == TURNS
    own.chat_template = {"default": TURNS, "tools": "x"}
    assert chat_template(None, own, base="tiny").text == TURNS
    assert chat_template("{{ mine }}", own, base="tiny").text == "{{ mine }}"
    (tmp_path / "mine.jinja").write_text(TURNS)
    assert chat_template(str(tmp_path / "mine.jinja"), own, base="tiny").text == TURNS
    (tmp_path / "none.jinja").write_text("words")
    with pytest.raises(DataError, match="is not a chat template"):
        chat_template(str(tmp_path / "none.jinja"), own, base="tiny")
    with pytest.raises(DataError, match="'plian': no such file"):
        chat_template("plian", own, base="tiny")


@pytest.mark.parametrize("bos", ["", "<s>"])
def test_the_plain_template_begins_as_the_tokenizer_begins(bos: str) -> None:
    made = tokenizer(bos=bos)
    encoder = ChatEncoder(made, chat_template("plain", made, base="tiny"), max_length=99)
    sample = encoder.encode(chats.conversation(*CHAT[1:3])).samples[0]
    words = "".join(made.convert_ids_to_tokens(sample.ids))
    assert words == f"{bos}User:\nhi<unk>Assistant:\nyo</s>"  # two line breaks are no token of this tokenizer
    assert sum(sample.loss_mask) == 3


def test_a_template_cannot_reach_out(tmp_path: Path) -> None:
    reaching = "{{ messages.__class__.__mro__ }}" + TURNS
    with pytest.raises(DataError, match="unsafe"):
        encoded(tmp_path, CHAT, template=template(reaching))


# Training and generation


def test_an_adapter_brings_its_template_to_generation(tmp_path: Path) -> None:
    base = Base(model=tiny.llama(), tokenizer=tokenizer(), name="tiny")
    base.tokenizer.chat_template = TURNS
    file = rows_of(tmp_path, CHAT[1:3], CHAT[3:])
    out = tmp_path / "chatty"
    steps = {"max_steps": 1, "report_to": "none"}
    train({"base": "tiny", "data": str(file), "out": str(out), "train": steps}, base=base)
    adapter = lk.Adapter.load(out)
    found = find_template(adapter)
    assert found is not None
    assert found.text == TURNS
    base.tokenizer.chat_template = None  # the record is enough
    rows = generate(base, [adapter, None], "hi", sampling=Sampling(max_new_tokens=2))
    assert [row.prompt for row in rows] == ["<s>[user]hi</s>\n[assistant]"] * 2
    assert generate(base, [adapter], "hi", template="raw", sampling=Sampling(max_new_tokens=2))[0].prompt == "hi"


def test_an_answer_ends_where_the_template_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a turn is not always the end of text: each row stops at its own, whatever its neighbors do."""
    base = Base(model=tiny.llama(), tokenizer=tokenizer(), name="tiny")
    prompt = torch.tensor([base.tokenizer("hi", add_special_tokens=False)["input_ids"]])
    written = base.model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :].tolist()
    end = written[2]
    monkeypatch.setattr(ChatTemplate, "render_prompt", lambda self, tokenizer, messages: "hi")
    monkeypatch.setattr("lora_kit.generation.prompts.find_template_ends", lambda template, tokenizer: {end})
    bank = lk.attach(base.model, lk.LoraConfig(r=2), name="idle")  # B is zero: writes what the base writes
    adapter = bank.snapshot("idle")
    bank.detach()
    chatty = lk.Adapter(adapter.config, adapter.tensors, record={"recipe": {"data": {"chat_template": TURNS}}})
    plain = lk.Adapter(adapter.config, adapter.tensors, record={"recipe": {"data": {"separator": ""}}})
    sampling = Sampling(max_new_tokens=6)
    alone = generate(base, [chatty], "hi", sampling=sampling)[0]
    assert (alone.ended, alone.tokens) == ("eos", written.index(end) + 1)
    beside = generate(base, [chatty, plain], "hi", sampling=sampling)
    assert (beside[0].text, beside[0].tokens) == (alone.text, alone.tokens)
    assert beside[1].text == generate(base, [plain], "hi", sampling=sampling)[0].text


def test_a_template_for_rows_that_are_no_conversations_is_refused(tmp_path: Path) -> None:
    file = texts.write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    recipe = {"base": "tiny", "data": {"train": str(file), "chat_template": "plain"}, "out": str(tmp_path / "out")}
    with pytest.raises(RecipeError, match="chat_template is for conversations"):
        train(recipe, base=Base(model=tiny.llama(), tokenizer=tokenizer(), name="tiny"))


# What messages say about the loss and about thoughts

THINKING = TURNS.replace(
    "{{ m['content'] }}", "{% if m.thinking %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
)


def said(role: str, content: str, **keys: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **keys}


def preview_of(path: Path, messages: list[dict[str, Any]], *, text: str = TURNS, max_length: int = 200) -> list[str]:
    """What `preview` shows of each sample; learned spans between ‹ and ›."""
    rows = read_rows(texts.write(path / "chat.jsonl", [{"messages": messages}]))
    samples = encode(rows, tokenizer(), max_length=max_length, template=template(text))
    marks = {True: "‹{}›", False: "{}"}
    return [
        "".join(
            marks[span.learned].format(span.text.replace(" ", ""))
            for span in preview_sample(tokenizer(), samples, index)
        )
        for index in range(len(samples))
    ]


EXCHANGES = [said("user", "hi"), said("assistant", "yo"), said("user", "and"), said("assistant", "so")]
ALL_LEARNED = "<s>[user]hi</s>\n[assistant]‹yo</s>›\n[user]and</s>\n[assistant]‹so</s>›"


@pytest.mark.parametrize("keys", [{"train": False}, {"loss": False}, {"weight": 0}, {"weight": 0.0, "train": None}])
def test_an_answer_that_is_excluded_is_read_but_not_learned(tmp_path: Path, keys: dict[str, Any]) -> None:
    first = [EXCHANGES[0], {**EXCHANGES[1], **keys}, *EXCHANGES[2:]]
    expected = "<s>[user]hi</s>\n[assistant]yo</s>\n[user]and</s>\n[assistant]‹so</s>›"
    assert preview_of(tmp_path, first) == [expected]
    last = [*EXCHANGES[:3], {**EXCHANGES[3], **keys}]
    assert preview_of(tmp_path, last) == ["<s>[user]hi</s>\n[assistant]‹yo</s>›"]
    # Where the conversation is split, an exchange without a loss is context at most.
    assert preview_of(tmp_path, first, max_length=40) == ["<s>[user]and</s>\n[assistant]‹so</s>›"]
    assert preview_of(tmp_path, last, max_length=25) == ["<s>[user]hi</s>\n[assistant]‹yo</s>›"]
    with pytest.raises(DataError, match="train, loss, weight exclude every answer"):
        preview_of(tmp_path, [EXCHANGES[0], {**EXCHANGES[1], **keys}])


@pytest.mark.parametrize(
    "keys",
    [{"train": True}, {"loss": True, "weight": 1}, {"weight": 1.0}, {"tool_calls": []}, {"name": None},
     {"tool_calls": None, "function_call": {}, "reasoning_content": "", "thinking": None, "anything": None}],
    ids=str,
)  # fmt: skip
def test_values_that_say_nothing_change_nothing(tmp_path: Path, keys: dict[str, Any]) -> None:
    assert preview_of(tmp_path, [{**message, **keys} for message in EXCHANGES]) == [ALL_LEARNED]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_rendered_and_learned_or_refused(tmp_path: Path, key: str) -> None:
    messages = [EXCHANGES[0], {**EXCHANGES[1], key: "hm"}, *EXCHANGES[2:]]
    learned = ALL_LEARNED.replace("‹yo", "‹(hm)yo")
    assert preview_of(tmp_path, messages, text=THINKING) == [learned]
    with pytest.raises(DataError, match=r":1: the template does not render the reasoning of message 2"):
        preview_of(tmp_path, messages)
    plain = chat_template("plain", tokenizer(), base="tiny")
    rows = read_rows(texts.write(tmp_path / "chat.jsonl", [{"messages": messages}]))
    with pytest.raises(DataError, match="does not render the reasoning"):
        encode(rows, tokenizer(), max_length=200, template=plain)
    with pytest.raises(DataError, match="no chat template for it"):
        convert_rows(rows, "\n")


SILENT = "{% for m in messages %}[{{ m.role }}]{{ m.content if m.role != 'system' and not m.tool_calls }}\
{% for c in m.tool_calls %}({{ c.function.arguments.n }} add){% endfor %}{{ eos_token }}{% endfor %}\
{% if add_generation_prompt %}[assistant]{% endif %}"
"""Renders no system message, no thought, no name, and no text beside a call."""


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([said("user", "hi"), said("assistant", "yo", thinking="yo")], "the reasoning of message 2"),
        ([said("user", "hi"), said("assistant", "<think>hm</think>yo", thinking="yo")], "the reasoning of message 2"),
        ([said("system", "hi"), said("user", "hi"), said("assistant", "yo")], r"message 1 \(system\)"),
        ([said("user", "i am bo", name="bo"), said("assistant", "yo")], "the name of message 1"),
        ([said("user", "hi"), said("assistant", "7", function_call={"name": "add", "arguments": '{"n": 7}'})],
         "the content of message 2"),
    ],
    ids=["thought", "inline", "system", "name", "call"],
)  # fmt: skip
def test_what_is_lost_is_missed_where_something_else_says_the_same(
    tmp_path: Path, messages: list[dict[str, Any]], expected: str
) -> None:
    with pytest.raises(DataError, match=f":1: the template does not render {expected}"):
        preview_of(tmp_path, messages, text=SILENT)


def test_what_is_said_twice_and_rendered_twice_passes(tmp_path: Path) -> None:
    messages = [said("system", "hi"), said("user", "hi"), said("assistant", "hi", thinking="hi"), said("user", "hi"),
                said("assistant", "hi")]  # fmt: skip
    assert preview_of(tmp_path, messages, text=THINKING) == [
        "<s>[system]hi</s>\n[user]hi</s>\n[assistant]‹(hi)hi</s>›\n[user]hi</s>\n[assistant]‹hi</s>›"
    ]
    inline = [said("user", "hi"), said("assistant", "<think>yo</think>yo", thinking="yo")]
    (shown_once,) = preview_of(tmp_path, inline)
    assert shown_once.replace("<unk>", "") == "<s>[user]hi</s>\n[assistant]‹thinkyo/thinkyo</s>›"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"wieght": 0}, "a message has the key 'wieght', which is not known; did you mean 'weight'?"),
        ({"zzz": "x"}, "a message has the key 'zzz', which is not known; prepare --rename zzz= takes it out"),
        ({"weight": 0.5}, "message 2: weight must be 0 or 1; 0.5 was given"),
        ({"train": "no"}, "message 2: train must be true or false; 'no' was given"),
        ({"tool_call_id": "x"}, "message 2 has tool_call_id, but it is not from a tool"),
        ({"thinking": "a", "reasoning": "b"}, "message 2 has thinking, reasoning with different values"),
        ({"thinking": ["a"]}, "message 2: thinking must be a string; list was given"),
    ],
)
def test_a_key_that_would_be_lost_is_a_fault(tmp_path: Path, keys: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError) as caught:
        preview_of(tmp_path, [EXCHANGES[0], {**EXCHANGES[1], **keys}])
    assert f":1: {expected}" in str(caught.value)


def test_a_user_has_no_reasoning(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="message 1 has thinking, but it is not from the assistant"):
        preview_of(tmp_path, [{**EXCHANGES[0], "thinking": "hm"}, EXCHANGES[1]])


def test_prepare_writes_what_messages_say(tmp_path: Path) -> None:
    template_file = tmp_path / "thinking.jinja"
    template_file.write_text(THINKING)
    messages = [EXCHANGES[0], {**EXCHANGES[1], "thinking": "hm"}, EXCHANGES[2], {**EXCHANGES[3], "weight": 0}]
    rows = [{"messages": [said("user", f"hi {number}"), *messages[1:]]} for number in range(3)]
    source = texts.write(tmp_path / "chat.jsonl", rows)
    prepare(source, tmp_path / "out", template=str(template_file), share=0)
    written = (tmp_path / "out" / "train.jsonl").read_text().splitlines()
    assert json.loads(written[0])["messages"][1:] == [
        said("assistant", "yo", reasoning_content="hm"), EXCHANGES[2], said("assistant", "so", train=False),
    ]  # fmt: skip
    assert read_rows(tmp_path / "out" / "train.jsonl").values == read_rows(source).values


def test_rows_that_differ_in_what_is_learned_are_no_duplicates(tmp_path: Path) -> None:
    rows = [{"messages": EXCHANGES}, {"messages": [*EXCHANGES[:3], {**EXCHANGES[3], "train": False}]}]
    prepared = prepare(texts.write(tmp_path / "chat.jsonl", rows), template="plain", share=0)
    assert not prepared.parts[0].examined.duplicates


def test_an_answer_that_is_not_learned_is_no_reference(tmp_path: Path) -> None:
    rows = [{"messages": [*EXCHANGES[:3], {**EXCHANGES[3], "train": False}]}]
    prompts = collect_eval_prompts(read_rows(texts.write(tmp_path / "chat.jsonl", rows)))
    assert [prompt.references for prompt in prompts] == [("yo",)]


def test_an_opening_answer_is_context(tmp_path: Path) -> None:
    opening = [said("assistant", "hey"), *EXCHANGES]
    assert preview_of(tmp_path, opening) == [ALL_LEARNED.replace("<s>", "<s>[assistant]hey</s>\n", 1)]
    with pytest.raises(DataError, match="the only answer is the first message"):
        preview_of(tmp_path, [said("assistant", "hey"), said("user", "hi")])
    strict = "{% if messages[0].role == 'assistant' %}{{ raise_exception('user first') }}{% endif %}" + TURNS
    with pytest.raises(DataError, match=":1: the template: user first"):
        preview_of(tmp_path, opening, text=strict)
    prompts = collect_eval_prompts(read_rows(texts.write(tmp_path / "chat.jsonl", [{"messages": opening}])))
    assert [prompt.references for prompt in prompts] == [("yo",), ("so",)]


@pytest.mark.parametrize("opening", [[said("system", "be"), said("user", "Hi")], [said("assistant", "hey")]])
def test_dialogues_that_begin_alike_are_split_and_do_not_leak(tmp_path: Path, opening: list[dict[str, Any]]) -> None:
    greeting = [said("assistant", "yo")] if opening[-1]["role"] == "user" else []
    rows = [
        {"messages": [*opening, *greeting, said("user", f"what is {number}"), said("assistant", str(number))]}
        for number in range(60)
    ]
    file = texts.write(tmp_path / "dialogues.jsonl", rows)
    prepared = prepare(file, template="plain", share=0.1)
    assert (len(prepared.train), len(prepared.validation or ())) == (54, 6)
    other = texts.write(tmp_path / "other.jsonl", rows[58:])
    mixed = texts.write(tmp_path / "mixed.jsonl", rows[:59])
    assert prepare(mixed, validation=other, template="plain").parts[0].leaks == {59: 1}


# Tools, and what a recipe says

CALLING = TURNS.replace(
    "{{ m['content'] }}",
    "{{ m.content }}{% for c in m.tool_calls %}({{ c.function.name }} {{ c.function.arguments.n }}){% endfor %}",
)
ADD = {"type": "function", "function": {"name": "add", "arguments": '{"n": 7}'}}
WITH_TOOL = [
    said("user", "hi"), said("assistant", None, tool_calls=[ADD]),
    said("tool", "42", tool_call_id="a", name="add"), said("assistant", "yo"),
]  # fmt: skip


@pytest.mark.parametrize(
    "keys", [{"tool_calls": [ADD]}, {"tool_calls": [ADD["function"]]}, {"function_call": ADD["function"]},
             {"tool_calls": [{"function": {"name": "add", "arguments": {"n": 7}}}]}], ids=str,
)  # fmt: skip
def test_calls_are_learned_and_results_are_not(tmp_path: Path, keys: dict[str, Any]) -> None:
    messages = [WITH_TOOL[0], said("assistant", "", **keys), *WITH_TOOL[2:]]
    assert preview_of(tmp_path, messages, text=CALLING) == [
        "<s>[user]hi</s>\n[assistant]‹(add7)</s>›\n[tool]42</s>\n[assistant]‹yo</s>›"
    ]
    with pytest.raises(DataError, match=":1: the template does not render every tool call of message 2"):
        preview_of(tmp_path, messages)
    fixed = CALLING.replace("{{ c.function.arguments.n }}", "")
    with pytest.raises(DataError, match="does not render the arguments of the calls of message 2"):
        preview_of(tmp_path, messages, text=fixed)


def test_thoughts_between_calls_are_context_as_generation_is_given_them(tmp_path: Path) -> None:
    # Like gpt-oss: an answer without a call takes the thoughts before earlier calls out again.
    answered = "messages[-1].role == 'assistant' and not messages[-1].tool_calls and not loop.last"
    kept = f"{{% set kept = not ({answered}) %}}"
    shortened = kept + "{{ '(' ~ m.thinking ~ ')' if m.thinking and kept }}{{ m.content if kept or not m.tool_calls }}"
    text = CALLING.replace("{{ m.content }}", shortened)
    thinking = said("assistant", "so", tool_calls=[ADD], thinking="hm")
    assert preview_of(tmp_path, [WITH_TOOL[0], thinking, *WITH_TOOL[2:]], text=text) == [
        "<s>[user]hi</s>\n[assistant]‹(hm)so(add7)</s>›\n[tool]42</s>\n[assistant]‹yo</s>›"
    ]
    with pytest.raises(DataError, match="renders what precedes message 2 differently once that message is there"):
        preview_of(tmp_path, [WITH_TOOL[0], thinking, *WITH_TOOL[2:]], text="{{ messages | length }}" + text)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ({"function": {"name": "add", "arguments": "{"}}, "tool call 1: arguments: not JSON"),
        ({"function": {"name": "add", "arguments": "[1]"}}, "tool call 1: arguments must be an object"),
        ({"function": {"arguments": "{}"}}, "tool call 1: name must be a string"),
        ({"name": "add", "args": {}}, "tool call 1 has the key 'args'"),
        ({"type": "code", "function": {"name": "add"}}, "is of type 'code'; only functions"),
        ("add", "tool call 1 must be an object"),
    ],
)
def test_a_call_that_is_no_call_is_a_fault(tmp_path: Path, call: object, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        preview_of(tmp_path, [WITH_TOOL[0], said("assistant", "", tool_calls=[call]), *WITH_TOOL[2:]], text=CALLING)


def test_only_the_assistant_calls_and_only_tools_answer_calls(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="message 1 has tool_calls, but it is not from the assistant"):
        preview_of(tmp_path, [said("user", "hi", tool_calls=[ADD]), said("assistant", "yo")], text=CALLING)


def test_tools_reach_the_template_or_are_refused(tmp_path: Path) -> None:
    schema = {"type": "function", "function": {"name": "add", "parameters": {}}}
    listing = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + CALLING
    for tools in ([schema], json.dumps([schema])):
        rows = read_rows(texts.write(tmp_path / "chat.jsonl", [{"messages": WITH_TOOL, "tools": tools}]))
        samples = encode(rows, tokenizer(), max_length=200, template=template(listing))
        assert shown(samples[0]).startswith("add<s>[user]hi")
    plain = read_rows(texts.write(tmp_path / "chat.jsonl", [{"messages": EXCHANGES, "tools": [schema]}]))
    for silent, text in ((plain, TURNS), (rows, CALLING)):  # a call of a tool is not the tool
        with pytest.raises(DataError, match="does not render the tools, which would be lost"):
            encode(silent, tokenizer(), max_length=200, template=template(text))


def test_variables_of_the_template_come_from_the_recipe_and_the_row(tmp_path: Path) -> None:
    loud = TURNS.replace("{{ bos_token }}", "{{ bos_token }}{{ mood }}")
    rows = [{"messages": EXCHANGES[:2]}, {"messages": EXCHANGES[:2], "chat_template_kwargs": {"mood": "sad"}}]
    read = read_rows(texts.write(tmp_path / "chat.jsonl", rows))
    given = chat_template(loud, tokenizer(), base="tiny", variables={"mood": "glad"})
    samples = encode(read, tokenizer(), max_length=200, template=given)
    assert [shown(sample).split("[")[0] for sample in samples] == ["<s>glad", "<s>sad"]
    with pytest.raises(DataError, match=r"reads no variable 'mod'.*did you mean 'mood'"):
        chat_template(loud, tokenizer(), base="tiny", variables={"mod": 1})
    with pytest.raises(DataError, match="messages is the conversation's own"):
        chat_template(loud, tokenizer(), base="tiny", variables={"messages": []})


@pytest.mark.parametrize(("learn", "expected"), [("all", ["yo", "so"]), ("last", ["so"]), ("marked", ["yo"])])
def test_a_recipe_says_which_answers_are_learned(tmp_path: Path, learn: str, expected: list[str]) -> None:
    messages = [EXCHANGES[0], {**EXCHANGES[1], "train": True}, *EXCHANGES[2:]]
    (value,) = read_rows(texts.write(tmp_path / "chat.jsonl", [{"messages": messages}])).values
    encoder = ChatEncoder(tokenizer(), template(), max_length=200, learn=learn)
    (sample,) = encoder.encode(value[0]).samples
    learned = tokenizer().convert_ids_to_tokens([i for i, m in zip(sample.ids, sample.loss_mask, strict=True) if m])
    assert "".join(learned) == "".join(f"{text}</s>" for text in expected)
    unmarked = read_rows(texts.write(tmp_path / "chat.jsonl", [{"messages": EXCHANGES}])).values[0][0]
    with pytest.raises(RowError, match="learn: marked leaves no answer"):
        ChatEncoder(tokenizer(), template(), max_length=200, learn="marked").encode(unmarked)


def test_what_is_learned_is_counted_by_role(tmp_path: Path) -> None:
    (value,) = read_rows(texts.write(tmp_path / "chat.jsonl", [{"messages": WITH_TOOL}])).values
    sample_format = SampleFormat(max_length=200, template=template(CALLING))
    shares = count_learned_by_role(value[0], tokenizer(), sample_format)
    # [user]hi, [assistant](add 7) and [assistant]yo, [tool]42, each with its end; line breaks, and the BOS of the user.
    assert shares == {"user": (0, 11), "assistant": (8 + 3, 20 + 14), "tool": (0, 10)}


def test_a_thought_that_the_prompt_opens_is_closed_by_the_answer(tmp_path: Path) -> None:
    opened = TURNS.replace("%}[assistant]{%", "%}[assistant]<think>\n{%")
    made = chats.conversation(("user", "hi"), ("assistant", "yo"))
    answer = locate_answer(template(opened), tokenizer(), made, 1)
    assert (answer.prompt[-8:], answer.text) == ("<think>\n", "\n</think>\n\nyo</s>")
    said_twice = made.with_messages((made.messages[0], Message("assistant", "yo", reasoning="yo")))
    assert locate_answer(template(opened), tokenizer(), said_twice, 1).text == "yo\n</think>\n\nyo</s>"
    other = TURNS.replace("%}[assistant]{%", "%}[assistant]well: {%")
    with pytest.raises(DataError, match=r"begins an answer with 'well: ' in generation, and with 'yo</s>"):
        locate_answer(template(other), tokenizer(), made, 1)


def test_an_answer_that_holds_its_own_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="an answer contains </s>, at which generation would stop"):
        preview_of(tmp_path, [EXCHANGES[0], said("assistant", "y</s>o")])


@pytest.mark.parametrize("kind", ["bytes", "first", "always"])
def test_pieces_of_words_are_trained_on_as_generation_has_them(kind: str) -> None:
    """Those of kit-base are of bytes; SentencePiece puts a space before a text, or before each part of one."""
    kit = load_input_spec("kit-base").tokenizer if kind == "bytes" else texts.piece_tokenizer(kind)
    plain = chat_template("plain", kit, base="kit-base")
    talk = chats.conversation(
        ("user", "name : Aromi | food : French"), ("assistant", "Aromi serves French food."),
        ("user", "And where is it?"), ("assistant", "In the city centre."),
    )  # fmt: skip
    (sample,) = ChatEncoder(kit, plain, max_length=500).encode(talk).samples
    assert sample.learned == (1, 3)
    for index in sample.learned:
        prompt = kit(plain.render_prompt(kit, talk.until(index)), add_special_tokens=False)["input_ids"]
        assert sample.ids[: len(prompt)] == prompt
        assert not sample.loss_mask[len(prompt) - 1]
        assert sample.loss_mask[len(prompt)]


def test_variables_of_the_training_are_those_of_generation(tmp_path: Path) -> None:
    base = Base(model=tiny.llama(), tokenizer=tokenizer(), name="tiny")
    loud = TURNS.replace("{{ bos_token }}", "{{ bos_token }}{{ mood }}")
    data = {"train": str(rows_of(tmp_path, CHAT[1:3])), "chat_template": loud, "chat_template_kwargs": {"mood": "glad"}}
    recipe = {"base": "tiny", "data": data, "out": str(tmp_path / "a"), "train": {"max_steps": 1, "report_to": "none"}}
    train(recipe, base=base)
    rows = generate(base, [lk.Adapter.load(tmp_path / "a")], "hi", sampling=Sampling(max_new_tokens=1))
    assert rows[0].prompt == "<s>glad[user]hi</s>\n[assistant]"
