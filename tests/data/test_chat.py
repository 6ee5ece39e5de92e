"""Conversations: rendered by the template, learned on answers alone, cut between exchanges, asked as trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lora_kit as lk
from lora_kit.data.batches import IGNORE_INDEX, EncodedDataset
from lora_kit.data.chat import ChatEncoder, ChatTemplate, chat_template
from lora_kit.data.encode import encode
from lora_kit.data.rows import read_rows
from lora_kit.errors import DataError, RecipeError
from lora_kit.generation.decoding import Sampling
from lora_kit.generation.generate import generate
from lora_kit.generation.prompts import find_template
from lora_kit.models.loading import Base
from lora_kit.training.train import train
from tests.support import texts, tiny

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
    asked = tokenizer()(template().render_prompt(tokenizer(), CHAT[:4]), add_special_tokens=False)["input_ids"]
    assert sample["input_ids"].tolist()[: len(asked)] == asked
    assert sample["labels"].tolist()[len(asked) - 1 : len(asked) + 1] == [IGNORE_INDEX, sample["input_ids"][len(asked)]]


def test_a_template_that_rewrites_earlier_turns_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"chat\.jsonl:1: the template renders a conversation differently"):
        encoded(tmp_path, CHAT, template=template(FORGETFUL))
    assert shown(encoded(tmp_path, CHAT[1:3], template=template(FORGETFUL))[0]).endswith("[assistant]‹yo</s>›")


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
    ids, learned = encoder.encode(CHAT[1:3])[1][0]
    words = "".join(made.convert_ids_to_tokens(ids))
    assert words == f"{bos}User:\nhi<unk>Assistant:\nyo</s>"  # two line breaks are no token of this tokenizer
    assert sum(learned) == 3


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
    """The end of a turn is not always the end of text: each row stops at its own, whatever its neighbours do."""
    base = Base(model=tiny.llama(), tokenizer=tokenizer(), name="tiny")
    prompt = torch.tensor([base.tokenizer("hi", add_special_tokens=False)["input_ids"]])
    written = base.model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :].tolist()
    end = written[2]
    monkeypatch.setattr(ChatTemplate, "render_prompt", lambda self, tokenizer, messages: "hi")
    monkeypatch.setattr(ChatTemplate, "find_end_token", lambda self, tokenizer: end)
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
