"""Whether an output would replace what a command reads, or lie in it: checked before any work."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from lora_kit.errors import LoraKitError, StorageError
from lora_kit.io.output_path import check_path
from lora_kit.io.text import escape_text

OTHER_OUTPUT: Final = "choose another output"
"""The hint of an error for an output that overlaps an input."""


def reason_overlap(out: Path, inputs: Iterable[str | Path]) -> str | None:
    """Return why an output is not apart from an input; None where it is apart from all.

    An output is apart unless it is an input under any name, by links or hard links too, or lies in an input that is a
    folder, or has an input in it. Inputs that are not here, such as ids of the hub, are passed over.
    """
    place = Path(os.path.realpath(out))
    for given in inputs:
        path = os.path.expanduser(given)
        if not os.path.exists(path):
            continue
        real = Path(os.path.realpath(path))
        if place == real or (place.exists() and place.samefile(real)):
            other = "" if str(out) == str(given) else f" ({escape_text(given)})"
            return f"the output {escape_text(out)} is an input{other}"
        if place.is_relative_to(real) or real.is_relative_to(place):
            return f"the output {escape_text(out)} and the input {escape_text(given)} lie inside each other"
    return None


def refuse_overlap(out: Path, inputs: Iterable[str | Path], *, error: type[LoraKitError] = StorageError) -> None:
    """Raise an error for an output that is an input, lies in one or has one in it; see `reason_overlap`.

    Args:
        error: its class.

    Raises:
        StorageError: the output is not a valid path.
    """
    check_path(out)
    reason = reason_overlap(out, inputs)
    if reason:
        raise error(reason, hint=OTHER_OUTPUT)
