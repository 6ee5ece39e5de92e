"""Parameters of which the default run takes a few, and the long run all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def take_few(values: Iterable[Any], *few: Any) -> list[Any]:
    """Return every value as a parameter; those not among the few are marked `slow`."""
    every = list(values)
    assert all(value in every for value in few)
    return [pytest.param(value, marks=[] if value in few else pytest.mark.slow) for value in every]
