"""`push`: an adapter or a model as one commit of a repository of the hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lora_kit.adapter.adapter_record import RECORD, seal_record
from lora_kit.adapter.folder import CARD, CONFIG
from lora_kit.errors import ConfigError, ExportError
from lora_kit.io.hub import HubId
from lora_kit.io.portable_paths import find_private_path
from lora_kit.io.strict_json import parse_object
from lora_kit.io.text import escape_text, format_value
from lora_kit.merging.preflight import MERGE_RECORD
from lora_kit.publishing.hub_card import complete_card
from lora_kit.publishing.published_folder import ADAPTER, PublishedFolder, is_hub_name, open_published_folder

_TEXT_SUFFIXES: Final = (".json", ".jsonl", ".md", ".txt", ".jinja", ".yaml")
_NAME_FIELDS: Final = ("_name_or_path", "name_or_path")
"""Fields of transformers' configs that say where a model was read from."""
_DATA_FIELDS: Final = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class PushPlan:
    """What would be sent: nothing has left yet.

    Attributes:
        repository: `organization/name`.
        kind: `adapter` or `model`.
        base: name of the base on the hub.
        files: by their name there, the content of a file that was completed, or the path of one as it is.
        left_out: names in the folder that are not sent.
    """

    repository: str
    kind: str
    base: str
    files: Mapping[str, bytes | Path]
    left_out: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return _measure(self.files)


def plan_push(
    folder: Path,
    repository: str,
    *,
    base: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
) -> PushPlan:
    """Return what a push would send: weights, configs, tokenizer, record and card; no recipe, no report, no names of
    data, and no path of this machine.

    Args:
        folder: an adapter, or a model that was merged or trained in every weight.
        repository: `organization/name` on the hub.
        base: name of the base on the hub; None for the one that the folder names.
        license: its id on the hub, for the card.
        datasets: ids on the hub of data that the card names.

    Raises:
        ConfigError: the repository is no id of the hub, or the base has no name there.
        ExportError: the folder is neither an adapter nor such a model, or a file names a folder of this machine.
        AdapterError, VerificationError: the adapter is damaged.
    """
    hub_id = HubId.parse(repository)
    if hub_id is None or "/" not in hub_id.repository or str(hub_id) != hub_id.repository:
        raise ConfigError(f"{format_value(repository)} is no id of a repository", hint="organization/name is expected")
    published = open_published_folder(folder)
    name = _choose_base_name(published, base)
    files = _collect_files(published, name)
    text = (folder / CARD).read_text("utf-8") if CARD in published.files else None
    card = complete_card(
        text, published, repository=repository, base=name, sizes=_measure(files), license=license, datasets=datasets
    )
    files[CARD] = card.encode()
    if published.record is not None:
        files[RECORD] = _rewrite_record(published.record, files, base=name)
    _check_nothing_private(files)
    return PushPlan(repository=repository, kind=published.kind, base=name, files=files, left_out=published.left_out)


def _choose_base_name(published: PublishedFolder, base: str | None) -> str:
    if base is not None and not is_hub_name(base):
        raise ConfigError(f"base {format_value(base)} is no id of the hub", hint="organization/name is expected")
    name = base or published.base_on_hub
    if name is None:
        given = f"its base is {published.base!r}, a folder" if published.base else "it names no base"
        raise ConfigError(f"{escape_text(published.folder)}: {given}", hint="say what the base is called on the hub")
    return name


def _collect_files(published: PublishedFolder, base: str) -> dict[str, bytes | Path]:
    """Return the files but card and record; configs name the base as the hub does."""
    files: dict[str, bytes | Path] = {}
    for name in published.files:
        path = published.folder / name
        if name in (CARD, RECORD):
            continue
        if published.kind == ADAPTER and name == CONFIG:
            files[name] = _encode({**_read(path), "base_model_name_or_path": base})
        elif name == MERGE_RECORD:
            files[name] = _rename_merge_base(path, base)
        elif name.endswith("config.json"):
            files[name] = _drop_local_names(path)
        else:
            files[name] = path
    return files


def _drop_local_names(path: Path) -> bytes | Path:
    """Return a config without the fields that say which folder it was read from; the file itself where it has none."""
    fields = _read(path)
    local = [name for name in _NAME_FIELDS if name in fields and not is_hub_name(str(fields[name]))]
    return _encode({name: value for name, value in fields.items() if name not in local}) if local else path


def _rename_merge_base(path: Path, base: str) -> bytes:
    fields = _read(path)
    own = fields.get("base")
    return seal_record({**fields, "base": {**own, "name": base}} if isinstance(own, dict) else fields)


def _rewrite_record(record: Mapping[str, object], files: Mapping[str, bytes | Path], *, base: str) -> bytes:
    """Return an adapter's record that vouches for the files as they are sent, and names no data."""
    facts = dict(record)
    own, recipe = facts.get("base"), facts.get("recipe")
    if isinstance(own, Mapping):
        facts["base"] = {**own, "name": base}
    if isinstance(recipe, Mapping):
        facts["recipe"] = _strip_recipe(recipe, base)
    sums = {name: _describe_file(content) for name, content in files.items()}
    return seal_record({**facts, "files": sums})


def _strip_recipe(recipe: Mapping[str, object], base: str) -> dict[str, object]:
    """Return a recipe without its data, its output and where it started from."""
    kept = {name: value for name, value in recipe.items() if name not in ("out", "from")}
    data, lora = recipe.get("data"), recipe.get("lora")
    if isinstance(data, Mapping):
        kept["data"] = {name: value for name, value in data.items() if name not in _DATA_FIELDS}
    if isinstance(lora, Mapping) and "base_model_name_or_path" in lora:
        kept["lora"] = {**lora, "base_model_name_or_path": base}
    return {**kept, "base": base}


def _describe_file(content: bytes | Path) -> dict[str, object]:
    if isinstance(content, bytes):
        return {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    with content.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": content.stat().st_size}


def _check_nothing_private(files: Mapping[str, bytes | Path]) -> None:
    """Raise ExportError for a text file that names a home folder."""
    for name, content in files.items():
        if not name.endswith(_TEXT_SUFFIXES) or name == "tokenizer.json":  # a vocabulary, not what anyone wrote
            continue
        text = (content if isinstance(content, bytes) else content.read_bytes()).decode("utf-8", "replace")
        found = find_private_path(text)
        if found is not None:
            raise ExportError(
                f"{name} names a folder of this machine, {format_value(found)}", hint="take it out of that file"
            )


def _measure(files: Mapping[str, bytes | Path]) -> dict[str, int]:
    return {
        name: len(content) if isinstance(content, bytes) else content.stat().st_size for name, content in files.items()
    }


def _read(path: Path) -> dict[str, object]:
    return dict(parse_object(path.read_text("utf-8")))


def _encode(fields: Mapping[str, object]) -> bytes:
    return f"{json.dumps(fields, indent=2)}\n".encode()
