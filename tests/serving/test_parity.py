"""Whether a server answers as our own bank does."""

from __future__ import annotations

from pathlib import Path

import pytest

import lora_kit as lk
from lora_kit.errors import UnknownAdapterError
from lora_kit.models.loading import Base
from lora_kit.serving.parity import read_named_adapters, write_questions
from tests.support.random_adapters import made


@pytest.fixture(scope="module")
def base() -> Base:
    return lk.load_base("kit-base", dtype="fp32", device="cpu")


def test_our_own_answers_are_those_of_the_named_adapter(base: Base, tmp_path: Path) -> None:
    made(base, seed=1, target_modules=["q_proj"], r=2).save(tmp_path / "mine")
    models = {"base": None, **read_named_adapters(["served=mine"], store=tmp_path)}
    questions = write_questions(base, models, prompts=2, new_tokens=4)
    assert [question.model for question in questions] == ["base", "base", "served", "served"]
    assert questions[0].prompt == questions[2].prompt
    assert questions[0].answer != questions[2].answer
    alone = write_questions(base, {"base": None}, prompts=2, new_tokens=4)
    assert alone == questions[:2]
    assert all(len(question.answer) == 4 for question in questions)


def test_an_adapter_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnknownAdapterError, match="nobody"):
        read_named_adapters(["served=nobody"], store=tmp_path)
