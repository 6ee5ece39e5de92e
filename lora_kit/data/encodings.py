"""The encoding of a text file that does not say it: UTF-8 if it is that, and else only what is beyond doubt."""

from __future__ import annotations

import re
from typing import Final

AUTO_ENCODING: Final = "auto"
UTF8: Final = "utf-8"
UTF16_MARKS: Final = (b"\xff\xfe", b"\xfe\xff")
BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
"""Spreadsheets put it before a text in UTF-8, even where later lines are in another encoding."""

_UTF8_SEQUENCE: Final = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
_OTHER_THAN_CP1252: Final = re.compile(
    rb"[\x81\x8d\x8f\x90\x9d]"  # no characters there
    rb"|[a-z][\x8a\x8c\x8e\x9f\xc0-\xde][a-z]"  # a capital letter within a word: Mac Roman, cp1250
    rb"|[a-zA-Z][\xa1-\xac\xae-\xb3\xb5\xb6\xb8-\xbf][a-z]"  # a symbol within a word: cp1250, ISO 8859-2
)
_MAX_SHARE: Final = 0.25
"""Most bytes above 127 of a text in a Western European language; Cyrillic and Greek texts have more than half."""


def detect_encoding(contents: bytes) -> str:
    """Return the encoding of a text: `utf-16` by its mark, `cp1252` where nothing speaks against it, else `utf-8`.

    A text in which some characters are UTF-8 and others are not stays UTF-8, and so does one that may be in another
    encoding of single bytes: their rows are faults with the byte that is wrong, not rows with wrong letters.
    """
    if contents.startswith(UTF16_MARKS):
        return "utf-16"
    if contents.startswith(BYTE_ORDER_MARK):
        return UTF8
    try:
        contents.decode(UTF8)
    except UnicodeDecodeError:
        return "cp1252" if _is_cp1252(contents) else UTF8
    return UTF8


def _is_cp1252(contents: bytes) -> bool:
    high = len(contents) - len(contents.translate(None, bytes(range(128, 256))))
    is_mixed = b"\0" in contents or _UTF8_SEQUENCE.search(contents) or _OTHER_THAN_CP1252.search(contents)
    return not is_mixed and high <= _MAX_SHARE * len(contents)
