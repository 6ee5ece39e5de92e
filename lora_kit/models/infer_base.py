"""Choose the base where the caller gives none: the one that the adapters name, if it is on this machine."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_kit.adapter.adapter_location import resolve_adapter
from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import ConfigError, format_list
from lora_kit.io.hub import split_revision
from lora_kit.io.text import format_value
from lora_kit.models.locate import find_local_folder, reason_not_here
from lora_kit.names import DEFAULT_STORE, KIT_BASE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NamedBase:
    """The base that an adapter names.

    Attributes:
        name: a folder, a hub id or `kit-base`; None where the adapter names none.
        problem: why it cannot be read without the network; None where it can.
    """

    name: str | None
    problem: str | None

    @classmethod
    def of(cls, config: LoraConfig, fingerprint: object) -> NamedBase:
        """Return the first base on this machine of those that a config and the fingerprint in a record name.

        Whoever made an adapter chose the name in it. So nothing is downloaded for it, and the adapter's fingerprint is
        compared with the base when the adapter is loaded.
        """
        names = [_name_with_revision(config)]
        if isinstance(fingerprint, Mapping) and isinstance(fingerprint.get("name"), str):
            names.append(fingerprint["name"])
        bases = [cls(name, reason_not_here(name)) for name in dict.fromkeys(names) if name]
        here = [base for base in bases if base.problem is None]
        return (here or bases or [cls(None, "it names no base")])[0]

    @property
    def refusal(self) -> str:
        """The end of a message: which base the adapter names, and why it is not used."""
        return f"names {format_value(self.name)} as its base, but {self.problem}" if self.name else "names no base"


def infer_base(adapters: Sequence[str | Path], *, store: str | Path = DEFAULT_STORE) -> str:
    """Return the base to use where the user gives none: the one that all adapters name; `kit-base` without adapters.

    Raises:
        ConfigError: an adapter names no base, or one that is not on this machine; or the adapters name different bases.
        UnknownAdapterError, AdapterError: an adapter does not exist or cannot be read.
    """
    from lora_kit.adapter.folder import AdapterFolder  # with torch, which `NamedBase` does not need

    chosen: dict[str, str] = {}
    labels: dict[str, str] = {}
    for adapter in adapters:
        folder = AdapterFolder.open(resolve_adapter(adapter, store=store).folder, allow=("changed-files",))
        fingerprint = (folder.record or {}).get("base")
        base = NamedBase.of(folder.config, fingerprint)
        if base.name is None or base.problem is not None:
            message = f"adapter {str(adapter)!r} {base.refusal}, and no base was given"
            raise ConfigError(message, hint="give the base with --base")
        if fingerprint is None and base.name != KIT_BASE:
            logger.warning(
                "%s: %s, the base that it names, is used; without a fingerprint only shapes can be checked",
                folder.shown,
                base.name,
            )
        key = str((find_local_folder(base.name) or Path(base.name)).resolve())
        chosen.setdefault(key, base.name)
        labels.setdefault(key, f"{base.name} ({str(adapter)!r})")
    if len(chosen) > 1:
        message = f"the adapters name different bases: {format_list(list(labels.values()))}"
        raise ConfigError(f"{message}, and no base was given", hint="give the base with --base")
    return next(iter(chosen.values()), KIT_BASE)


def _name_with_revision(config: LoraConfig) -> str | None:
    name, revision = config.base_model_name_or_path, config.revision
    if not name or not revision or split_revision(name)[1] or find_local_folder(name):
        return name
    return f"{name}@{revision}"
