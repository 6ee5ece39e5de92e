"""Keep the progress bars, load reports and notices of other libraries off the terminal for the length of a block."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Final

_KERNELS_NOTICE: Final = "Failed to load CPU gemm_4bit_forward from kernels-community"


@contextlib.contextmanager
def silence_libraries() -> Iterator[None]:
    """Hide transformers' progress bars and load reports."""
    from transformers.utils import logging as transformers_logging

    bars_enabled, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars_enabled:
            transformers_logging.enable_progress_bar()


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


def silence_kernels_notice() -> None:
    """Keep bitsandbytes from telling, when it is imported on some CPUs, that the package `kernels` is not installed.

    transformers and PEFT import it wherever they please, so this module calls it when it is imported itself.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_not_kernels_notice)


def _is_not_kernels_notice(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_KERNELS_NOTICE)


silence_kernels_notice()
