"""Errors and warnings: a paragraph with the fix last on a terminal, one line in a log; the nearest word first."""

from __future__ import annotations

import pytest

from lora_kit.cli.main import main
from lora_kit.cli.output import print_notice
from lora_kit.errors import RecipeError, suggest_nearest
from lora_kit.training.recipe.coerce import check_known_keys

Capture = pytest.CaptureFixture[str]
MESSAGE = "the tensors do not fit the config:\n  model.layers.0.self_attn.q_proj has rank 4\n  and 12 more"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 40 columns."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "40")


def test_in_a_log_an_error_is_one_line(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    print_notice("error", MESSAGE, hint="look at it")
    items = "model.layers.0.self_attn.q_proj has rank 4; and 12 more"
    assert capsys.readouterr().err == f"error: the tensors do not fit the config: {items} (look at it)\n"


@pytest.mark.usefixtures("terminal")
def test_on_a_terminal_an_error_is_wrapped_at_words_and_the_fix_is_the_last_line(capsys: Capture) -> None:
    print_notice("error", MESSAGE, hint="look at it")
    assert capsys.readouterr().err.splitlines() == [
        "error: the tensors do not fit the",
        "config:",
        "  - model.layers.0.self_attn.q_proj has",
        "    rank 4",
        "  - and 12 more",
        "hint: look at it",
    ]


@pytest.mark.usefixtures("terminal")
def test_a_command_prints_its_error_so(capsys: Capture) -> None:
    assert main(["predikt"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: no verb is called 'predikt'",
        "hint: did you mean 'predict'?",
    ]


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["predikt"], "(did you mean 'predict'?)"),
        (["frobnicate"], "(lora-kit --help)"),
        (["list", "--jsn"], "(did you mean '--json'?)"),
        (["list", "--zzz"], "(lora-kit list --help)"),
        (["merge", "--adapter", "x"], "(lora-kit merge --help)"),
    ],
    ids=" ".join,
)
def test_a_wrong_word_is_answered_with_the_nearest_or_with_the_help_of_its_verb(
    arguments: list[str], hint: str, capsys: Capture
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.endswith(f"{hint}\n")


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("lr", "learning_rate"),
        ("learnig_rate", "learning_rate"),
        ("learning-rate", "learning_rate"),
        ("epochs", "num_train_epochs"),
        ("batch_size", "per_device_train_batch_size"),
        ("rank", "r"),
        ("scheduler", "lr_scheduler_type"),
        ("LR", "learning_rate"),
    ],
)
def test_the_nearest_key_is_what_people_mean(word: str, nearest: str) -> None:
    known = ["r", "rank_pattern", "lr_scheduler_type", "num_train_epochs", "learning_rates", "learning_rate"]
    known += ["per_device_train_batch_size", "per_device_eval_batch_size"]
    assert suggest_nearest(word, known) == f"did you mean {nearest!r}?"


def test_keys_are_listed_by_likeness_where_none_is_near() -> None:
    with pytest.raises(RecipeError) as caught:
        check_known_keys({"zzzzzqueue": 1}, ["alpha", "beta", "queen"], where="train.")
    assert caught.value.hint == "known: queen, beta, alpha"
