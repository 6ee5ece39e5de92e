"""Every option of PEFT's LoraConfig: an adapter made with it loads with equal logits, or is refused by name."""

from __future__ import annotations

import dataclasses

import peft
import pytest

from tests.support.peft_options import CASES, LOADS, PAGE, Case, find_outcome, render_table, split_page


@pytest.fixture(scope="module")
def outcomes() -> dict[int, str]:
    """What was found, by position in `CASES`."""
    return {}


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{case.option} {case.shown}" for case in CASES])
def test_an_adapter_of_peft_loads_or_is_refused_by_the_name_of_the_field(index: int, outcomes: dict[int, str]) -> None:
    case = CASES[index]
    outcomes[index] = outcome = find_outcome(case)
    assert outcome == LOADS or outcome.startswith(f"{case.option}=") or case.option == "peft_type"
    row = split_page(PAGE.read_text())[1].splitlines()[3 + index]
    assert row.endswith(f"| {outcome} |"), "stale: run `python -m tests.support.peft_options`"


def test_the_table_of_the_page_is_fresh(outcomes: dict[int, str]) -> None:
    if len(outcomes) < len(CASES):
        pytest.skip("the cases ran elsewhere")
    assert split_page(PAGE.read_text())[1] == render_table(outcomes), "run `python -m tests.support.peft_options`"


def test_no_option_of_peft_and_no_task_is_left_out() -> None:
    options = {field.name for field in dataclasses.fields(peft.LoraConfig) if field.init}
    assert {case.option for case in CASES} == options
    tasks = {case.fields["task_type"] for case in CASES if case.option == "task_type"}
    assert tasks == {None, *(str(task.value) for task in peft.TaskType)}


def test_a_wrong_value_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_kit.config.lora_config.LoraConfig.scaling_of", lambda self, path: 1.0)
    with pytest.raises(AssertionError, match="is off by"):
        find_outcome(Case("r", {"r": 2}))
