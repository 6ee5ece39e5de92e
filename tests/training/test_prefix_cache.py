"""Frozen layers are computed once: the same result, whole files or none, and a reason where they are not."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lora_kit.adapter.adapter import Adapter
from lora_kit.data.batches import PREFIX_STATES, Collator, join_samples
from lora_kit.errors import RecipeError, StorageError
from lora_kit.models.frozen_prefix import FrozenPrefix
from lora_kit.models.loading import Base
from lora_kit.training.loop.checkpoints import RunFolder
from lora_kit.training.prefix import prefix_cache
from lora_kit.training.prefix.prefix_cache import MARKER, PrefixComputer, batch_by_tokens, open_prefix_states
from lora_kit.training.recipe.load import load_recipe
from lora_kit.training.train import train
from tests.support import tiny
from tests.support.interrupted import die_at, killed, long_recipe, results, run_of, unbroken
from tests.support.processes import die, in_child
from tests.support.training import LABELED, base_of, recipe_of

TOP_LAYER = {"r": 4, "target_modules": ["query", "value"], "layers_to_transform": [1]}
SGD = {"optim": "sgd", "per_device_train_batch_size": 2, "eval_strategy": "epoch"}


def classifier() -> Base:
    return base_of("bert", labels=2)


def recipe(folder: Path, *, cache: object, **changes: Any) -> dict[str, Any]:
    """Return a recipe of a few epochs that trains the head, or with `lora` the last layer, too."""
    method = {} if "lora" in changes else {"method": "features"}
    train_section = {**SGD, "prefix_cache": cache, **changes.pop("train", {})}
    return recipe_of(folder, rows=LABELED, task="classify", steps=9, train=train_section, **method, **changes)


def trained(folder: Path, *, cache: object, base: Callable[[], Base] = classifier, **changes: Any) -> Any:
    folder.mkdir()
    return train(recipe(folder, cache=cache, **changes), base=base())


class Forwards(transformers.TrainerCallback):
    """Counts how often the real forward of the lowest layer runs, from the first step on."""

    def __init__(self, model: nn.Module) -> None:
        self.count, self.layer = 0, model.get_submodule("bert.encoder.layer.0.attention.self.query")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.layer.register_forward_hook(self.note)

    def note(self, *_: object) -> None:
        self.count += 1


@pytest.mark.parametrize("changes", [{}, {"lora": TOP_LAYER}], ids=["features", "top layer"])
def test_the_result_is_that_of_a_training_without(tmp_path: Path, changes: dict[str, Any]) -> None:
    without = trained(tmp_path / "without", cache="off", **changes)
    with_cache = trained(tmp_path / "with", cache="auto", **changes)
    one, other = (Adapter.load(report.out).tensors for report in (without, with_cache))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-6)
    assert with_cache.after.loss == pytest.approx(without.after.loss, abs=1e-6)
    assert [entry["step"] for entry in with_cache.history] == [entry["step"] for entry in without.history]
    records = [Adapter.load(report.out).record["frozen_layers"] for report in (without, with_cache)]
    assert records[0] == "computed in every step: the recipe says so"
    assert str(records[1]).startswith("computed once: ")


def test_frozen_layers_run_no_more_once_they_are_computed(tmp_path: Path) -> None:
    counts = {}
    for cache in ("off", "auto"):
        base = classifier()
        forwards = Forwards(base.model)
        (tmp_path / cache).mkdir()
        train(recipe(tmp_path / cache, cache=cache), base=base, callbacks=[forwards])
        counts[cache] = forwards.count
    assert counts["off"] > 9
    assert counts["auto"] == 0


def test_packed_rows_and_gradient_checkpointing_give_the_same(tmp_path: Path) -> None:
    lora = {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]}
    found = {}
    for cache in (False, 1):
        folder = tmp_path / str(cache)
        folder.mkdir()
        section = {"optim": "sgd", "prefix_cache": cache, "gradient_checkpointing": True}
        given = recipe_of(folder, steps=4, lora=lora, train=section)
        given["data"] |= {"packing": True, "max_length": 48}
        found[cache] = Adapter.load(train(given, base=base_of()).out).tensors
    for name, tensor in found[False].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("train_section", "lora", "reason"),
    [
        ({"max_steps": 3}, None, "no sample is trained on twice"),
        ({}, {"r": 4, "target_modules": ["query"]}, "no layer of the model is frozen below the trained ones"),
        ({"prefix_cache": 1e-9}, None, "above train.prefix_cache"),
    ],
)
def test_the_log_says_why_frozen_layers_are_computed_in_every_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, train_section: Any, lora: Any, reason: str
) -> None:
    caplog.set_level(logging.INFO, "lora_kit")
    given = recipe(tmp_path, cache="auto", train=train_section, **({"lora": lora} if lora else {}))
    train(given, base=classifier())
    (line,) = [record for record in caplog.records if "computed in every step" in record.message]
    assert reason in line.message
    assert (line.levelname == "WARNING") is ("prefix_cache" in train_section)


def test_noise_on_the_embeddings_leaves_nothing_to_keep(tmp_path: Path) -> None:
    base = classifier()
    forwards = Forwards(base.model)
    train(recipe(tmp_path, cache="auto", train={"neftune_noise_alpha": 5}), base=base, callbacks=[forwards])
    assert forwards.count > 9


@pytest.mark.slow
def test_a_training_that_is_killed_goes_on_with_the_same_bytes(tmp_path: Path) -> None:
    given = long_recipe(tmp_path, rows=LABELED, task="classify", lora={**TOP_LAYER, "lora_dropout": 0.2})
    expected = unbroken(given, classifier)
    killed(given, die_at(5), base=classifier)
    assert (run_of(tmp_path / "out") / "prefix" / MARKER).is_file()
    train(given, base=classifier())
    assert results(tmp_path / "out") == expected
    assert not run_of(tmp_path / "out").exists()


def test_a_kill_while_the_states_are_computed_leaves_no_half_of_them(tmp_path: Path) -> None:
    given = recipe(tmp_path, cache="auto")

    def die_after_one(lengths: Tensor, most: int) -> Iterator[list[int]]:
        yield [0]
        die()

    def run() -> None:
        prefix_cache.batch_by_tokens = die_after_one
        train(given, base=classifier())

    assert in_child(run) == -signal.SIGKILL
    folder = run_of(tmp_path / "out")
    assert not (folder / "prefix").exists()
    train(given, base=classifier())
    assert not folder.exists()


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Any]:
    """Return what opens the states of three samples, and counts how many batches were computed."""
    model = tiny.llama()
    samples = join_samples([([5, 6, 7], [5, 6, 7]), ([8], [8]), ([9, 10], [9, 10])], kind="token")
    prefix = FrozenPrefix("model.layers", (model.model.layers[0],), 2)

    def open_states(facts: dict[str, object]) -> Any:
        batches: list[None] = []
        computer = PrefixComputer(
            model=model,
            prefix=prefix,
            collator=Collator(0),
            autocast=lambda: torch.autocast("cpu", enabled=False),
            on_batch=lambda: batches.append(None),
        )
        states = open_prefix_states(tmp_path / "prefix", {"train": samples}, computer, facts)["train"]
        with torch.no_grad():
            expected = [computer.compute(samples, [index]).states[0] for index in range(3)]
        for index, tensor in enumerate(expected):
            torch.testing.assert_close(states[index], tensor)
        return len(batches)

    return open_states


def test_states_are_computed_once_and_again_for_other_facts(opened: Callable[..., Any]) -> None:
    assert [opened({"run": "a"}), opened({"run": "a"}), opened({"run": "b"}), opened({"run": "b"})] == [1, 0, 1, 0]


@pytest.mark.parametrize("name", ["train.safetensors", MARKER])
def test_one_flipped_bit_is_seen(tmp_path: Path, opened: Callable[..., Any], name: str) -> None:
    opened({"run": "a"})
    file = tmp_path / "prefix" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert opened({"run": "a"}) == 1


def test_a_full_disk_is_an_error_and_leaves_nothing(
    tmp_path: Path, opened: Callable[..., Any], monkeypatch: Any
) -> None:
    def no_space(*_: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    with pytest.raises(StorageError, match="No space left"):
        opened({"run": "a"})
    assert not list(tmp_path.glob("prefix*"))


def test_a_folder_of_somebody_else_is_neither_read_nor_removed(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "out")
    run.prefix.mkdir(parents=True)
    (run.prefix / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="holds something else"):
        train(recipe(tmp_path, cache="auto"), base=classifier())
    run.remove()
    assert (run.prefix / "notes.txt").read_text() == "mine"


def test_batches_have_at_most_as_many_tokens_or_one_sample() -> None:
    lengths = torch.tensor([3, 9, 1, 4, 4])
    assert list(batch_by_tokens(lengths, 8)) == [[1], [3, 4], [0, 2]]
    assert not list(batch_by_tokens(torch.tensor([], dtype=torch.int64), 8))


@pytest.mark.parametrize("value", ["auto", "off", False, 2, 0.5])
def test_the_setting_is_auto_off_or_gigabytes(tmp_path: Path, value: object) -> None:
    given = recipe(tmp_path, cache=value)
    kept = load_recipe(given).train["prefix_cache"]
    assert kept == (False if value == "off" else value)


@pytest.mark.parametrize("value", ["on disk", 0, -1, [1]])
def test_another_setting_is_rejected(tmp_path: Path, value: object) -> None:
    with pytest.raises(RecipeError, match=r"train\.prefix_cache"):
        load_recipe(recipe(tmp_path, cache=value))


def test_the_states_of_a_batch_are_padded_beside_its_tokens() -> None:
    samples = [
        {"input_ids": torch.arange(length), "labels": torch.arange(length), PREFIX_STATES: torch.ones(length, 2)}
        for length in (1, 3)
    ]
    states = Collator(0)(samples)[PREFIX_STATES]
    assert states.shape == (2, 3, 2)
    assert states.sum() == 2 * 4


def test_marker_names_the_files_and_the_layers(tmp_path: Path, opened: Callable[..., Any]) -> None:
    opened({"run": "a"})
    record = json.loads((tmp_path / "prefix" / MARKER).read_text())
    assert record["layers"] == 1
    assert list(record["files"]) == ["train.safetensors"]
