"""Adapters take turns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from hypothesis import given
from hypothesis import strategies as st

from lora_kit.serving.fair_turns import FairTurns


def run_steps(work: dict[Hashable, int], budget: int, steps: int) -> list[Counter[Hashable]]:
    """What each key spends in each step; `work` shrinks."""
    turns, spent_by_step = FairTurns(), []
    for _ in range(steps):
        spent = Counter[Hashable]()

        def spend(key: Hashable, most: int, spent: Counter[Hashable] = spent) -> int:
            count = min(most, work[key])
            work[key] -= count
            spent[key] += count
            return count

        turns.divide(budget, [key for key, left in work.items() if left], spend)
        spent_by_step.append(spent)
    return spent_by_step


def test_one_with_much_work_does_not_push_out_the_others() -> None:
    (spent,) = run_steps({"long": 10_000, "short": 20, "other": 30}, budget=90, steps=1)
    assert spent["short"] == 20
    assert spent["other"] == 30
    assert spent["long"] == 40


def test_keys_that_cannot_all_be_served_in_a_step_take_turns() -> None:
    spent = run_steps(dict.fromkeys("abcdef", 100), budget=3, steps=40)
    total = sum(spent, Counter())
    assert max(total.values()) - min(total.values()) <= 3


@given(work=st.dictionaries(st.integers(0, 9), st.integers(1, 50), min_size=1), budget=st.integers(1, 40))
def test_the_whole_budget_is_spent_while_there_is_work(work: dict[Hashable, int], budget: int) -> None:
    total, left = sum(work.values()), dict(work)
    (spent,) = run_steps(left, budget, 1)
    assert sum(spent.values()) == min(budget, total)
