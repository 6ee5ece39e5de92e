"""What no recipe can mean: values without end, text that no file takes, numbers that no training reaches.

All of it is found before a base is loaded, and by a dry run as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from lora_kit.errors import RecipeError
from lora_kit.io.output_path import reason_not_a_path
from lora_kit.io.text import format_value
from lora_kit.training.recipe.coerce import Section
from lora_kit.training.recipe.strict_yaml import MAX_LEVELS, MAX_NODES

_MAX_TEXT: Final = 2**16
"""Characters of one text; a chat template is the longest."""
_LARGEST: Final[Mapping[str, int]] = {
    "max_steps": 10**12,
    "num_train_epochs": 10**9,
    "per_device_train_batch_size": 10**6,
    "per_device_eval_batch_size": 10**6,
    "gradient_accumulation_steps": 10**6,
    "dataloader_num_workers": 1_024,
}
"""The largest value of some keys of `train`; no training that ends needs more."""
_LARGEST_NUMBER: Final = 2**63 - 1
"""Of any other whole number: torch has none that is larger."""


def check_values(values: Mapping[Any, object], *, where: str) -> None:
    """Raise RecipeError unless values are few, not deep, and of text that a file takes.

    An alias of YAML counts as often as it is used.

    Args:
        where: the recipe, for messages.
    """
    for count, (key, value, level) in enumerate(_walk(values, "", 0)):
        if count >= MAX_NODES:
            raise RecipeError(
                f"{where}: more than {MAX_NODES:,} values", hint="aliases count as often as they are used"
            )
        if level > MAX_LEVELS:
            raise RecipeError(f"{where}: nested more than {MAX_LEVELS} levels deep")
        problem = _reason_not_text(value) if isinstance(value, str) else ""
        if problem:
            raise RecipeError(f"{where}: {key or 'a key'} {problem}")


def _walk(value: object, key: str, level: int) -> Iterator[tuple[str, object, int]]:
    """Yield every value with its key and level, depth first; levels below the limit are not entered."""
    yield key, value, level
    if level > MAX_LEVELS:
        return
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield "", name, level + 1
            yield from _walk(item, f"{key}.{name}" if key else str(name)[:80], level + 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _walk(item, key, level + 1)


def _reason_not_text(text: str) -> str:
    """Return why no file takes a text; an empty string where one does."""
    if "\0" in text:
        return "has a NUL in it"
    if len(text) > _MAX_TEXT:
        return f"has {len(text):,} characters; at most {_MAX_TEXT:,} are read"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "has half of a surrogate pair in it"
    return ""


def check_largest(train: Section) -> None:
    """Raise RecipeError for a number in `train` that no training reaches."""
    kept = train.get("save_total_limit")
    if isinstance(kept, int) and kept < 1:
        raise RecipeError(f"train.save_total_limit must be 1 or more checkpoints; {kept} was given")
    for key, value in train.items():
        largest = _LARGEST.get(key, _LARGEST_NUMBER)
        is_counted = isinstance(value, int) or (isinstance(value, float) and key in _LARGEST)
        if is_counted and abs(value) > largest:
            raise RecipeError(f"train.{key} must be at most {largest:,}; {format_value(value)} was given")


def check_output_name(out: str) -> None:
    """Raise RecipeError for an output that no file system takes, with the names that are written beside it."""
    reason = reason_not_a_path(Path(out))
    if reason:
        raise RecipeError(f"out {format_value(out)} {reason}", hint="choose a shorter one")
