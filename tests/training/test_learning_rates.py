"""Learning rates of their own: what they are given to, that a run goes on with them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kit.adapter.adapter import Adapter
from lora_kit.bank.attach import attach
from lora_kit.cli.main import main
from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import RecipeError
from lora_kit.models.loading import Base
from lora_kit.training.loop.learning_rates import LearningRates
from lora_kit.training.loop.trainer import Trainer
from lora_kit.training.plan.plan import plan
from lora_kit.training.recipe.load import load_recipe
from lora_kit.training.train import train
from tests.support.interrupted import die_at, killed, long_recipe, results, unbroken
from tests.support.training import LABELED, base_of, recipe_of

HEAD = {"classifier.weight", "classifier.bias"}


def bert() -> Base:
    return base_of("bert", labels=2)


def rate_by_name(model: Any, rates: LearningRates) -> dict[str, tuple[float, float]]:
    """(rate, decay) of every trained parameter in an optimizer of two groups, as transformers makes it."""
    named = {name: leaf for name, leaf in model.named_parameters() if leaf.requires_grad}
    matrices, vectors = ([leaf for leaf in named.values() if (leaf.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    rates.apply_to(optimizer, model)
    held = [(id(leaf), group) for group in optimizer.param_groups for leaf in group["params"]]
    assert sorted(place for place, _ in held) == sorted(id(leaf) for leaf in named.values())
    found = dict(held)
    return {name: (found[id(leaf)]["lr"], found[id(leaf)]["weight_decay"]) for name, leaf in named.items()}


def test_the_head_that_an_adapter_saves_has_its_rate_and_nothing_else_has() -> None:
    model = bert().model
    attach(model, LoraConfig(target_modules="all-linear", modules_to_save=("classifier",)), name="x")
    found = rate_by_name(model, LearningRates(head=0.5, b_ratio=4, task="classify"))
    for name, (rate, decay) in found.items():
        in_head, is_b = name.startswith("classifier."), "lora_B" in name
        assert rate == (0.5 if in_head else 0.04 if is_b else 0.01), name
        assert decay == (0.0 if "bias" in name else 0.1), name
    assert len([name for name in found if name.startswith("classifier.")]) == 2


def test_where_every_weight_is_trained_it_is_the_head_of_the_base() -> None:
    model = bert().model.requires_grad_(True)
    found = rate_by_name(model, LearningRates(head=0.5, task="classify"))
    assert {name for name, (rate, _) in found.items() if rate == 0.5} == HEAD
    assert {rate for name, (rate, _) in found.items() if name not in HEAD} == {0.01}
    assert {rate for rate, _ in rate_by_name(model, LearningRates(task="classify")).values()} == {0.01}


def test_a_head_that_has_a_pair_only_or_is_the_embeddings_too_has_no_rate_of_its_own() -> None:
    model = base_of("llama").model
    bank = attach(model, LoraConfig(target_modules=("lm_head",)), name="x")
    with pytest.raises(RecipeError, match="the head is not trained") as caught:
        rate_by_name(model, LearningRates(head=0.5))
    assert caught.value.hint is not None
    assert "modules_to_save" in caught.value.hint
    bank.detach()
    tied = base_of("gpt2").model.requires_grad_(True)
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    with pytest.raises(RecipeError, match="shares its weight with the embeddings"):
        rate_by_name(tied, LearningRates(head=0.5))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_training_moves_the_head_at_its_rate(tmp_path: Path, method: str) -> None:
    def after_a_step(**section: Any) -> dict[str, torch.Tensor]:
        # The first step of SGD is the rate times the gradient.
        section = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1, **section}
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        recipe = recipe_of(tmp_path, rows=LABELED, steps=1, task="classify", method=method, train=section)
        train({**recipe, "out": str(out)}, base=bert())
        return tensors(out)

    def tensors(out: Path) -> dict[str, torch.Tensor]:
        if method == "lora":
            return dict(Adapter.load(out).tensors)
        from safetensors.torch import load_file

        return load_file(out / "model.safetensors")

    start, plain, raised = after_a_step(learning_rate=1e-30), after_a_step(), after_a_step(head_learning_rate=0.4)
    assert any("classifier" in key for key in plain)
    for key, tensor in plain.items():
        moved = 4 * (tensor - start[key]) if "classifier" in key else tensor - start[key]
        torch.testing.assert_close(raised[key] - start[key], moved, atol=1e-6, rtol=1e-4)
    assert all((plain[key] - start[key]).any() for key in plain if "classifier" in key)


def test_an_optimizer_that_is_there_already_keeps_its_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bytes_of(name: str) -> bytes:
        section = {"loraplus_lr_ratio": 4.0, "head_learning_rate": 0.3}
        recipe = recipe_of(tmp_path, rows=LABELED, task="classify", train=section, out=str(tmp_path / name))
        return (train(recipe, base=bert()).out / "adapter_model.safetensors").read_bytes()

    once, create = bytes_of("once"), Trainer.create_optimizer
    monkeypatch.setattr(Trainer, "create_optimizer", lambda self: [create(self), create(self)][1])
    assert bytes_of("twice") == once


@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_the_same_bytes_and_log(tmp_path: Path) -> None:
    rates = {"head_learning_rate": 0.3, "loraplus_lr_ratio": 4.0, "weight_decay": 0.1}
    recipe = long_recipe(tmp_path, task="classify", rows=LABELED, train=rates)
    expected = unbroken(recipe, bert)
    killed(recipe, die_at(4), base=bert)
    assert results(train(recipe, base=bert()).out) == expected
    other = {**recipe, "train": {**recipe["train"], "head_learning_rate": 0.2}, "out": str(tmp_path / "other")}
    assert results(train(other, base=bert()).out)[0] != expected[0]


def test_another_rate_of_the_head_is_another_training(tmp_path: Path) -> None:
    recipe = long_recipe(tmp_path, task="classify", rows=LABELED, train={"head_learning_rate": 0.3})
    killed(recipe, die_at(4), base=bert)
    recipe["train"]["head_learning_rate"] = 0.2
    with pytest.raises(RecipeError, match=r"train\.head_learning_rate"):
        train(recipe, base=bert())


@pytest.mark.parametrize("do", [train, plan])
def test_a_rate_for_a_head_that_is_not_trained_is_refused_and_leaves_nothing(tmp_path: Path, do: Any) -> None:
    recipe = recipe_of(tmp_path, train={"head_learning_rate": 0.1})
    with pytest.raises(RecipeError, match="the head is not trained"):
        do(recipe, base=base_of())
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    saved = {**recipe, "lora": {"modules_to_save": ["head"], "target_modules": ["q_proj"]}}
    do(saved, base=base_of())


def test_a_rate_that_means_nothing_is_refused_with_the_recipe() -> None:
    least = {"base": "kit-base", "data": "train.jsonl", "out": "x", "task": "classify"}
    given = load_recipe(least, overrides={"train.head_learning_rate": "3e-2"})
    assert given.train["head_learning_rate"] == 0.03
    assert load_recipe(given.to_dict()) == given
    with pytest.raises(RecipeError, match="must be above 0; 0 was given"):
        load_recipe({**least, "train": {"head_learning_rate": 0}})
    with pytest.raises(RecipeError, match="trains the head alone"):
        load_recipe({**least, "method": "features", "train": {"head_learning_rate": 0.1}})
    peft = {"method": "peft", "peft": {"peft_type": "IA3"}}
    with pytest.raises(RecipeError, match="the method is peft"):
        load_recipe({**least, **peft, "train": {"head_learning_rate": 0.1}})
    with pytest.raises(RecipeError, match="did you mean 'head_learning_rate'"):
        load_recipe({**least, "train": {"head_lerning_rate": 0.1}})


def test_what_is_printed_before_a_training_says_the_rate_of_the_head(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"base: kit-base\ndata: {tmp_path / 'none.jsonl'}\nout: {tmp_path / 'out'}\n", encoding="utf-8")
    flags = ["--train.head_learning_rate", "0.03", "--train.learning_rate", "2e-4"]
    assert main(["train", str(file), *flags, "--train.loraplus_lr_ratio", "16"]) == 2
    assert "learning rate 0.0002 (head 0.03, B times 16)" in capsys.readouterr().out
    assert main(["train", str(file), "--train.learning_rate", "2e-4"]) == 2
    assert "learning rate 0.0002 ->" in capsys.readouterr().out
