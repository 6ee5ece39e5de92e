"""Training end to end on tiny models: what changes, what does not, what repeats, and what is left behind."""

from __future__ import annotations

import functools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora_kit
from lora_kit.adapter.adapter import Adapter
from lora_kit.bank.attach import attach
from lora_kit.data.batches import Collator
from lora_kit.data.encode import encode
from lora_kit.data.rows import read_rows
from lora_kit.errors import (
    BaseModelError,
    DataError,
    LoraKitError,
    RecipeError,
    StorageError,
    TargetError,
    VerificationError,
)
from lora_kit.evaluation.measure import measure
from lora_kit.models.loading import Base, load_base
from lora_kit.training.results import TrainReport
from lora_kit.training.train import train
from tests.support import heads, merging, texts, tiny
from tests.support.long_runs import take_few
from tests.support.training import LABELED, PAIRS, At, base_of, recipe_of, same_state, state, weights_of

# What comes out


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("llama", torch.bfloat16),
        ("gpt2", torch.float32),
        pytest.param("llama", torch.float32, marks=pytest.mark.slow),
        pytest.param("gpt2", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_training_lowers_the_loss_and_leaves_the_base_as_it_was(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    base = base_of(kind, dtype=dtype)
    before, gradients = state(base.model), [p.requires_grad for p in base.model.parameters()]
    settings, attributes = base.model.config.to_dict(), set(vars(base.model))
    report = train(recipe_of(tmp_path, steps=20), base=base)
    assert report.after is not None
    assert report.before is not None
    assert report.after.loss < report.before.loss - 0.1
    assert same_state(base.model, before)
    assert [p.requires_grad for p in base.model.parameters()] == gradients
    assert base.model.config.to_dict() == settings
    assert set(vars(base.model)) == attributes
    assert not any(module.training for module in base.model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.model.modules())


@pytest.mark.report
def test_the_result_is_an_adapter_folder_that_says_how_it_came_to_be(tmp_path: Path) -> None:
    base = base_of()
    report = train(recipe_of(tmp_path, lora={"r": 4}), base=base)
    names = {path.name for path in report.out.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "lora_kit.json", "README.md",
                     "recipe.yaml", "metrics.jsonl", "report.html", "loss.png"}  # fmt: skip
    adapter = Adapter.load(report.out)
    assert adapter.digest == report.digest
    assert adapter.config.r == 4
    assert adapter.config.task_type == "CAUSAL_LM"
    assert adapter.config.base_model_name_or_path == "tiny"
    assert adapter.record["seed"] == 0
    assert adapter.record["recipe"]["data"]["separator"] == "\n"
    assert adapter.record["recipe"]["data"]["max_length"] == 64
    assert report.after is not None
    assert adapter.record["metrics"]["perplexity"] == report.after.perplexity
    assert report.trainable == adapter.num_parameters
    assert report.parameters == base.model.num_parameters() + report.trainable
    lines = [json.loads(line) for line in (report.out / "metrics.jsonl").read_text().splitlines()]
    assert lines == [dict(entry) for entry in report.history]
    assert [line["step"] for line in lines] == [0, 3, 3, 3]
    assert (report.out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_saved_adapter_gives_the_metrics_it_was_saved_with(tmp_path: Path) -> None:
    base = base_of()
    recipe = recipe_of(tmp_path, steps=10)
    report = train(recipe, base=base)
    samples = encode(read_rows(recipe["data"]["train"]), base.tokenizer, max_length=64)
    bank = attach(base.model)
    bank.load("again", report.out)
    bank.use("again")
    assert report.after is not None
    again = measure(base.model, samples, Collator(texts.PAD))
    assert again.loss == pytest.approx(report.after.loss, abs=1e-6)
    assert again.labels == report.after.labels


def test_one_base_trains_one_adapter_after_another(tmp_path: Path) -> None:
    base = base_of()
    before = state(base.model)
    digests = [train(recipe_of(tmp_path) | {"out": str(tmp_path / name)}, base=base).digest for name in ("a", "b")]
    assert digests[0] == digests[1]
    assert same_state(base.model, before)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, steps=5, lora={"lora_dropout": 0.2}, train={"per_device_train_batch_size": 2})
    outs = [train({**recipe, "out": str(tmp_path / name)}, base=base_of("gpt2")) for name in ("a", "b")]
    assert weights_of(outs[0]) == weights_of(outs[1])
    torch.manual_seed(99)
    evaluating = {**recipe["train"], "eval_strategy": "steps", "eval_steps": 2}
    third = train({**recipe, "out": str(tmp_path / "c"), "train": evaluating}, base=base_of("gpt2"))
    assert weights_of(third) == weights_of(outs[0])
    other = train({**recipe, "out": str(tmp_path / "d")}, base=base_of("gpt2"), overrides={"train.seed": "1"})
    assert weights_of(other) != weights_of(outs[0])


# The arithmetic of the loss


@pytest.mark.parametrize("kind", take_few(["llama", "bert"], "bert"))
def test_accumulation_equals_one_big_batch(tmp_path: Path, kind: str) -> None:
    # Five samples in windows of four: the last window is short in both.
    rows = LABELED[1:] if kind == "bert" else PAIRS
    labels: dict[str, Any] = {"labels": 2} if kind == "bert" else {}
    task: dict[str, Any] = {"task": "classify"} if kind == "bert" else {}
    adapters = []
    for name, size, accumulation in (("big", 4, 1), ("small", 1, 4)):
        section = {"max_steps": 4, "per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation,
                   "train_sampling_strategy": "sequential", "max_grad_norm": 0.1, "weight_decay": 0.1,
                   "optim": "sgd", "learning_rate": 1.0, "logging_steps": 1}  # fmt: skip
        recipe = recipe_of(tmp_path, rows=rows, train=section, out=str(tmp_path / name), **task)
        base = base_of(kind, **labels)
        for module in base.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        report = train(recipe, base=base)
        adapters.append((Adapter.load(report.out), [entry["loss"] for entry in report.history if "loss" in entry]))
    (big, big_losses), (small, small_losses) = adapters
    assert big_losses == pytest.approx(small_losses, abs=1e-6)
    for key, tensor in big.tensors.items():
        torch.testing.assert_close(small.tensors[key], tensor, rtol=0, atol=1e-6)


def test_padding_does_not_change_the_loss(tmp_path: Path) -> None:
    base = base_of()
    samples = encode(read_rows(texts.write(tmp_path / "rows.jsonl", PAIRS)), base.tokenizer, max_length=64)
    alone = measure(base.model, samples, Collator(texts.PAD), batch_size=1)
    for size, pad in ((5, texts.PAD), (3, texts.EOS)):
        assert measure(base.model, samples, Collator(pad), batch_size=size).loss == pytest.approx(alone.loss, abs=1e-6)


def test_evaluation_is_the_mean_over_tokens(tmp_path: Path) -> None:
    base = base_of()
    samples = encode(read_rows(texts.write(tmp_path / "rows.jsonl", PAIRS)), base.tokenizer, max_length=64)
    total, count = 0.0, 0
    for sample in samples:
        ids, labels = sample["input_ids"][None], sample["labels"]
        with torch.no_grad():
            likelihood = base.model(ids).logits.log_softmax(-1)[0]
        for place in range(1, len(labels)):
            if labels[place] != -100:
                total, count = total - float(likelihood[place - 1, labels[place]]), count + 1
    found = measure(base.model, samples, Collator(texts.PAD), batch_size=2)
    assert found.labels == count == samples.num_labels
    assert found.loss == pytest.approx(total / count, abs=1e-5)
    assert found.perplexity == pytest.approx(2.718281828459045**found.loss)


def test_evaluating_draws_no_random_number_and_keeps_modes(tmp_path: Path) -> None:
    base = base_of("gpt2")
    base.model.train()
    base.model.transformer.h[0].eval()
    modes = [module.training for module in base.model.modules()]
    samples = encode(read_rows(texts.write(tmp_path / "rows.jsonl", PAIRS)), base.tokenizer, max_length=64)
    before = torch.get_rng_state()
    assert measure(base.model, samples, Collator(texts.PAD)) is not None
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in base.model.modules()] == modes


def losses_of(report: TrainReport) -> list[float]:
    """The loss of every step, and the one on the validation file after them."""
    assert report.after is not None
    return [entry["loss"] for entry in report.history if "loss" in entry] + [report.after.loss]


def keep_logits(model: Any) -> None:
    """Make the head one whose logits are needed: a hook may look at them."""
    model.get_output_embeddings().register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("kind", take_few(["llama", "gpt2"], "gpt2"))
@pytest.mark.parametrize(
    "section",
    [
        {},
        {"label_smoothing_factor": 0.1},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": True},
        {"bf16": True},
    ],
    ids=lambda section: next(iter(section), "plain"),
)
def test_losses_without_logits_are_those_from_logits(
    tmp_path: Path, kind: str, section: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    found = []
    for name, prepare in (("without", lambda _: None), ("from", keep_logits)):
        base = base_of(kind)
        prepare(base.model)
        recipe = recipe_of(tmp_path, train={**section, "logging_steps": 1}, steps=5, out=str(tmp_path / name))
        with caplog.at_level("INFO", logger="lora_kit"):
            found.append(losses_of(train(recipe, base=base)))
    assert "the head is frozen: the loss is computed in chunks" in caplog.text
    assert "the loss is computed from the model's logits: the head has hooks" in caplog.text
    # In bf16 the two round the gradient at different places.
    assert found[0] == pytest.approx(found[1], rel=1e-3 if "bf16" in section else 1e-6)


def test_training_makes_no_logits_of_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(TorchDispatchMode):
        """The most rows of logits in any tensor."""

        most = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(found):
                # (32, 96) is the head's own weight, the other way round.
                if isinstance(leaf, torch.Tensor) and leaf.shape[-1:] == (96,) and leaf.shape != (32, 96):
                    self.most = max(self.most, leaf.numel() // 96)
            return found

    monkeypatch.setattr("lora_kit.ops.cross_entropy.LOGITS_BYTES", {"cpu": 1})
    monkeypatch.setattr("lora_kit.ops.cross_entropy.MIN_CHUNK_ROWS", 2)
    found = []
    for name, prepare in (("without", lambda _: None), ("from", keep_logits)):
        base = base_of()
        prepare(base.model)
        with Rows() as counted:
            train(recipe_of(tmp_path, out=str(tmp_path / name)), base=base)
        found.append(counted.most)
    probed = 5 * 2  # the first two positions of an evaluated batch
    assert found[0] == probed
    assert found[1] > 3 * probed


@pytest.mark.parametrize("model", take_few(["gemma2", "granite"], "gemma2"))
def test_a_model_that_changes_its_logits_is_trained_on_them(
    tmp_path: Path, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    base = Base(model=heads.MODELS[model](), tokenizer=texts.tokenizer(), name="tiny", task="causal-lm")
    recipe = recipe_of(tmp_path, steps=10)
    samples = encode(read_rows(recipe["data"]["train"]), base.tokenizer, max_length=64)
    batch = Collator(texts.PAD)(list(samples))
    with torch.no_grad():
        own = float(base.model(**batch).loss)
    with caplog.at_level("INFO", logger="lora_kit"):
        report = train(recipe, base=base)
    assert "the model changes its logits" in caplog.text
    assert report.before is not None
    assert report.after is not None
    assert report.before.loss == pytest.approx(own, rel=1e-6)
    assert report.after.loss < own - 0.1


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "the head is a LoraLinear"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "the head is a SavedModule"),
    ],
)
def test_a_head_with_an_adapter_is_trained_through_its_logits(
    tmp_path: Path, lora: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="lora_kit"):
        report = train(recipe_of(tmp_path, lora=lora), base=base_of())
    assert f"the loss is computed from the model's logits: {reason}" in caplog.text
    trained = Adapter.load(report.out).tensors
    assert any(tensor.any() for key, tensor in trained.items() if "lm_head" in key)
    initial = base_of().model.lm_head.weight
    saved = trained.get("base_model.model.lm_head.weight")
    assert saved is None or not torch.equal(saved, initial)


def test_doras_are_trained_without_logits(tmp_path: Path) -> None:
    report = train(recipe_of(tmp_path, lora={"use_dora": True}, steps=10), base=base_of())
    assert report.before is not None
    assert report.after is not None
    assert report.after.loss < report.before.loss - 0.1


def test_an_error_within_a_step_leaves_the_head_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of()
    attributes = dict(vars(base.model.lm_head))

    def fails(*_: Any, **__: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("lora_kit.evaluation.loss.chunked_cross_entropy", fails)
    with pytest.raises(MemoryError, match="memory ran out"):
        train({**recipe_of(tmp_path), "data": str(tmp_path / "rows.jsonl")}, base=base)
    assert vars(base.model.lm_head) == attributes


@pytest.mark.parametrize("kind", take_few(["llama", "bert"], "llama"))
def test_a_batch_in_parts_gives_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    rows, task = (LABELED, {"task": "classify"}) if kind == "bert" else (PAIRS, {})
    found = []
    for cost in (0, 10**6):
        monkeypatch.setattr("lora_kit.training.loop.length_buckets.BUCKET_OVERHEAD_TOKENS", {"cpu": cost})
        base = base_of(kind, **({"labels": 2} if kind == "bert" else {}))
        for module in base.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        section = {"logging_steps": 1, "per_device_train_batch_size": 3}
        recipe = recipe_of(tmp_path, rows=rows, train=section, steps=4, out=str(tmp_path / str(cost)), **task)
        found.append(losses_of(train(recipe, base=base)))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_layers_give_the_same_losses_and_are_plain_again_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend=backend))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = []
    for compiled in (False, True):
        base = base_of()
        section, lora = {"logging_steps": 1}, {"target_modules": ["q_proj"]}
        recipe = recipe_of(tmp_path, train=section, lora=lora, out=str(tmp_path / str(compiled)), compile=compiled)
        recipe["data"].pop("validation")  # each way to call a layer is a graph of its own
        found.append([entry["loss"] for entry in train(recipe, base=base).history if "loss" in entry])
        assert all(module._compiled_call_impl is None for module in base.model.modules())
    assert len(found[0]) == 3
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


# Methods and tasks


@pytest.mark.parametrize("tie", [False, True])
def test_features_trains_a_copy_of_the_head(tmp_path: Path, tie: bool) -> None:
    base = base_of(tie=tie)
    before = state(base.model)
    report = train(recipe_of(tmp_path, method="features", steps=20), base=base)
    assert report.before is not None
    assert report.after is not None
    assert report.after.loss < report.before.loss - 0.1
    assert same_state(base.model, before)
    adapter = Adapter.load(report.out)
    assert set(adapter.tensors) == {"base_model.model.lm_head.weight"}
    assert report.trainable == 96 * 32


@pytest.mark.report
def test_full_trains_every_weight_of_a_copy(tmp_path: Path) -> None:
    base = base_of(dtype=torch.bfloat16)
    before = state(base.model)
    report = train(recipe_of(tmp_path, method="full", steps=20), base=base)
    assert report.before is not None
    assert report.after is not None
    assert report.after.loss < report.before.loss - 0.1
    assert same_state(base.model, before)
    loaded = load_base(report.out)
    assert loaded.model.dtype == torch.float32
    assert not any(torch.equal(tensor, before[key].float()) for key, tensor in loaded.model.state_dict().items())
    samples = encode(read_rows(tmp_path / "rows.jsonl"), loaded.tokenizer, max_length=64)
    assert measure(loaded.model, samples, Collator(texts.PAD)).loss == pytest.approx(report.after.loss, abs=1e-5)
    assert {"recipe.yaml", "metrics.jsonl", "loss.png"} <= {path.name for path in report.out.iterdir()}
    assert f"lk.load_base('path/to/{report.out.name}')" in (report.out / "README.md").read_text("utf-8")
    assert report.digest is None
    assert report.trainable == report.parameters == base.model.num_parameters()


def test_full_says_the_rotary_embeddings_of_its_base_to_older_readers_too(tmp_path: Path) -> None:
    merging.base_folder(tmp_path / "base", tiny.llama())
    file = tmp_path / "base" / "config.json"
    older = {"rope_theta": 500_000.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    fields = {**json.loads(file.read_text("utf-8")), **older}
    del fields["rope_parameters"]
    file.write_text(json.dumps(fields), encoding="utf-8")
    report = train({**recipe_of(tmp_path, method="full", steps=1), "base": str(tmp_path / "base")})
    written = json.loads((report.out / "config.json").read_text("utf-8"))
    assert {name: written[name] for name in older} == older
    assert written["rope_parameters"]["rope_theta"] == 500_000.0


def test_full_has_the_end_of_its_answers_where_other_programs_look(tmp_path: Path) -> None:
    merging.base_folder(tmp_path / "base", tiny.llama())
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 4
    recipe = {**recipe_of(tmp_path, rows=rows, method="full", steps=1), "base": str(tmp_path / "base")}
    template = "{% for m in messages %}{{ m.content }}{{ '<s>' if m.role == 'assistant' }}{% endfor %}"
    (tmp_path / "chat.jinja").write_text(template, encoding="utf-8")
    recipe["data"]["chat_template"] = str(tmp_path / "chat.jinja")
    report = train(recipe)
    assert texts.BOS in json.loads((report.out / "generation_config.json").read_text("utf-8"))["eos_token_id"]


def test_classify_trains_the_head_too(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, rows=LABELED, task="classify", steps=30)
    report = train(recipe, base=base_of("bert", labels=2))
    assert report.after is not None
    assert report.before is not None
    assert report.after.loss < report.before.loss
    assert report.after.perplexity is None
    adapter = Adapter.load(report.out)
    assert "classifier" in adapter.config.modules_to_save
    assert adapter.config.task_type == "SEQ_CLS"
    assert adapter.record["labels"] == ["no", "yes"]
    assert report.after.accuracy == 1.0


def test_kit_base_learns_from_a_recipe_file(tmp_path: Path) -> None:
    texts.write(tmp_path / "rows.jsonl", PAIRS)
    (tmp_path / "recipe.yaml").write_text(
        f"base: kit-base\ndata: {{train: {tmp_path}/rows.jsonl, validation: {tmp_path}/rows.jsonl}}\n"
        f"out: {tmp_path}/out\ntrain: {{max_steps: 8, learning_rate: 5e-3}}\n"
    )
    report = lora_kit.train(tmp_path / "recipe.yaml", overrides={"lora.r": "4"})
    assert report.after is not None
    assert report.before is not None
    assert report.after.loss < report.before.loss
    assert json.loads((report.out / "adapter_config.json").read_text())["base_model_name_or_path"] == "kit-base"


@pytest.mark.parametrize("method", ["lora", "features"])
def test_kit_base_learns_labels(tmp_path: Path, method: str) -> None:
    recipe = recipe_of(tmp_path, rows=LABELED, task="classify", steps=8, base="kit-base", method=method)
    report = train(recipe)
    assert report.after is not None
    assert report.after.accuracy == 1.0
    model = load_base("kit-base", task="classify", num_labels=2).model
    attach(model).load("again", report.out)


def test_labels_keep_the_order_of_a_head_that_knows_them(tmp_path: Path) -> None:
    base = base_of("bert", labels=2)
    base.model.config.id2label, base.model.config.label2id = {0: "yes", 1: "no"}, {"yes": 0, "no": 1}
    report = train(recipe_of(tmp_path, rows=LABELED, task="classify"), base=base)
    assert Adapter.load(report.out).record["labels"] == ["yes", "no"]


def test_a_quantized_base_is_trained_on_and_stays_as_it_was(tmp_path: Path) -> None:
    base = load_base("kit-base", quantize="nf4")
    before = state(base.model)
    report = train(recipe_of(tmp_path, base="kit-base", steps=6), base=base)
    assert report.before is not None
    assert report.after is not None
    assert report.after.loss < report.before.loss - 0.2
    assert same_state(base.model, before)


def test_plain_text_trains_without_separator(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, rows=[{"text": "abc " * 30}])
    report = train({**recipe, "data": recipe["data"]["train"]}, base=base_of())
    assert report.before is None
    assert report.after is None
    assert report.recipe.data.separator == ""
    assert report.tokens > 0


@pytest.mark.parametrize(
    "section",
    [
        {"bf16": True},
        {"fp16": True},
        {"gradient_checkpointing": True},
        {"lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1},
        {"eval_strategy": "epoch", "num_train_epochs": 2, "max_steps": -1},
        {"train_sampling_strategy": "group_by_length"},
        {"optim": "adamw_8bit"},
        {"label_smoothing_factor": 0.1},
    ],
    ids=lambda section: next(iter(section)),
)
def test_what_transformers_offers_works(tmp_path: Path, section: dict[str, Any]) -> None:
    base = base_of()
    attributes, settings = set(vars(base.model)), base.model.config.to_dict()
    report = train(recipe_of(tmp_path, train=section), base=base)
    assert report.after is not None
    assert report.before is not None
    assert report.after.loss < report.before.loss
    assert set(vars(base.model)) == attributes
    assert base.model.config.to_dict() == settings
    assert not base.model.is_activation_checkpointing


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    sections = [{"gradient_checkpointing": on} for on in (False, True)]
    recipes = [recipe_of(tmp_path, train=section, out=str(tmp_path / str(n))) for n, section in enumerate(sections)]
    plain, checkpointed = (Adapter.load(train(recipe, base=base_of()).out) for recipe in recipes)
    for key, tensor in plain.tensors.items():
        torch.testing.assert_close(checkpointed.tensors[key], tensor, rtol=0, atol=1e-6)


# Failures leave nothing behind


def untouched(folder: Path) -> bool:
    return {path.name for path in folder.iterdir()} <= {"rows.jsonl"}


def test_an_existing_output_is_refused_before_any_work(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    first = train(recipe, base=base_of())
    kept = weights_of(first)
    with pytest.raises(StorageError, match="exists already"):
        train({**recipe, "base": "never-loaded"})
    assert weights_of(first) == kept
    second = train(recipe, base=base_of(), overrides={"train.seed": 1}, replace=True)
    assert weights_of(second) != kept
    with pytest.raises(StorageError, match="holds something else"):
        train({**recipe, "method": "full"}, base=base_of(), replace=True)


def test_an_output_inside_the_base_is_refused(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    recipe = recipe_of(tmp_path, base=str(tmp_path / "base"), out=str(tmp_path / "base" / "adapter"))
    with pytest.raises(StorageError, match="lie inside each other"):
        train(recipe)


def test_an_interrupt_leaves_a_checkpoint_and_the_base_as_it_was(tmp_path: Path) -> None:
    base = base_of()
    before, attributes = state(base.model), set(vars(base.model))
    with pytest.raises(KeyboardInterrupt):
        train(recipe_of(tmp_path), base=base, callbacks=[At(2, lambda _: os.kill(os.getpid(), signal.SIGINT))])
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "out.run"}
    assert same_state(base.model, before)
    assert set(vars(base.model)) == attributes
    assert train(recipe_of(tmp_path), base=base).steps == 3


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_loss_that_is_not_a_number_stops_everything(tmp_path: Path, method: str) -> None:
    base = base_of()
    before = state(base.model)

    def poison(model: Any) -> None:
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))

    with pytest.raises(VerificationError, match="became nan by step 3"):
        train(recipe_of(tmp_path, method=method), base=base, callbacks=[At(1, poison)])
    assert untouched(tmp_path)
    assert same_state(base.model, before)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"task": "classify"}, DataError, "task: causal-lm takes these rows"),
        ({"data": "missing.jsonl"}, DataError, "no such file"),
        ({"lora": {"target_modules": ["q_prj"]}}, TargetError, "did you mean 'q_proj'"),
        ({"base": "other"}, RecipeError, "the base given is tiny"),
        ({"dtype": "bf16"}, RecipeError, "no effect on a loaded base"),
        ({"train": {"lr_scheduler_type": "reduce_lr_on_plateau"}}, RecipeError, "requires an eval strategy"),
        ({"train": {"optim": "paged_adamw_8bit"}}, RecipeError, "paged_adamw_8bit needs a CUDA device"),
        ({"out": "/dev/null/x"}, StorageError, "/dev/null, which is not a folder"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    tmp_path: Path, changes: dict[str, Any], error: type[LoraKitError], message: str
) -> None:
    base = base_of()
    before = state(base.model)
    with pytest.raises(error, match=message):
        train({**recipe_of(tmp_path), **changes}, base=base)
    assert untouched(tmp_path)
    assert same_state(base.model, before)


def test_limits_of_the_base_are_kept(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the context of tiny is 64 tokens"):
        train(recipe_of(tmp_path), base=base_of(), overrides={"data.max_length": 65})
    with pytest.raises(RecipeError, match="3 labels, the data 2"):
        train(recipe_of(tmp_path, rows=LABELED, task="classify"), base=base_of("bert"))
    with pytest.raises(BaseModelError, match="no such folder"):
        train(recipe_of(tmp_path, base="./nothing"))


@pytest.mark.report
def test_without_matplotlib_there_is_no_picture_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    report = train(recipe_of(tmp_path), base=base_of())
    assert not (report.out / "loss.png").exists()
    assert "matplotlib is not installed" in caplog.text


@pytest.mark.report
def test_training_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(recipe_of(tmp_path), base=base_of())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("value", [True, "non_padding"])
def test_losses_stay_in_the_metrics_where_transformers_counts_tokens_too(tmp_path: Path, value: object) -> None:
    section = {"include_num_input_tokens_seen": value, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    report = train(recipe_of(tmp_path, train=section), base=base_of())
    assert [entry["step"] for entry in report.history if "loss" in entry] == [1, 2, 3]
    assert [entry["step"] for entry in report.history if "eval_loss" in entry] == [0, 1, 2, 3]
    assert [entry["step"] for entry in report.history if "train_loss" in entry] == [3]


# The best adapter kept, and LoRA+


def restless(folder: Path, **train_section: Any) -> dict[str, Any]:
    """A recipe whose loss goes up and down: its rate is far too high."""
    section = {"learning_rate": 0.3, "eval_strategy": "steps", "eval_steps": 1, "logging_steps": 4, **train_section}
    return recipe_of(folder, steps=8, train=section)


def test_the_best_adapter_is_kept_though_no_checkpoint_was_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of()
    # The last is the lowest here, so the highest is called the best, which a recipe may not say.
    monkeypatch.setattr("lora_kit.training.recipe.training_arguments._check_direction", lambda train: None)
    report = train(restless(tmp_path, load_best_model_at_end=True, greater_is_better=True), base=base)
    losses = {entry["step"]: entry["eval_loss"] for entry in report.history[1:] if "eval_loss" in entry}
    assert report.after is not None
    assert report.kept == max(losses, key=lambda step: losses[step]) < report.steps == 8
    assert report.after.loss == losses[report.kept] == Adapter.load(report.out).record["metrics"]["loss"]
    bank = attach(base.model)
    bank.load("again", report.out)
    bank.use("again")
    samples = encode(read_rows(tmp_path / "rows.jsonl"), base.tokenizer, max_length=64)
    assert measure(base.model, samples, Collator(texts.PAD)).loss == pytest.approx(report.after.loss, abs=1e-5)
    last = train({**restless(tmp_path), "out": str(tmp_path / "last")}, base=base_of())
    assert last.kept == 8
    assert last.after is not None
    assert last.after.loss < report.after.loss


def test_perplexity_is_better_where_it_is_lower(tmp_path: Path) -> None:
    section = {"load_best_model_at_end": True, "metric_for_best_model": "perplexity"}
    report = train(restless(tmp_path, **section), base=base_of())
    found = {entry["step"]: entry["eval_perplexity"] for entry in report.history[1:] if "eval_loss" in entry}
    assert report.kept == min(found, key=lambda step: found[step])


def test_training_stops_when_patience_is_at_an_end(tmp_path: Path) -> None:
    report = train(restless(tmp_path, early_stopping_patience=2), base=base_of())
    assert report.steps == report.kept + 2 < 8
    assert report.history[-1]["step"] == report.steps
    logged = [entry["step"] for entry in report.history if "loss" in entry]
    assert logged[-1] == report.steps


def test_the_rate_of_b_is_a_multiple_of_that_of_a(tmp_path: Path) -> None:
    def after_a_step(**section: Any) -> dict[str, torch.Tensor]:
        # The first step of SGD is the rate times the gradient: A's is zero, as B is.
        section = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1, **section}
        recipe = recipe_of(tmp_path, steps=1, train=section, out=str(tmp_path / f"{len(list(tmp_path.iterdir()))}"))
        return dict(Adapter.load(train(recipe, base=base_of()).out).tensors)

    plain, raised = after_a_step(), after_a_step(loraplus_lr_ratio=4)
    for key, tensor in plain.items():
        torch.testing.assert_close(raised[key], 4 * tensor if "lora_B" in key else tensor)
    assert any(tensor.any() for key, tensor in plain.items() if "lora_B" in key)
