"""What a launcher such as torchrun tells a process in environment variables, and what follows from that."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Final

import torch

from lora_kit.errors import ConfigError
from lora_kit.io.text import escape_text

_VARIABLES: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")
"""They are hidden from libraries that would act on them."""
_NEEDED: Final = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a process that is not alone must have been given besides `WORLD_SIZE`."""


def read_world_size() -> int:
    """Return how many processes a launcher has started; 1 without one.

    Raises:
        ConfigError: a variable is not set, or its value is invalid.
    """
    size = _read_number("WORLD_SIZE", default=1, least=1)
    if size == 1:
        return size
    missing = [name for name in _NEEDED if not os.environ.get(name)]
    if missing:
        raise _build_error(f"WORLD_SIZE is {size}, and {', '.join(missing)} not set")
    _read_number("MASTER_PORT", least=1, end=2**16)
    for name in ("RANK", "LOCAL_RANK"):
        _read_number(name, end=size)
    return size


def read_local_rank() -> int:
    """Return the number of this process on its machine, from 0."""
    return _read_number("LOCAL_RANK", default=0)


def _read_number(name: str, *, default: int = 0, least: int = 0, end: int = 2**31) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and least <= int(text[:12]) < end):
        expected = f"a whole number from {least}" + (f" to {end - 1}" if end < 2**31 else "")
        raise _build_error(f"{name} is {escape_text(text[:40])}; {expected} was expected")
    return int(text)


def _build_error(what: str) -> ConfigError:
    hint = "torchrun --nproc-per-node N sets what N processes need; one process needs none of it (unset WORLD_SIZE)"
    return ConfigError(f"the environment is not that of a launcher: {what}", hint=hint)


def count_by_machine(local_ranks: Sequence[int]) -> tuple[int, ...]:
    """Return how many processes each machine has, most first.

    Args:
        local_ranks: of all processes: their numbers on their machines, from 0.
    """
    with_more_than = [local_ranks.count(rank) for rank in range(max(local_ranks) + 1)]
    return tuple(sum(count > machine for count in with_more_than) for machine in range(max(with_more_than)))


def choose_device() -> None:
    """Let `cuda` be a device of this process's own, where there are as many."""
    if torch.cuda.is_available():
        torch.cuda.set_device(read_local_rank() % torch.cuda.device_count())


def choose_backend() -> str:
    """Return what torch.distributed sums with."""
    if not torch.cuda.is_available():
        return "gloo"
    here = _read_number("LOCAL_WORLD_SIZE", default=1)
    # NCCL does not let two processes share a device.
    return "cpu:gloo,cuda:nccl" if here <= torch.cuda.device_count() else "cpu:gloo,cuda:gloo"


@contextlib.contextmanager
def hide_launcher() -> Iterator[None]:
    """Hide a launcher's variables, and restore them: accelerate would wrap the model and gather what is summed here."""
    before = {name: os.environ.pop(name) for name in _VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
