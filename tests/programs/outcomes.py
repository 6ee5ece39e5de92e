"""What came of a program and a case, and what every check of `checks.CHECKS` is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.programs.cases import Case


@dataclass(frozen=True)
class Cost:
    """What a command took.

    Attributes:
        seconds: of CPU time.
        megabytes: of memory at its peak.
    """

    seconds: float
    megabytes: float


@dataclass(frozen=True)
class Outcome:
    """What a program made of a case.

    Attributes:
        key: `base/feature`.
        verdict: `equal`; `rejected` by us, before anything was written; `known` for a fault of the program that is
            documented; `wrong`; `failed`, the program gave no logits.
        difference: the largest one between logits, or between weights.
        bound: of the difference.
        effect: the largest change of a logit by the adapter.
        greedy: how many of the most probable tokens are the same.
        seconds: that the program took.
        reason: why it was rejected or failed.
        requests: that a server was asked.
        wrong_answers: of them.
        ours: what our own command took.
        theirs: what the program's command for the same took.
    """

    key: str
    verdict: str
    difference: float | None = None
    bound: float | None = None
    effect: float | None = None
    greedy: int | None = None
    seconds: float | None = None
    reason: str | None = None
    requests: int | None = None
    wrong_answers: int | None = None
    ours: Cost | None = None
    theirs: Cost | None = None

    @property
    def is_right(self) -> bool:
        return self.verdict in ("equal", "rejected", "known")


class Check(Protocol):
    """A program, and what it is given."""

    @property
    def environment(self) -> str | None:
        """Name in `environments.ENVIRONMENTS`; None for the one that runs this."""

    @property
    def form(self) -> str:
        """What the program reads or writes, in a word."""

    def run(self, cases: Sequence[Case], *, python: Path, folder: Path) -> tuple[str, list[Outcome]]:
        """Run the program, and return its version and what came of each case.

        Args:
            cases: all of them; a check takes those that it can.
            python: interpreter of the program's environment.
            folder: for the files of this check; it is empty.

        Raises:
            RuntimeError: the program did not run at all.
        """
