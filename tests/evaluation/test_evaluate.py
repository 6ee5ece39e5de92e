"""Adapters side by side on a file: each measured as alone, on rows put as those of its training."""

from __future__ import annotations

import json
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_kit as lk
from lora_kit.data.batches import Collator
from lora_kit.data.encode import encode
from lora_kit.data.rows import read_rows
from lora_kit.data.templates import ChatTemplate
from lora_kit.errors import AdapterError, BaseModelError, ConfigError, DataError, StorageError
from lora_kit.evaluation.eval_report import EvalReport
from lora_kit.evaluation.evaluate import evaluate
from lora_kit.evaluation.generation_metrics import build_generation_task, collect_eval_prompts, generate_completions
from lora_kit.evaluation.measure import measure
from lora_kit.generation.decoding import Sampling
from lora_kit.generation.generate import generate
from lora_kit.models.loading import Base
from lora_kit.training.train import train
from tests.support import texts, tiny
from tests.support.random_adapters import made
from tests.support.sequences import TAGGED, both, tagger
from tests.support.training import recipe_of

# Two answers to the first prompt; one prompt as long as three others.
ROWS = [
    {"prompt": "one", "completion": "two"},
    {"prompt": "a prompt of its length", "completion": "x"},
    {"prompt": "one", "completion": "three"},
    {"prompt": "b", "completion": "a longer one"},
]
LABELED = [{"text": word * n, "label": label} for word, label in (("good ", "yes"), ("bad ", "no")) for n in (1, 2, 3)]
CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def base() -> Base:
    return Base(model=tiny.llama(), tokenizer=texts.tokenizer(), name="tiny")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return texts.write(tmp_path / "rows.jsonl", ROWS)


def recorded(adapter: lk.Adapter, **record: Any) -> lk.Adapter:
    return lk.Adapter(adapter.config, adapter.tensors, record={**adapter.record, **record})


def chatty(base: Base, *, seed: int) -> lk.Adapter:
    return recorded(made(base, seed=seed), recipe={"data": {"separator": "", "chat_template": CHAT}})


def alone(base: Base, adapter: lk.Adapter | None, path: Path, **settings: Any) -> dict[str, float]:
    """The metrics of one adapter, measured with nothing beside it."""
    given = encode(read_rows(path), base.tokenizer, max_length=64, **settings)
    if adapter is None:
        return measure(base.model, given, Collator(texts.PAD)).metrics()
    bank = lk.attach(base.model)
    try:
        bank.load("alone", adapter)
        with bank.using("alone"):
            return measure(base.model, given, Collator(texts.PAD)).metrics()
    finally:
        bank.detach()


# Side by side


def test_each_has_the_loss_it_has_alone_on_prompts_put_as_in_its_training(base: Base, rows: Path) -> None:
    one, two = made(base, seed=1, separator=" -> "), made(base, seed=2, separator="\n")
    found = evaluate(base, [one, None, two], rows, batch_size=3)
    assert [each.name for each in found.results] == [one.digest[:12], "base", two.digest[:12]]
    assert found.results[0].metrics == pytest.approx(alone(base, one, rows, separator=" -> "), rel=1e-5)
    assert found.results[1].metrics == pytest.approx(alone(base, None, rows, separator=" -> "), rel=1e-5)
    assert found.results[2].metrics == pytest.approx(alone(base, two, rows, separator="\n"), rel=1e-5)
    assert len({each.metrics["loss"] for each in found.results}) == 3


def test_each_writes_what_it_writes_alone(base: Base, rows: Path) -> None:
    given = [made(base, seed=1, separator=" -> "), None, chatty(base, seed=3), made(base, seed=2, separator="")]
    found = evaluate(base, given, rows, metrics=["exact_match", "bleu", "rouge"], batch_size=4)
    assert [case.given for case in found.cases] == ["one", "a prompt of its length", "b"]
    longest = Sampling(max_new_tokens=len("a longer one") + 1)
    cut: list[bool] = []
    for place, case in enumerate(found.cases):
        # The base is given what the first adapter beside it is given.
        wanted = generate(base, given, str(case.given), sampling=longest)
        assert [each.said[place] for each in found.results] == [row.text.strip() for row in wanted]
        cut += [row.ended != "eos" for row in wanted]
    assert len({each.said for each in found.results}) == 4
    assert sum(each.unended for each in found.results) == sum(cut)
    assert set(found.results[0].metrics) == {"exact_match", "bleu", "rouge"}


def test_rows_with_one_prompt_are_references_of_one_another(rows: Path) -> None:
    questions = collect_eval_prompts(read_rows(rows))
    assert [question.references for question in questions] == [("two", "three"), ("x",), ("a longer one",)]
    assert [question.lines for question in questions] == [(1, 3), (2,), (4,)]


def test_every_answer_of_a_conversation_is_asked_for_after_what_stands_before_it(base: Base, tmp_path: Path) -> None:
    roles = ["user", "assistant"]
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(("hi", "yes", "why", "so"))]
    path = texts.write(tmp_path / "chat.jsonl", [{"messages": messages}, {"messages": messages[:2]}])
    questions = collect_eval_prompts(read_rows(path))
    assert [question.references for question in questions] == [("yes", "yes"), ("so",)]
    put = build_generation_task(base, questions, ChatTemplate(CHAT, "chat"))
    assert [row.text for row in put.rows] == [
        "[user]hi[assistant]",
        "[user]hi[assistant]yes</s>[user]why[assistant]",
    ]
    adapter = chatty(base, seed=3)
    found = evaluate(base, [adapter], path, metrics=["loss", "exact_match"])
    assert found.results[0].metrics["loss"] == pytest.approx(
        alone(base, adapter, path, template=ChatTemplate(CHAT, "chat"))["loss"], rel=1e-5
    )
    with pytest.raises(DataError, match="no chat template"):
        evaluate(base, [made(base, seed=1, separator="\n")], path)
    single = texts.write(tmp_path / "single.jsonl", [{"messages": messages[:2]}])
    plain = made(base, seed=1, separator=" -> ")
    same = texts.write(tmp_path / "same.jsonl", [{"prompt": "hi", "completion": "yes"}])
    metrics = ["loss", "exact_match"]
    assert (
        evaluate(base, [plain], single, metrics=metrics).results[0].metrics
        == evaluate(base, [plain], same, metrics=metrics).results[0].metrics
    )


@pytest.mark.parametrize("size", [1, 3, 64])
def test_the_batch_size_changes_nothing(base: Base, rows: Path, size: int) -> None:
    given = [made(base, seed=1, separator=" -> "), None]
    metrics = ["loss", "exact_match", "chrf"]
    one, other = (evaluate(base, given, rows, metrics=metrics, batch_size=each) for each in (2, size))
    for before, after in zip(one.results, other.results, strict=True):
        assert after.said == before.said
        assert after.metrics == pytest.approx(before.metrics, abs=1e-6)


def test_a_batch_holds_rows_of_several_adapters(base: Base, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    own = base.model.generate

    def counted(**settings: Any) -> Any:
        sizes.append(len(settings["input_ids"]))
        return own(**settings)

    monkeypatch.setattr(base.model, "generate", counted, raising=False)
    evaluate(base, [made(base, seed=1), made(base, seed=2), None], rows, metrics=["exact_match"], batch_size=6)
    assert sizes == [6, 3]


def test_a_prompt_without_room_for_an_answer_is_cut_on_its_left(
    base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = texts.write(tmp_path / "long.jsonl", [{"prompt": "b" * 30 + "a" * 70, "completion": "yes"}])
    [question] = collect_eval_prompts(read_rows(path))
    put = build_generation_task(base, [question], "?", max_new_tokens=10)
    assert put.rows[0].ids == base.tokenizer("a" * 53 + "?")["input_ids"]
    assert "1 of 1 prompts were cut on the left to fit 54 tokens" in caplog.text
    assert len(generate_completions({"": put}, batch_size=2)[""][0].ids) <= 10
    with pytest.raises(ConfigError, match="64 tokens"):
        build_generation_task(base, [question], "", max_new_tokens=64)


# Labels


def classifier() -> Base:
    return Base(model=tiny.bert(labels=2), tokenizer=texts.bert_tokenizer(), name="tiny", task="classify")


def heads_of(base: Base, *, labels: list[str], seed: int) -> lk.Adapter:
    return recorded(
        made(base, seed=seed, task_type="SEQ_CLS", modules_to_save=["classifier"], target_modules=["query"]),
        labels=labels,
    )


def test_labels_are_those_of_the_adapters_own_record(tmp_path: Path) -> None:
    base = classifier()
    path = texts.write(tmp_path / "rows.jsonl", LABELED)
    adapter = heads_of(base, labels=["no", "yes"], seed=1)
    turned = recorded(adapter, labels=["yes", "no"])
    metrics = ["loss", "accuracy", "f1", "f1_micro"]
    one = evaluate(base, [adapter], path, metrics=metrics).results[0]
    other = evaluate(base, [turned], path, metrics=metrics).results[0]
    right = [row["label"] for row in LABELED]
    assert one.metrics["accuracy"] == sum(a == b for a, b in zip(one.said, right, strict=True)) / 6
    assert [{"yes": "no", "no": "yes"}[str(label)] for label in one.said] == list(other.said)
    assert one.metrics["accuracy"] == pytest.approx(1 - other.metrics["accuracy"])
    assert one.metrics["loss"] != other.metrics["loss"]


def test_a_label_that_the_adapter_does_not_know_is_refused_with_the_list(tmp_path: Path) -> None:
    path = texts.write(tmp_path / "rows.jsonl", [*LABELED, {"text": "so", "label": "perhaps"}])
    base = classifier()
    with pytest.raises(DataError, match=r":7: label 'perhaps' is not one of no, yes"):
        evaluate(base, [heads_of(base, labels=["no", "yes"], seed=1)], path)
    with pytest.raises(AdapterError, match="3 labels, the model's head 2"):
        evaluate(base, [heads_of(base, labels=["no", "perhaps", "yes"], seed=1)], path)


def test_what_is_said_of_a_row_stands_beside_what_was_expected(tmp_path: Path) -> None:
    base = classifier()
    path, out = texts.write(tmp_path / "rows.jsonl", LABELED), tmp_path / "said.jsonl"
    adapters = [heads_of(base, labels=["no", "yes"], seed=seed) for seed in (1, 2)]
    found = evaluate(base, adapters, path, out=out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["lines"] for line in lines] == [[n] for n in range(1, 7)]
    assert [line["given"] for line in lines] == [row["text"] for row in LABELED]
    assert [line["expected"] for line in lines] == [row["label"] for row in LABELED]
    for each in found.results:
        assert [line["said"][each.name] for line in lines] == list(each.said)
    with pytest.raises(StorageError, match="exists"):
        evaluate(base, adapters, path, out=out)
    assert len(list(tmp_path.iterdir())) == 2


def test_tagged_words_are_measured_by_word_and_by_row(tmp_path: Path) -> None:
    base = tagger()
    path = texts.write(tmp_path / "rows.jsonl", TAGGED)
    report = train(recipe_of(tmp_path, rows=TAGGED, task="tokens", steps=25), base=base)
    found = evaluate(base, [report.out], path, metrics=["loss", "accuracy", "exact_match", "f1"]).results[0]
    assert report.after is not None
    assert {name: found.metrics[name] for name in ("loss", "accuracy")} == pytest.approx(report.after.metrics())
    right = [tuple(row["labels"]) for row in TAGGED]
    assert found.metrics["exact_match"] == sum(a == b for a, b in zip(found.said, right, strict=True)) / 5
    flat = [pair for a, b in zip(found.said, right, strict=True) for pair in zip(a, b, strict=True)]
    assert found.metrics["accuracy"] == pytest.approx(sum(a == b for a, b in flat) / len(flat))
    assert found.metrics["accuracy"] > 0.5


# Texts for texts


@pytest.mark.parametrize("kind", ["t5", "bart", "m2m"])
def test_a_decoder_writes_what_transformers_writes(tmp_path: Path, kind: str) -> None:
    base = both(kind)
    path = texts.write(tmp_path / "rows.jsonl", ROWS)
    found = evaluate(base, [None], path, metrics=["loss", "perplexity", "exact_match"], max_new_tokens=8)
    result = found.results[0]
    for case, said in zip(found.cases, result.said, strict=True):
        ids = base.tokenizer(case.given, return_tensors="pt")["input_ids"]
        out = base.model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0]
        assert said == base.tokenizer.decode(out, skip_special_tokens=True).strip()
    assert any(result.said) is (kind != "t5")
    given = encode(read_rows(path), base.tokenizer, max_length=64, separator="", task="seq2seq")
    wanted = measure(base.model, given, Collator(texts.PAD, base.decoder_inputs)).metrics()
    assert {name: result.metrics[name] for name in wanted} == pytest.approx(wanted, abs=1e-6)


def test_adapters_of_an_encoder_and_decoder_stand_side_by_side(tmp_path: Path) -> None:
    base = both("bart")
    path = texts.write(tmp_path / "rows.jsonl", ROWS)
    fields = {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q_proj", "v_proj"]}
    given = [made(base, seed=1, separator="", **fields), None, made(base, seed=2, separator="", **fields)]
    together = evaluate(base, given, path, metrics=["loss", "exact_match"], batch_size=9)
    for adapter, result in zip(given, together.results, strict=True):
        single = evaluate(base, [adapter], path, metrics=["loss", "exact_match"]).results[0]
        assert (result.said, result.unended) == (single.said, single.unended)
        assert result.metrics == pytest.approx(single.metrics, abs=1e-6)
    assert len({each.said for each in together.results}) == 3
    assert [row.text for row in generate(base, given, "one", sampling=Sampling(max_new_tokens=8))] == [
        generate(base, [each], "one", sampling=Sampling(max_new_tokens=8))[0].text for each in given
    ]


# As training measured


def test_an_adapter_has_the_metrics_that_training_reported(tmp_path: Path) -> None:
    base = Base(model=tiny.llama(), tokenizer=texts.tokenizer(), name="tiny")
    # A limit that cuts prompts: without it in the record the loss would be another.
    report = train({**recipe_of(tmp_path, rows=ROWS, steps=8), "data": data_of(tmp_path, max_length=16)}, base=base)
    found = evaluate(base, [None, report.out], tmp_path / "rows.jsonl")
    assert report.before is not None
    assert report.after is not None
    assert found["base"].metrics == pytest.approx(report.before.metrics(), rel=1e-5)
    assert found["out"].metrics == pytest.approx(report.after.metrics(), rel=1e-5)
    assert found["out"].digest == report.digest


def data_of(folder: Path, **fields: Any) -> dict[str, Any]:
    rows = str(folder / "rows.jsonl")
    return {"train": rows, "validation": rows, "separator": " => ", **fields}


def test_a_model_that_was_trained_whole_is_given_what_its_recipe_says(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    texts.tokenizer().save_pretrained(tmp_path / "base")
    recipe = recipe_of(tmp_path, rows=ROWS, method="full", train={"learning_rate": 1e-3})
    report = train({**recipe, "base": str(tmp_path / "base"), "data": data_of(tmp_path)})
    found = evaluate(str(report.out), [None], tmp_path / "rows.jsonl")
    assert report.after is not None
    assert found["base"].metrics == pytest.approx(report.after.metrics(), rel=1e-5)


# What it leaves alone, and what it does not keep


def test_nothing_random_is_drawn_and_modes_and_weights_stay(rows: Path) -> None:
    base = Base(model=tiny.gpt2(), tokenizer=texts.tokenizer(), name="tiny")
    base.model.transformer.drop.p = 0.9
    base.model.train()
    base.model.transformer.h[0].eval()
    adapter = made(base, seed=1)
    modes = [module.training for module in base.model.modules()]
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    random = torch.get_rng_state()
    first, second = (evaluate(base, [adapter, None], rows, metrics=["loss", "exact_match"]) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in base.model.modules()] == modes
    now = base.model.state_dict()
    assert list(now) == list(before)
    assert all(torch.equal(now[name], before[name]) for name in now)
    assert [each.metrics for each in first.results] == [each.metrics for each in second.results]
    base.model.eval()
    assert evaluate(base, [adapter, None], rows, metrics=["exact_match"]).results[1].said == first.results[1].said


@pytest.mark.parametrize("kind", ["whole text", "words", "next token"])
def test_the_logits_of_a_batch_are_gone_before_the_next(tmp_path: Path, kind: str) -> None:
    base = {"whole text": classifier, "words": tagger, "next token": llama_with_its_logits}[kind]()
    rows: list[Any] = {"whole text": LABELED, "words": TAGGED, "next token": ROWS}[kind]  # type: ignore[assignment]
    head = base.model.get_output_embeddings() if kind == "next token" else base.model.classifier
    kept: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def watch(module: Any, inputs: Any, output: torch.Tensor) -> None:
        alive.append(sum(reference() is not None for reference in kept))
        kept.append(weakref.ref(output))

    with_labels: dict[str, Any] = (
        {"label2id": {"no": 0, "yes": 1}} if kind == "whole text" else {"label2id": {"P": 0, "O": 1, "L": 2}}
    )
    given = encode(read_rows(texts.write(tmp_path / "rows.jsonl", rows)), base.tokenizer, max_length=64, **with_labels)
    with head.register_forward_hook(watch):
        measure(base.model, given, Collator(texts.PAD), batch_size=1, metrics=[] if kind == "next token" else ["f1"])
    assert len(alive) >= len(given)
    # The output of the batch before is let go of while the next one is on its way through the head.
    assert max(alive) <= 1
    assert sum(reference() is not None for reference in kept) == 0


def llama_with_its_logits() -> Base:
    return Base(model=tiny.llama(), tokenizer=texts.tokenizer(), name="tiny")


# Refused before any work


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"metrics": ["rogue"]}, "did you mean 'rouge'"),
        ({"metrics": ["accuracy"]}, "does not fit task causal-lm"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"metrics": ["loss"], "out": "said.jsonl"}, "ask for exact_match too"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_before_the_base_is_loaded(
    base: Base, rows: Path, settings: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise BaseModelError("the base was loaded")

    monkeypatch.setattr("lora_kit.evaluation.label_base.load_base", never)
    adapter = made(base, seed=1, task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match=told):
        evaluate("no/base", [adapter], rows, **settings)


def test_rows_of_another_task_are_refused(base: Base, tmp_path: Path) -> None:
    labeled = texts.write(tmp_path / "labeled.jsonl", LABELED)
    with pytest.raises(DataError, match="task causal-lm takes completion, chat, text"):
        evaluate(base, [made(base, seed=1)], labeled)
    plain = texts.write(tmp_path / "plain.jsonl", [{"text": "one two"}])
    assert evaluate(base, [None], plain).results[0].metrics["loss"] > 0
    with pytest.raises(DataError, match="have no prompts"):
        evaluate(base, [None], plain, metrics=["bleu"])


def test_adapters_of_different_tasks_are_refused(base: Base, rows: Path) -> None:
    one, two = made(base, seed=1, task_type="CAUSAL_LM"), made(base, seed=2, task_type="SEQ_CLS")
    with pytest.raises(AdapterError, match="different tasks"):
        evaluate(base, [one, two], rows)
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        evaluate(base, [], rows)


def test_progress_counts_every_row_of_every_adapter(base: Base, rows: Path, caplog: pytest.LogCaptureFixture) -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    given = [made(base, seed=1), None]
    with caplog.at_level(logging.INFO, logger="lora_kit"):
        found: EvalReport = lk.evaluate(
            base,
            given,
            rows,
            metrics=["loss", "exact_match"],
            on_progress=lambda name, done, total: told.setdefault(name, []).append((done, total)),
        )
    assert list(told) == [each.name for each in found.results]
    # Four rows whose loss is taken, three prompts that are answered.
    assert all(counts[-1] == (7, 7) and counts == sorted(counts) for counts in told.values())
    assert caplog.text.count("exact_match") == 2
