"""A label for each word, and texts for texts: what is learned, that it repeats, and that it can be loaded again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers

from lora_kit.adapter.adapter import Adapter
from lora_kit.bank.attach import attach
from lora_kit.data.batches import IGNORE_INDEX, Collator, EncodedDataset, join_samples
from lora_kit.data.encode import encode
from lora_kit.data.preparation.prepare import prepare
from lora_kit.data.preview import preview_sample
from lora_kit.data.rows import collect_label_names, read_rows
from lora_kit.errors import BaseModelError, DataError, RecipeError
from lora_kit.evaluation.loss import probe_head
from lora_kit.evaluation.measure import measure
from lora_kit.models.loading import Base, load_base
from lora_kit.models.prompt_tokens import tokenize_source
from lora_kit.training.job.identity import hash_samples
from lora_kit.training.recipe.load import load_recipe
from lora_kit.training.train import train
from tests.support import texts, tiny
from tests.support.interrupted import die_at, killed, long_recipe, results, unbroken
from tests.support.long_runs import take_few
from tests.support.sequences import BOTH, TAGGED, both, ended, t5, tagger
from tests.support.training import recipe_of

PAIRS = [
    {"prompt": "one", "completion": "1"},
    {"prompt": "a longer prompt", "completion": "x y"},
    {"prompt": "b", "completion": "a longer completion"},
    {"prompt": "cc", "completion": "dddd"},
    {"prompt": "e", "completion": "f"},
]


BASES: dict[str, Callable[[], Base]] = {
    **{kind: lambda kind=kind: both(kind) for kind in BOTH},  # type: ignore[misc]
    "bert": tagger,
    "llama": lambda: tagger("llama"),
    "gpt2": lambda: tagger("gpt2"),
}


def changes_of(kind: str) -> dict[str, Any]:
    """What a recipe says besides."""
    return {"task": "seq2seq", "rows": PAIRS} if kind in BOTH else {"task": "tokens", "rows": TAGGED}


def tagged(path: Path, rows: list[dict[str, Any]], tokenizer: Any, *, max_length: int = 32) -> EncodedDataset:
    found = read_rows(texts.write(path / "rows.jsonl", rows))
    label2id = {name: number for number, name in enumerate(collect_label_names(found))}
    return encode(found, tokenizer, max_length=max_length, label2id=label2id)


def paired(path: Path, rows: list[dict[str, Any]], tokenizer: Any, *, max_length: int = 32) -> EncodedDataset:
    found = read_rows(texts.write(path / "rows.jsonl", rows))
    return encode(found, tokenizer, max_length=max_length, separator="", task="seq2seq")


# Words


def test_the_first_token_of_each_word_has_its_label(tmp_path: Path) -> None:
    sample = tagged(tmp_path, TAGGED, texts.bert_tokenizer())[0]
    no = IGNORE_INDEX
    #                                          <s> A  n   n   _   m  e   t   _   B  o   b   </s>
    assert sample["labels"].tolist() == [no, 2, no, no, no, 1, no, no, no, 2, no, no, no]
    assert sample["input_ids"].tolist() == texts.bert_tokenizer()("Ann met Bob")["input_ids"]


@pytest.mark.parametrize(
    "words",
    [
        ["The", "committee's", "re-examination", "of", "3,141", "naïve", "façades", "—", "(2019)", "…", "日本", "🙂"],
        ["New York", "x", "y", "z", "a b c", "."],
    ],
)
def test_words_are_found_in_running_text_whatever_their_tokens(tmp_path: Path, words: list[str]) -> None:
    """The tokens between one first token and the next read as the word, and all together as the text."""
    tokenizer = load_base("kit-base").tokenizer
    rows = [{"words": words, "labels": list(range(len(words)))}]
    sample = tagged(tmp_path, rows, tokenizer, max_length=128)[0]
    ids, firsts = sample["input_ids"].tolist(), (sample["labels"] != IGNORE_INDEX).nonzero().flatten().tolist()
    assert [tokenizer.decode(ids[a:b]).strip() for a, b in zip(firsts, [*firsts[1:], len(ids)], strict=True)] == words
    assert tokenizer.decode(ids) == " ".join(words)
    assert sample["labels"][firsts].tolist() == list(range(len(words)))


def test_a_word_without_a_token_is_refused_with_its_line(tmp_path: Path) -> None:
    tokenizer = texts.bert_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    rows = [*TAGGED, {"words": ["a", "~~", "b"], "labels": ["O", "P", "O"]}]
    with pytest.raises(DataError, match=r":6: word 2 \('~~'\) has no token of its own"):
        tagged(tmp_path, rows, tokenizer)


def test_words_that_are_cut_off_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = tagged(tmp_path, TAGGED, texts.bert_tokenizer(), max_length=10)
    assert samples.lengths.tolist() == [10, 7, 10, 8, 8]
    assert samples[0]["input_ids"][-1] == texts.EOS
    assert samples.num_labels == 2 + 2 + 3 + 2 + 2
    assert "2 of 5 texts were cut at the end, and the labels there are not learned, to fit 10 tokens" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"words": ["a"], "labels": ["O", "P"]}, "1 words and 2 labels; each word has one"),
        ({"words": [], "labels": []}, "words is empty"),
        ({"words": ["a", " "], "labels": ["O", "P"]}, "words 2 is empty"),
        ({"words": "a b", "labels": ["O", "P"]}, "words must be a list; str"),
        ({"words": ["a"], "labels": [0]}, "label is int, and str in the first row"),
        ({"words": ["a"], "labels": [None]}, "labels 1 must be a string"),
    ],
)
def test_a_row_of_words_that_is_wrong_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f":2: {message}"):
        read_rows(texts.write(tmp_path / "rows.jsonl", [TAGGED[0], row]))


def test_tokens_and_ner_tags_are_words_and_labels(tmp_path: Path) -> None:
    rows = [{"tokens": row["words"], "ner_tags": row["labels"], "id": "3"} for row in TAGGED]
    found = read_rows(texts.write(tmp_path / "a.jsonl", rows))
    assert found.values == read_rows(texts.write(tmp_path / "b.jsonl", TAGGED)).values
    assert collect_label_names(found) == ("L", "O", "P")


# Texts for texts


def test_an_encoder_reads_the_prompt_and_a_decoder_writes_the_completion_and_its_end(tmp_path: Path) -> None:
    for tokenizer in (ended(), texts.bert_tokenizer(), texts.tokenizer()):
        rows = [{"prompt": "ab", "completion": "cd"}, {"prompt": "ab</s>", "completion": "cd</s>"}]
        samples = paired(tmp_path, rows, tokenizer)
        assert samples[0]["input_ids"].tolist() == tokenize_source(tokenizer, "ab") == tokenizer("ab")["input_ids"]
        target = tokenizer("cd")["input_ids"]
        assert samples[0]["labels"].tolist() == (target if texts.EOS in target else [*target, texts.EOS])
        assert samples[1]["labels"].tolist() == samples[0]["labels"].tolist()
        # A tokenizer that ends every text does not end one twice.
        assert samples[1]["input_ids"].tolist().count(texts.EOS) == 1
        assert samples.num_labels == samples.num_tokens - len(samples.ids)


def test_a_prompt_loses_its_end_and_a_completion_is_never_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = texts.bert_tokenizer()
    sample = paired(tmp_path, [{"prompt": "abcdefgh", "completion": "xyz"}], tokenizer, max_length=6)[0]
    assert sample["input_ids"].tolist() == tokenizer("abcd")["input_ids"]
    assert "1 of 1 prompts were cut at the end" in caplog.text
    with pytest.raises(DataError, match=":1: the completion has 7 tokens and max_length is 6"):
        paired(tmp_path, [{"prompt": "a", "completion": "vwxyz"}], tokenizer, max_length=6)


@pytest.mark.parametrize("kind", BOTH)
def test_the_loss_is_what_the_model_itself_says(tmp_path: Path, kind: str) -> None:
    base = both(kind)
    samples = paired(tmp_path, PAIRS, base.tokenizer)
    collator = Collator(texts.PAD, base.decoder_inputs)
    batch = collator(list(samples))
    with torch.no_grad():
        own = base.model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss
    for size in (1, 2, 5):
        found = measure(base.model, samples, collator, batch_size=size)
        assert found.loss == pytest.approx(float(own), abs=1e-5)
        assert found.labels == samples.num_labels
    assert found.perplexity == pytest.approx(float(own.exp()), rel=1e-4)


@pytest.mark.parametrize("rows", [PAIRS, [{"prompt": "b", "completion": "more than it reads"}]])
def test_a_frozen_head_of_a_decoder_is_left_out(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    base = both()
    samples = paired(tmp_path, rows, texts.tokenizer())
    batch = Collator(texts.PAD, base.decoder_inputs)(list(samples))
    labels = batch.pop("labels")
    base.model.requires_grad_(False)
    head = probe_head(base.model, batch, kind="target")
    assert head.linear is base.model.lm_head
    with torch.no_grad():
        logits = base.model(**batch).logits
        with head.skip():
            found = head.loss(base.model(**batch).logits, labels)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(found, expected)


def test_the_loss_over_words_is_the_mean_over_those_with_a_label(tmp_path: Path) -> None:
    base = tagger()
    samples = tagged(tmp_path, TAGGED, base.tokenizer)
    batch = Collator(texts.PAD)(list(samples))
    with torch.no_grad():
        given = base.model(**batch)
    right = (given.logits.argmax(-1) == batch["labels"]).sum() / (batch["labels"] != IGNORE_INDEX).sum()
    for size in (1, 5):
        found = measure(base.model, samples, Collator(texts.PAD), batch_size=size)
        assert found.loss == pytest.approx(float(given.loss), abs=1e-6)
        assert found.accuracy == pytest.approx(float(right))
        assert found.labels == samples.num_labels == 13


# Training


@pytest.mark.parametrize("kind", take_few(BASES, "t5", "bert", "llama", "marian"))
def test_it_learns_and_the_adapter_can_be_loaded_again(tmp_path: Path, kind: str) -> None:
    base = BASES[kind]()
    before = {key: tensor.clone() for key, tensor in base.model.state_dict().items()}
    recipe = recipe_of(tmp_path, steps=10, lora={"r": 4}, **changes_of(kind))
    report = train(recipe, base=base)
    assert report.before is not None
    assert report.after is not None
    assert report.after.loss < report.before.loss - 0.1
    assert all(torch.equal(base.model.state_dict()[key], tensor) for key, tensor in before.items())
    adapter = Adapter.load(report.out)
    assert adapter.config.task_type == ("SEQ_2_SEQ_LM" if kind in BOTH else "TOKEN_CLS")
    assert adapter.record.get("labels") == (None if kind in BOTH else ["L", "O", "P"])
    assert bool(adapter.config.modules_to_save) == (kind not in BOTH)
    bank = attach(base.model)
    bank.load("again", adapter)
    bank.use("again")
    make = paired if kind in BOTH else tagged
    samples = make(tmp_path, recipe_rows(kind), base.tokenizer, max_length=64)
    again = measure(base.model, samples, Collator(texts.PAD, base.decoder_inputs))
    assert again.metrics() == pytest.approx(report.after.metrics(), abs=1e-5)


def recipe_rows(kind: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = changes_of(kind)["rows"]
    return rows


@pytest.mark.parametrize("kind", take_few(["t5", "bart", "bert", "llama"], "t5"))
def test_accumulation_equals_one_big_batch(tmp_path: Path, kind: str) -> None:
    adapters = []
    for name, size, accumulation in (("big", 4, 1), ("small", 1, 4)):
        section = {"max_steps": 4, "per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation,
                   "train_sampling_strategy": "sequential", "optim": "sgd", "learning_rate": 0.5}  # fmt: skip
        recipe = recipe_of(tmp_path, train=section, out=str(tmp_path / name), **changes_of(kind))
        adapters.append(Adapter.load(train(recipe, base=BASES[kind]()).out))
    for key, tensor in adapters[0].tensors.items():
        torch.testing.assert_close(adapters[1].tensors[key], tensor, rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_killed_and_started_again_it_ends_with_the_same_bytes(tmp_path: Path, kind: str) -> None:
    recipe = long_recipe(tmp_path, **changes_of(kind))
    expected = unbroken(recipe, BASES[kind])
    killed(recipe, die_at(4), base=BASES[kind])
    train(recipe, base=BASES[kind]())
    assert results(Path(recipe["out"])) == expected


def test_a_decoder_writes_what_it_learned(tmp_path: Path) -> None:
    base = both()
    rows = [{"prompt": "one", "completion": "1"}, {"prompt": "two", "completion": "22"}]
    recipe = recipe_of(tmp_path, steps=120, rows=rows, task="seq2seq", lora={"r": 8, "lora_alpha": 32})
    report = train(recipe, base=base)
    assert report.tokens == 120 * paired(tmp_path, rows, base.tokenizer).num_tokens
    bank = attach(base.model)
    bank.load("again", report.out)
    bank.use("again")
    for row in rows:
        ids = torch.tensor([tokenize_source(base.tokenizer, row["prompt"])])
        out = base.model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0]
        assert out.tolist() == [texts.PAD, *base.tokenizer(row["completion"])["input_ids"]]


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_peft_gives_the_same_logits(tmp_path: Path, kind: str) -> None:
    import peft

    base = BASES[kind]()
    report = train(recipe_of(tmp_path, steps=5, **changes_of(kind)), base=base)
    make = paired if kind in BOTH else tagged
    batch = Collator(texts.PAD, base.decoder_inputs)(list(make(tmp_path, recipe_rows(kind), base.tokenizer)))
    bank = attach(base.model)
    bank.load("again", report.out)
    bank.use("again")
    own = tiny.logits(base.model, batch)
    theirs = peft.PeftModel.from_pretrained(BASES[kind]().model, str(report.out)).eval()
    torch.testing.assert_close(tiny.logits(theirs, batch), own, rtol=0, atol=1e-5)


def test_features_train_the_head_of_words_alone(tmp_path: Path) -> None:
    report = train(recipe_of(tmp_path, method="features", **changes_of("bert")), base=tagger())
    adapter = Adapter.load(report.out)
    assert set(adapter.tensors) == {f"base_model.model.classifier.{name}" for name in ("weight", "bias")}


def test_samples_that_are_divided_otherwise_are_another_run() -> None:
    one, other = (
        join_samples([([4], [5, 6]), ([7], [8])], kind="target"),
        join_samples([([4], [5]), ([7], [6, 8])], kind="target"),
    )
    assert torch.equal(one.labels, other.labels)
    assert hash_samples(one) != hash_samples(other)


# What does not go together


def test_a_task_and_a_base_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "t5"
    t5().save_pretrained(folder)
    ended().save_pretrained(folder)
    with pytest.raises(BaseModelError, match="task: seq2seq"):
        load_base(folder)
    with pytest.raises(BaseModelError, match="needs an encoder and a decoder"):
        load_base("kit-base", task="seq2seq")
    assert load_base(folder, task="seq2seq").decoder_inputs is not None
    assert load_base("kit-base").decoder_inputs is None


def test_rows_of_another_task_are_refused_with_the_task_that_takes_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"task seq2seq takes completion.*task: tokens takes these rows"):
        train(recipe_of(tmp_path, rows=TAGGED, task="seq2seq"), base=both())
    with pytest.raises(DataError, match=r"task tokens takes words.*task: causal-lm takes these rows"):
        train(recipe_of(tmp_path, rows=PAIRS, task="tokens"), base=tagger())


def test_a_separator_is_not_put_between_an_encoder_and_a_decoder(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, rows=PAIRS, task="seq2seq")
    assert train(recipe, base=both()).recipe.data.separator == ""
    with pytest.raises(RecipeError, match=r"data\.separator is for causal-lm"):
        train(recipe, base=both(), overrides={"data.separator": " => "}, replace=True)


# Prepare and preview


def test_prepare_writes_a_recipe_of_the_task(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    folder = tmp_path / "t5"
    t5().save_pretrained(folder)
    ended().save_pretrained(folder)
    source = texts.write(tmp_path / "pairs.jsonl", PAIRS)
    found = prepare(source, tmp_path / "pairs", base=str(folder), share=0.2)
    assert found.recipe is not None
    assert load_recipe(found.recipe).task == "seq2seq"
    # The longest side of each row, with its EOS.
    assert found.parts[0].examined.measured.lengths == (4, 16, 20, 5, 2)
    words = prepare(texts.write(tmp_path / "words.jsonl", TAGGED), tmp_path / "words", base=str(folder), share=0)
    assert words.recipe is not None
    assert load_recipe(words.recipe).task == "tokens"
    assert read_rows(tmp_path / "words" / "train.jsonl").values == read_rows(tmp_path / "words.jsonl").values
    assert words.parts[0].examined.labels == {"O": 7, "P": 4, "L": 2}


def test_a_preview_shows_what_a_decoder_learns_after_what_an_encoder_reads(tmp_path: Path) -> None:
    tokenizer = ended()
    samples = paired(tmp_path, [{"prompt": "ab", "completion": "cd"}], tokenizer)
    assert [(span.text.replace(" ", ""), span.learned) for span in preview_sample(tokenizer, samples, 0)] == [
        ("ab</s>", False),
        ("cd</s>", True),
    ]
