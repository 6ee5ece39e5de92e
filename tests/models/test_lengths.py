"""How many tokens a base reads, and tokens that it has no embedding of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lora_kit.errors import BaseModelError, RecipeError
from lora_kit.models.loading import Base, load_base, load_input_spec
from lora_kit.training.plan.plan import plan
from lora_kit.training.train import train
from tests.support import texts, tiny
from tests.support.sequences import both
from tests.support.training import LABELED, base_of, recipe_of


def unlimited(tokenizer: Any) -> Any:
    """The tokenizer, as one that says nothing about lengths."""
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def roberta() -> Any:
    """Positions begin after that of padding, 1: of 34 rows 32 are used."""
    config = transformers.RobertaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=96,
        max_position_embeddings=34, pad_token_id=1, num_labels=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.RobertaForSequenceClassification(config).eval()


def saved(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_robertas_length_is_what_its_positions_hold(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base", roberta(), unlimited(texts.bert_tokenizer()))
    base = load_base(folder, task="classify", num_labels=2)
    assert base.max_length == load_input_spec(folder).max_length == 32
    rows = [{"text": "a" * 100, "label": "yes"}, {"text": "b", "label": "no"}]
    asked = {**recipe_of(tmp_path, rows=rows), "base": str(folder), "task": "classify"}
    assert train(asked).recipe.data.max_length == 32
    with pytest.raises(RecipeError, match=r"data.max_length is 34; the context of .* is 32 tokens"):
        train({**asked, "data": {"train": asked["data"]["train"], "max_length": 34}}, replace=True)


@pytest.mark.parametrize(("kind", "expected"), [("bert", 64), ("gpt2", 64), ("llama", 64)])
def test_other_lengths_are_the_configs(tmp_path: Path, kind: str, expected: int) -> None:
    folder = saved(tmp_path / "base", tiny.MODELS[kind](), unlimited(texts.tokenizer()))
    assert load_input_spec(folder).max_length == expected


def test_t5_has_no_limit_but_the_recipes(tmp_path: Path) -> None:
    base = both("t5")
    assert base.tokenizer.model_max_length == 64
    assert base.max_length > 2**20
    base.model.config.n_positions = 64  # as in the config of t5-small; nothing reads it
    recipe = recipe_of(tmp_path, rows=[{"prompt": "a" * 100, "completion": "b"}] * 2)
    recipe["data"] = {"train": recipe["data"]["train"], "max_length": 128}
    assert plan({**recipe, "task": "seq2seq"}, base=base).data.cut == 0


def test_a_pad_token_without_an_embedding_becomes_the_eos(tmp_path: Path) -> None:
    tokenizer = texts.bert_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<later>"})
    model = tiny.bert(labels=2)
    model.resize_token_embeddings(tokenizer.pad_token_id)
    base = load_base(saved(tmp_path / "base", model, tokenizer), task="classify", num_labels=2)
    assert base.pad_token_id == texts.EOS
    train({**recipe_of(tmp_path, rows=LABELED), "base": base.name, "task": "classify"})


def test_a_token_without_an_embedding_is_found_before_training(tmp_path: Path) -> None:
    base = base_of()
    base.tokenizer.add_tokens(["<new>"])
    base.model.resize_token_embeddings(base.tokenizer.convert_tokens_to_ids("<new>"))
    rows = [{"prompt": "a <new>", "completion": "b"}] * 2
    with pytest.raises(BaseModelError, match="tiny: the tokenizer's token '<new>' has the id"):
        train(recipe_of(tmp_path, rows=rows), base=base)
    assert not (tmp_path / "out").exists()
    later = Base(model=base.model, tokenizer=base.tokenizer, name="tiny")
    later.tokenizer.add_special_tokens({"pad_token": "<later>"})
    with pytest.raises(BaseModelError, match="token '<later>' has the id"):
        train(recipe_of(tmp_path), base=later)
