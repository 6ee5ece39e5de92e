"""What a write that failed is called: one error with the path and, on a full disk, the bytes needed."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from lora_kit.errors import LoraKitError, StorageError
from lora_kit.io.text import escape_text

DISK_FULL_ERRNOS: Final = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_FAILED_WRITE_ERRNOS: Final = (*DISK_FULL_ERRNOS, errno.EIO, errno.EROFS)
_QUOTED_ERRNO: Final = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")
"""As Rust and Python print it."""
_SHORT_WRITE: Final = re.compile(r"\d+ requested and \d+ written")
"""What NumPy says of it."""


@contextmanager
def translate_os_errors(target: Path, needed: int = 0) -> Iterator[None]:
    """Raise an OSError of the block as a StorageError that names the target and, on a full disk, the bytes needed.

    Of other libraries' errors, those that a failed write is behind.
    """
    try:
        yield
    except LoraKitError:
        raise
    except Exception as error:
        cause = error if isinstance(error, OSError) else _find_write_error(error)
        if cause is None:
            raise
        size = f"; {needed:,} bytes are needed" if cause.errno in DISK_FULL_ERRNOS and needed else ""
        raise StorageError(f"{escape_text(target)} cannot be written: {cause.strerror or cause}{size}") from error


def _find_write_error(error: BaseException) -> OSError | None:
    """Return the failed write behind another library's error; None where there is none.

    torch raises a RuntimeError while it handles the OSError, and safetensors only quotes its number.
    """
    quoted = find_quoted_write_error(str(error))
    if quoted is not None:
        return quoted
    inner = error.__cause__ or error.__context__
    if isinstance(inner, OSError) and inner.errno in _FAILED_WRITE_ERRNOS:
        return inner
    return _find_write_error(inner) if inner is not None else None


def find_quoted_write_error(message: str) -> OSError | None:
    """Return the failed write that a message of another library or program quotes; None where it quotes none."""
    quoted = _QUOTED_ERRNO.search(message)
    number = int(quoted[1] or quoted[2]) if quoted else errno.ENOSPC if _SHORT_WRITE.search(message) else 0
    return OSError(number, os.strerror(number)) if number in _FAILED_WRITE_ERRNOS else None
