"""Frozen modules that no gradient reaches run in evaluation mode while the rest is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lora_kit as lk
from lora_kit.training.loop.frozen_modules import find_modules_without_gradient
from lora_kit.training.plan.live_bytes import LiveBytes
from lora_kit.training.train import train
from tests.support import tiny
from tests.support.families import FAMILIES
from tests.support.training import LABELED, base_of, recipe_of


def paths_without_gradient(model: nn.Module, **fields: Any) -> set[str]:
    lk.attach(model, lk.LoraConfig(r=2, **fields))
    without = set(find_modules_without_gradient(model, tiny.batch()))
    return {path for path, module in model.named_modules() if module in without}


def test_layers_below_the_lowest_adapted_one_are_found_with_all_that_is_in_them() -> None:
    found = paths_without_gradient(tiny.bert(), layers_to_transform=[1])
    below = {
        path for path, _ in tiny.bert().named_modules() if path.startswith(("bert.embeddings", "bert.encoder.layer.0"))
    }
    assert below <= found
    assert not [path for path in found - below if "dropout" in path]
    assert not paths_without_gradient(tiny.bert(), target_modules=["word_embeddings"]) & {"bert.encoder.layer.0.output"}


def test_with_a_trained_head_alone_it_is_the_whole_body() -> None:
    found = paths_without_gradient(tiny.bert(), target_modules=[], modules_to_save=["classifier"])
    assert {path for path, _ in tiny.bert().bert.named_modules(prefix="bert")} <= found
    assert not {"", "classifier"} & found


def test_a_layer_that_is_used_below_and_above_stays_in_training_mode() -> None:
    family = next(family for family in FAMILIES if family.name == "ALBERT")
    shared = "albert.encoder.albert_layer_groups.0"
    found = paths_without_gradient(family.make(), target_modules=["query"])
    assert "albert.embeddings" in found
    assert not [path for path in found if path.startswith(shared) and "dropout" in path.lower()]


def test_experts_that_the_sample_does_not_reach_count_as_trained() -> None:
    model = nn.Sequential(nn.Dropout(0.5), Gated(), nn.Dropout(0.5))
    lk.attach(model, lk.LoraConfig(r=2, target_modules=["expert"]))
    without = find_modules_without_gradient(model, {"input": torch.ones(2, 4)})
    assert model[0] in without
    assert model[1] not in without
    assert model[2] not in without


class Gated(nn.Module):
    """An expert that is used for negative sums only."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.expert(x) if x.sum() < 0 else x * 2
        return y


def test_the_probe_leaves_modes_hooks_and_random_numbers_alone() -> None:
    model = tiny.bert().train()
    lk.attach(model, lk.LoraConfig(r=2, lora_dropout=0.5))
    before = torch.get_rng_state()
    hooks = [list(module._forward_hooks) for module in model.modules()]
    find_modules_without_gradient(model, tiny.batch())
    assert torch.equal(torch.get_rng_state(), before)
    assert [list(module._forward_hooks) for module in model.modules()] == hooks
    assert all(module.training for module in model.modules())


class Modes(transformers.TrainerCallback):
    """Notes which modules are in training mode at the end of a forward."""

    def __init__(self) -> None:
        self.training: set[str] = set()

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.training |= {path for path, module in model.named_modules() if module.training}


@pytest.mark.parametrize("method", ["lora", "features"])
def test_training_keeps_them_in_evaluation_mode(method: str, tmp_path: Path) -> None:
    base, seen = base_of("bert", labels=2), Modes()
    modes = {path: module.training for path, module in base.model.named_modules()}
    lora = {"r": 2, "layers_to_transform": [1]} if method == "lora" else {}
    recipe = recipe_of(tmp_path, rows=LABELED, steps=2, method=method, lora=lora, task="classify")
    train(recipe, base=base, callbacks=[seen])
    assert "bert.embeddings.dropout" not in seen.training
    assert "bert.encoder.layer.0.output.dropout" not in seen.training
    assert ("bert.encoder.layer.1.output.dropout" in seen.training) == (method == "lora")
    assert {path: module.training for path, module in base.model.named_modules()} == modes


def test_features_train_on_what_the_body_gives_without_dropout(tmp_path: Path) -> None:
    losses = []
    for rate in (0.0, 0.9):
        base = base_of("bert", labels=2)
        for module in base.model.bert.modules():
            if isinstance(module, nn.Dropout):
                module.p = rate
        (tmp_path / str(rate)).mkdir()
        recipe = recipe_of(tmp_path / str(rate), rows=LABELED, steps=2, method="features", lora={}, task="classify")
        losses.append(train(recipe, base=base).train_loss)
    assert losses[0] == losses[1]


def test_the_probe_takes_no_more_memory_than_a_forward_without_gradients() -> None:
    model = tiny.llama()
    lk.attach(model, lk.LoraConfig(r=2, target_modules="all-linear"))
    batch = {name: torch.cat([tensor] * 8, dim=1) for name, tensor in tiny.batch().items()}
    without, probe = LiveBytes(), LiveBytes()
    with without, torch.no_grad():
        model(**batch)
    with probe:
        find_modules_without_gradient(model, batch)
    assert probe.peak <= 1.05 * without.peak


@pytest.mark.parametrize("left", [lambda model: model, lambda model: model.bert.encoder], ids=["the model", "a part"])
def test_what_is_trained_is_in_training_mode_in_every_step_also_after_a_validation(tmp_path: Path, left: Any) -> None:
    base = base_of("bert", labels=2)
    dropout = base.model.get_submodule("bert.encoder.layer.1.output.dropout")
    validated, stepped = list[bool](), list[bool]()

    class Note(transformers.TrainerCallback):
        def on_evaluate(self, *_: object, **__: object) -> None:
            left(base.model).eval()  # whatever a validation leaves behind
            validated.append(dropout.training)

        def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
            stepped.append(dropout.training)

    section = {"eval_strategy": "steps", "eval_steps": 2}
    recipe = recipe_of(tmp_path, rows=LABELED, task="classify", steps=5, train=section)
    train(recipe, base=base, callbacks=[Note()])
    assert stepped == [True] * 5
    assert validated
    assert not any(validated)
