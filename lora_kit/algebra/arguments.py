"""Checks of arguments that `combine`, `resize` and `extract` share."""

from __future__ import annotations

from lora_kit.config.validation import is_finite_number, is_whole_number
from lora_kit.errors import ConfigError


def check_whole_number(name: str, value: object) -> None:
    """Raise ConfigError unless an argument is a whole number of at least 1."""
    if not (isinstance(value, int) and is_whole_number(value) and value >= 1):
        raise ConfigError(f"{name}={value!r} was given; a whole number from 1 is expected")


def check_share(name: str, value: object) -> None:
    """Raise ConfigError unless an argument is a number above 0 and at most 1."""
    if not (isinstance(value, (int, float)) and is_finite_number(value) and 0 < value <= 1):
        raise ConfigError(f"{name}={value!r} was given; a number above 0 up to 1 is expected")
