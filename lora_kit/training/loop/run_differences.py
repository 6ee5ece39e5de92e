"""What differs between two runs, in words."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Final, Protocol

from lora_kit.io.text import escape_text

PROCESSES: Final = "processes"
"""The key of the environment under which the number of processes is."""
STEP_ROWS: Final = "rows of a step"
"""The key of an identity under which the global batch is."""
_FSDP: Final = "fsdp"
"""The key of `train` that decides where the base's weights are, and nothing of the result."""
_ROWS: Final = "per_device_train_batch_size"
_BATCH_KEYS: Final[Mapping[str, int]] = {_ROWS: 8, "gradient_accumulation_steps": 1}
"""Keys of `train` that say how many rows a step has, with the defaults of transformers."""


def describe_differences(was: Mapping[str, object], now: Mapping[str, object], *, within: str = "") -> Iterator[str]:
    """Yield a line for each leaf that differs between two nested mappings."""
    for key in sorted({*was, *now}):
        name, old, new = f"{within}{key}", was.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from describe_differences(old, new, within=f"{name}.")
        elif old != new:
            yield f"{name} was {_format_value(old)}, is {_format_value(new)}"


def _format_value(value: object) -> str:
    return "not set" if value is None else escape_text(json.dumps(value, default=str))


class SavedRun(Protocol):
    """A run as its checkpoint has it."""

    @property
    def identity(self) -> Mapping[str, object]:
        """What decides the result."""

    @property
    def setting(self) -> Mapping[str, object]:
        """The environment."""


def describe_run_differences(
    saved: SavedRun, identity: Mapping[str, object], setting: Mapping[str, object]
) -> Iterator[str]:
    """Yield a line for each difference that makes another run.

    Where the number of processes is another one, only the rows of a whole step count, not how many are computed at
    once.
    """
    was, now = _complete(saved.identity), _complete(identity)
    if saved.setting.get(PROCESSES, 1) != setting.get(PROCESSES, 1):
        was, now = _drop_batch_keys(was), _drop_batch_keys(now)
    yield from describe_differences(was, now)


def identify_batch(train: Mapping[str, object], processes: int) -> dict[str, object]:
    """Return what an identity says of `train` and of the batches: as of one process that has the rows of all."""
    rows = {_ROWS: processes * _get_number(train, _ROWS)} if processes > 1 else {}
    train = {key: value for key, value in {**train, **rows}.items() if key != _FSDP}
    return {"train": train, STEP_ROWS: _count_step_rows(train)}


def _count_step_rows(train: Mapping[str, object]) -> int:
    """Return the rows of an optimizer step of one process."""
    return math.prod(_get_number(train, key) for key in _BATCH_KEYS)


def _get_number(train: Mapping[str, object], key: str) -> int:
    number = train.get(key, _BATCH_KEYS[key])
    assert isinstance(number, int)
    return number


def _complete(identity: Mapping[str, object]) -> dict[str, object]:
    """Return an identity with the rows of a step, which older checkpoints do not name."""
    train = identity.get("train")
    return dict(identity) if not isinstance(train, Mapping) else {STEP_ROWS: _count_step_rows(train), **identity}


def _drop_batch_keys(identity: Mapping[str, object]) -> dict[str, object]:
    train = identity["train"]
    assert isinstance(train, Mapping)
    return {**identity, "train": {key: value for key, value in train.items() if key not in _BATCH_KEYS}}
