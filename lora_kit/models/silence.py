"""Keep the progress bars, load reports and notices of other libraries off the terminal for the length of a block."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def silence_libraries() -> Iterator[None]:
    """Hide transformers' progress bars and load reports, and what `silence_bitsandbytes` hides."""
    from transformers.utils import logging as transformers_logging

    bars_enabled, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        with silence_bitsandbytes():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars_enabled:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def silence_bitsandbytes() -> Iterator[None]:
    """Hide the notice about `kernels` that bitsandbytes logs when it is imported on a CPU."""
    with use_log_level("bitsandbytes", logging.ERROR):
        yield


@contextlib.contextmanager
def use_log_level(name: str, level: int) -> Iterator[None]:
    """Set the level of a logger for the length of a block."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def silence_datasets() -> Iterator[None]:
    """Hide the progress bars of `datasets`."""
    import datasets  # type: ignore[import-untyped]

    were_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            datasets.enable_progress_bars()
