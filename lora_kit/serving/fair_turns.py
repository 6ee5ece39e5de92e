"""Deficit round robin: adapters take turns, whatever the number and the length of their requests.

Each turn a key may spend a quantum of tokens more; what it does not spend it keeps while it has work (Shreedhar and
Varghese 1996).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable


class FairTurns:
    """Divides the tokens of a step between keys."""

    def __init__(self) -> None:
        self._deficits: dict[Hashable, int] = {}

    def divide(self, budget: int, keys: Iterable[Hashable], spend: Callable[[Hashable, int], int]) -> None:
        """Let keys spend a budget in turns.

        Args:
            budget: tokens in all.
            keys: those with work.
            spend: spends at most so many tokens of a key, and returns how many; fewer mean that no work is left.
        """
        active = list(dict.fromkeys(keys))
        # A key that was served before goes behind those that were not; without work nothing is kept.
        order = [key for key in self._deficits if key in active] + [key for key in active if key not in self._deficits]
        self._deficits = {key: self._deficits.get(key, 0) for key in order}
        while budget > 0 and order:
            quantum = max(1, budget // len(order))
            for key in list(order):
                self._deficits[key] += quantum
                allowed = min(self._deficits[key], budget)
                spent = spend(key, allowed)
                self._deficits[key] -= spent
                budget -= spent
                if spent < allowed:
                    order.remove(key)
                    self._deficits.pop(key)
                if budget <= 0:
                    self._move_behind(key)
                    return

    def _move_behind(self, key: Hashable) -> None:
        """Let the keys after this one begin the next step."""
        keys = list(self._deficits)
        after = keys.index(key) + 1 if key in self._deficits else 0
        self._deficits = {each: self._deficits[each] for each in (*keys[after:], *keys[:after])}
