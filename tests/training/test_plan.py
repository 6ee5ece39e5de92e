"""A dry run: what a training would do, counted and measured, with nothing trained and nothing written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kit.cli.main import main
from lora_kit.errors import RecipeError, StorageError
from lora_kit.training.loop.length_buckets import BUCKET_OVERHEAD_TOKENS, choose_bucket_sizes, find_largest_parts
from lora_kit.training.plan.plan import plan
from lora_kit.training.results import TrainPlan
from lora_kit.training.train import train
from tests.support import texts
from tests.support.interrupted import die_at, killed, long_recipe, run_of
from tests.support.memory import count_training, narrow
from tests.support.training import LABELED, PAIRS, base_of, recipe_of, same_state, state


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


SECTIONS: list[dict[str, Any]] = [
    {"max_steps": 7},
    {"max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 2, "warmup_steps": 2},
    {"max_steps": -1, "num_train_epochs": 2.5, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    {"max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 2, "dataloader_drop_last": True},
]


@pytest.mark.parametrize("section", SECTIONS)
def test_the_plan_is_what_the_training_does(tmp_path: Path, section: dict[str, Any]) -> None:
    recipe = recipe_of(tmp_path, train={"eval_strategy": "epoch", "load_best_model_at_end": True, **section})
    found, report = plan(recipe, base=base_of()), train(recipe, base=base_of())
    assert found.steps.steps == report.steps
    assert (found.trainable, found.parameters) == (report.trainable, report.parameters)
    assert sum(kind.parameters for kind in found.kinds) == found.trainable
    assert found.recipe == report.recipe
    assert found.out == report.out
    size, times = found.steps.micro_batch, found.steps.accumulation
    assert (size, times) == (
        section.get("per_device_train_batch_size", 4),
        section.get("gradient_accumulation_steps", 1),
    )
    assert found.steps.batch == size * times
    assert found.steps.warmup == section.get("warmup_steps", 0)


def test_rows_tokens_labels_and_what_is_cut_are_counted(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, rows=[*PAIRS, {"prompt": "p" * 60, "completion": "abc"}])
    found = plan(recipe, base=base_of()).data
    pairs = [(len(row["prompt"]) + 1, len(row["completion"]) + 1) for row in PAIRS]
    assert (found.rows, found.samples, found.cut, found.longest) == (6, 6, 1, 64)
    assert found.labels == sum(completion for _, completion in pairs) + 4
    assert found.tokens == sum(map(sum, pairs)) + 64


def test_nothing_is_written_and_the_base_is_as_it_was(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, lora={"lora_dropout": 0.2})
    base = base_of("gpt2")
    before, files = state(base.model), contents(tmp_path)
    gradients, attributes = [p.requires_grad for p in base.model.parameters()], set(vars(base.model))
    generator = torch.get_rng_state()
    plan(recipe, base=base)
    assert torch.equal(torch.get_rng_state(), generator)
    assert contents(tmp_path) == files
    assert same_state(base.model, before)
    assert [p.requires_grad for p in base.model.parameters()] == gradients
    assert set(vars(base.model)) == attributes
    assert not any(module.training for module in base.model.modules())
    assert train(recipe, base=base).digest == train({**recipe, "out": str(tmp_path / "b")}, base=base_of("gpt2")).digest


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("bert", {"task": "classify", "rows": LABELED}),
        ("llama", {"method": "features"}),
        ("llama", {"method": "full"}),
        ("llama", {"train": {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}}),
        ("llama", {"train": {"early_stopping_patience": 1, "eval_strategy": "epoch", "bf16": True}}),
    ],
)
def test_other_methods_and_settings_are_planned_too(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    base = base_of(kind, **({"labels": 2} if kind == "bert" else {}))
    before = state(base.model)
    found = plan(recipe_of(tmp_path, **changes), base=base)
    assert sum(each.parameters for each in found.kinds) == found.trainable
    assert found.measured.tokens > 0
    assert found.seconds > 0
    assert same_state(base.model, before)


def test_packed_rows_are_planned_as_rows(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, train={"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 1})
    apart = plan(recipe, base=base_of())
    packed = plan(recipe, base=base_of(), overrides={"data.packing": "true", "data.max_length": 32})
    assert packed.data.samples == apart.data.samples == 5
    assert packed.data.tokens == apart.data.tokens
    assert packed.steps.steps < apart.steps.steps


# Memory


def memory_of(folder: Path, **section: Any) -> TrainPlan:
    return plan(recipe_of(folder, train=section), base=base_of())


def test_what_is_there_is_counted_exactly(tmp_path: Path) -> None:
    found, weights = memory_of(tmp_path), base_of().model
    assert found.memory.weights == pytest.approx(sum(p.nbytes for p in weights.parameters()), rel=0.01)
    assert found.memory.gradients == 4 * found.trainable
    assert found.memory.optimizer == pytest.approx(2 * 4 * found.trainable, rel=0.05)
    assert memory_of(tmp_path, optim="sgd").memory.optimizer == 0
    bytes_, parts = found.memory.total, found.memory
    assert bytes_ == parts.weights + parts.trained + parts.gradients + parts.optimizer + parts.activations
    full = plan(recipe_of(tmp_path, method="full"), base=base_of())
    assert full.memory.gradients == 4 * full.parameters
    assert full.memory.trained == 0


LONG: list[dict[str, Any]] = [{"prompt": "a" * 20, "completion": "b" * 20}] * 32
SHORT: list[dict[str, Any]] = [{"prompt": "a" * 10, "completion": "b" * 10}] * 32
TEXTS: list[dict[str, Any]] = [{"text": word * 10, "label": word} for word in ("good ", "evil ")] * 8


@pytest.mark.parametrize(
    ("kind", "changes", "data"),
    [
        ("llama", {"rows": LONG}, {}),
        ("llama", {"rows": LONG, "train": {"gradient_checkpointing": True}}, {}),
        ("llama", {"rows": LONG, "train": {"gradient_accumulation_steps": 2}}, {}),
        ("llama", {"rows": LONG, "method": "full", "train": {"bf16": True}}, {}),
        ("llama", {"rows": SHORT}, {"packing": True, "max_length": 44}),
        ("bert", {"rows": TEXTS, "task": "classify"}, {}),
    ],
)
def test_the_memory_is_what_a_training_has_alive_at_once(
    tmp_path: Path, kind: str, changes: dict[str, Any], data: dict[str, Any]
) -> None:
    labels = {"labels": 2} if kind == "bert" else {}
    changes = {**changes, "train": {"per_device_train_batch_size": 16, **changes.get("train", {})}}
    recipe = recipe_of(tmp_path, **changes)
    recipe["data"] = {"train": recipe["data"]["train"], **data}
    base = base_of(kind, **labels)
    counted = plan(recipe, base=base).memory.total
    expected = count_training(recipe, base_of(kind, **labels))
    if recipe.get("method") == "full":  # a copy of the base that is given is trained
        expected -= sum(parameter.nbytes for parameter in base.model.parameters())
    assert counted == pytest.approx(expected, rel=0.04)  # beside so small a model, the next batch weighs something


def test_many_long_rows_are_counted_from_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(tmp_path, rows=LONG, train={"per_device_train_batch_size": 16})
    whole = plan(recipe, base=base_of()).memory.activations
    monkeypatch.setattr("lora_kit.training.plan.memory_use._TOKENS", 4 * 42)
    assert plan(recipe, base=base_of()).memory.activations == pytest.approx(whole, rel=0.02)


def test_checkpointing_needs_less_and_longer_rows_more(tmp_path: Path) -> None:
    plain, checkpointed = memory_of(tmp_path), memory_of(tmp_path, gradient_checkpointing=True)
    assert checkpointed.memory.activations < 0.8 * plain.memory.activations
    rows = [*PAIRS, {"prompt": "a" * 30, "completion": "b" * 30}]
    longer = plan(recipe_of(tmp_path, rows=rows), base=base_of())
    assert longer.memory.activations > 1.5 * plain.memory.activations


def test_no_batch_has_a_larger_part_than_is_counted() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(300, generator=generator) + 3.5).exp().clamp(3, 500).long().sort(descending=True).values
    found = find_largest_parts(lengths, rows=16, device=torch.device("cpu"))
    assert {part.rows for part in found} != {16}  # sixteen of the longest are never together
    for power in (1, 1.5, 2):
        most = max(part.rows * int(lengths[part.longest]) ** power for part in found)
        for start in range(0, 300 - 16, 2):  # rows of like lengths, and random ones
            for rows in (torch.arange(start, start + 16), torch.randperm(300, generator=generator)[:16].sort().values):
                batch = lengths[rows].tolist()
                ends = choose_bucket_sizes(batch, overhead=BUCKET_OVERHEAD_TOKENS["cpu"])
                firsts = [sum(ends[:place]) for place in range(len(ends))]
                assert all(size * batch[first] ** power <= most for size, first in zip(ends, firsts, strict=True))


def test_rows_of_unlike_lengths_need_what_their_batches_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUCKET_OVERHEAD_TOKENS, "cpu", 8)  # type: ignore[misc]
    rows = [{"text": "a" * count, "label": str(count)} for count in (60, 2, 2, 2, 2, 2, 2)]
    recipe = recipe_of(tmp_path, rows=rows, task="classify", train={"per_device_train_batch_size": 8})
    found = plan(recipe, base=base_of("bert", labels=2)).memory
    recipe["train"]["per_device_train_batch_size"] = 1
    alone = plan(recipe, base=base_of("bert", labels=2)).memory
    assert found.activations == pytest.approx(alone.activations, rel=0.02)


def test_the_evaluation_is_counted_too(tmp_path: Path) -> None:
    valid = texts.write(tmp_path / "valid.jsonl", [{"text": "good " * 40, "label": "good "}] * 32)
    recipe = recipe_of(tmp_path, rows=TEXTS[:2], task="classify", train={"per_device_eval_batch_size": 32})
    recipe["data"].pop("validation")
    base = base_of("bert", labels=2)
    alone = plan(recipe, base=base)
    assert alone.memory.evaluation == 0
    recipe["data"]["validation"] = str(valid)
    found = plan(recipe, base=base)
    assert found.memory.evaluation > 2 * alone.memory.activations
    assert found.memory.total > 2 * alone.memory.total - alone.memory.weights
    assert found.most_bytes >= found.measured.before_bytes + found.memory.evaluation


def test_rows_that_do_not_fit_are_found_out(tmp_path: Path) -> None:
    found = plan(recipe_of(tmp_path), base=narrow("llama", 2)())
    assert (found.steps.micro_batch, found.measured.micro_batch) == (4, 2)
    with pytest.raises(StorageError, match="one row at once"):
        plan(recipe_of(tmp_path), base=narrow("llama", 0)())


# What stands there already


@pytest.mark.slow
def test_it_says_where_it_would_go_on_and_touches_no_checkpoint(tmp_path: Path) -> None:
    recipe = long_recipe(tmp_path)
    killed(recipe, die_at(5))
    (run_of(Path(recipe["out"])) / "checkpoint-4" / "optimizer.pt").unlink()
    files = contents(tmp_path)
    anew = plan({**recipe, "out": str(tmp_path / "elsewhere")}, base=base_of())
    found = plan(recipe, base=base_of())
    assert (anew.goes_on_from, found.goes_on_from) == (0, 2)
    with pytest.raises(RecipeError, match=r"lora\.r was 8, is 4"):
        plan(recipe, base=base_of(), overrides={"lora.r": 4})
    assert plan(recipe, base=base_of(), overrides={"lora.r": 4}, replace=True).goes_on_from == 0
    assert contents(tmp_path) == files


def test_what_a_training_would_refuse_is_refused(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    train(recipe, base=base_of())
    with pytest.raises(StorageError, match="exists already"):
        plan({**recipe, "base": "never-loaded"})
    assert plan(recipe, base=base_of(), replace=True).steps.steps == 3


# The command


def test_the_command_prints_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of(tmp_path, base="kit-base")
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["train", str(tmp_path / "recipe.yaml"), "--dry-run", "--lora.r", "4"]) == 0
    shown = capsys.readouterr().out
    for told in ("would write", "trainable", "q_proj: 6 modules", "5 rows", "of the tokens", "warm-up", "4 at once",
                 "counted", "activations: ", "tokens/s, measured",
                 "of the whole process, Python and libraries included; of later steps at most",
                 "without evaluations"):  # fmt: skip
        assert told in shown
    assert main(["train", str(tmp_path / "recipe.yaml"), "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["steps"]["steps"] == 3
    assert told["memory"]["total"] > told["memory"]["weights"] > 0
    assert told["recipe"]["lora"]["r"] == 8
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "rows.jsonl"}
