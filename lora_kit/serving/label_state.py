"""What clients have changed of a server's labels, as its state file keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from lora_kit.errors import ConfigError

_STATE_FORMAT: Final = 1


@dataclass(frozen=True)
class LabelState:
    """What a server knows of labels, and keeps in its state file.

    Attributes:
        loaded: names in the store by the labels that were given to them at run time.
        aliases: labels by alias.
        pinned: labels that stay in their slots.
    """

    loaded: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    pinned: frozenset[str] = frozenset()

    def to_json(self) -> dict[str, Any]:
        return {
            "format": _STATE_FORMAT,
            "loaded": dict(self.loaded),
            "aliases": dict(self.aliases),
            "pinned": sorted(self.pinned),
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], *, source: str) -> LabelState:
        """Return the state of a file.

        Raises:
            ConfigError: it is not one of ours.
        """
        loaded, aliases, pinned = (fields.get(key) for key in ("loaded", "aliases", "pinned"))
        maps_are_text = all(
            isinstance(each, dict) and all(isinstance(value, str) for value in each.values())
            for each in (loaded, aliases)
        )
        is_list = isinstance(pinned, list) and all(isinstance(each, str) for each in pinned)
        if fields.get("format") != _STATE_FORMAT or not maps_are_text or not is_list:
            raise ConfigError(f"{source}: this is not the state of a server", hint="move the file away")
        assert isinstance(loaded, dict)
        assert isinstance(aliases, dict)
        assert isinstance(pinned, list)
        return cls(loaded, aliases, frozenset(pinned))
