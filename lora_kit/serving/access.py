"""Who may do what: bearer keys, hashed in a file, each with the adapters that it may use."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lora_kit.errors import ConfigError, LoraKitError
from lora_kit.io.read import read_json
from lora_kit.io.text import escape_text

_KEYS_BYTES: Final = 2**20
_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class AccessKey:
    """What the holder of a key may do.

    Attributes:
        name: for logs; never the key itself.
        adapters: labels that it may ask; None for all, and the base.
        is_admin: whether it may change what the server offers.
    """

    name: str
    adapters: frozenset[str] | None = None
    is_admin: bool = False

    def may_ask(self, label: str) -> bool:
        return self.adapters is None or label in self.adapters


OPEN: Final = AccessKey("anybody", is_admin=True)
"""Of a server without keys, which listens on this machine alone."""


class AccessKeys:
    """The keys of a server.

    Args:
        by_hash: what the holder of a key may do, by the key's sha256 in hexadecimal digits; empty for no keys at all.
    """

    def __init__(self, by_hash: Mapping[str, AccessKey]) -> None:
        self._by_hash = dict(by_hash)

    @property
    def are_needed(self) -> bool:
        return bool(self._by_hash)

    def find(self, key: str | None) -> AccessKey | None:
        """Return what the holder of a key may do; None for a wrong key, or none where one is needed.

        Every hash is compared, each in constant time, so that the time tells nothing.
        """
        if not self._by_hash:
            return OPEN
        given = hash_key(key or "")
        found = [access for known, access in self._by_hash.items() if hmac.compare_digest(known, given)]
        return found[0] if found else None


def hash_key(key: str) -> str:
    """Return the sha256 of a key. Keys are random and long, so that nothing slower is needed."""
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


def read_keys(path: Path | None) -> AccessKeys:
    """Read a file of keys: `{"keys": [{"name", "sha256", "adapters", "admin"}]}`.

    Raises:
        ConfigError: it is not such a file.
        StorageError: it cannot be read.
    """
    if path is None:
        return AccessKeys({})
    source = escape_text(path)
    try:
        entries = read_json(path, limit=_KEYS_BYTES).get("keys")
    except LoraKitError as error:
        raise ConfigError(f"{source}: {error.message}", hint=error.hint) from error
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{source}: a list of keys was expected", hint='{"keys": [{"name": "me", "sha256": "…"}]}')
    return AccessKeys(dict(_parse_key(entry, f"{source}: key {n}") for n, entry in enumerate(entries, start=1)))


def _parse_key(entry: object, place: str) -> tuple[str, AccessKey]:
    if not isinstance(entry, dict) or not entry.keys() <= {"name", "sha256", "adapters", "admin"}:
        raise ConfigError(
            f"{place}: name, sha256, adapters and admin were expected; {json.dumps(entry)[:80]} was given"
        )
    digest, name, adapters = entry.get("sha256"), entry.get("name"), entry.get("adapters")
    is_hash = isinstance(digest, str) and len(digest) == 64 and set(digest) <= set("0123456789abcdef")
    if not is_hash or not isinstance(name, str):
        raise ConfigError(f"{place}: a name and the sha256 of the key in 64 hexadecimal digits were expected")
    if adapters is not None and not (isinstance(adapters, list) and all(isinstance(each, str) for each in adapters)):
        raise ConfigError(f"{place}: adapters is a list of labels, or null for all")
    allowed = None if adapters is None else frozenset(adapters)
    return str(digest), AccessKey(name, allowed, is_admin=entry.get("admin") is True)


def check_host(host: str, keys: AccessKeys) -> None:
    """Check that a server which others can reach has keys.

    Raises:
        ConfigError: it has none.
    """
    if host not in _LOOPBACK and not keys.are_needed:
        raise ConfigError(
            f"host {host!r} can be reached from other machines, and there are no keys",
            hint="give --keys FILE, or --host 127.0.0.1",
        )
