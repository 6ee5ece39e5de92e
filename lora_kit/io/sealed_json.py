"""JSON files with the sha256 of themselves, so that one changed bit of them is seen.

The digest is that of the file's own bytes with 64 zeros in the place of the digits. It shows damage; it is no
signature.
"""

from __future__ import annotations

import hashlib
from typing import Final

from lora_kit.io.strict_json import JsonObject

SELF_DIGEST: Final = "record_sha256"
"""The field with the digest."""
NO_DIGEST: Final = "0" * 64
"""What stands there while the digest is computed."""


def seal_json(text: str) -> str:
    """Return a JSON object, indented by 2, with its digest in the place of the `NO_DIGEST` that it has."""
    # Of the object itself: a field of the same name in a nested one is indented further.
    field = f'\n  "{SELF_DIGEST}": "'
    start, _, end = text.partition(f'{field}{NO_DIGEST}"')
    return f'{start}{field}{_hash_text(text)}"{end}'


def is_intact(fields: JsonObject, text: str) -> bool:
    """Return whether a JSON object has a digest that is its own.

    Args:
        fields: of the object.
        text: that they were parsed from.
    """
    claimed = fields.get(SELF_DIGEST)
    is_whole = isinstance(claimed, str) and len(claimed) == len(NO_DIGEST) and text.count(claimed) == 1
    return is_whole and _hash_text(text.replace(str(claimed), NO_DIGEST)) == claimed


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
