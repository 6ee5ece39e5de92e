"""A folder that is to be published: what it holds, what may leave, and what its card has to say."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.adapter_record import RECORD, find_changed_files, read_record
from lora_kit.adapter.folder import CARD, CONFIG, OLD_WEIGHTS, WEIGHTS, has_adapter_files
from lora_kit.adapter.use_record import MODEL_RECORD
from lora_kit.errors import ExportError, VerificationError, format_list
from lora_kit.io.hub import HubId
from lora_kit.io.read import folder_exists, read_json
from lora_kit.io.strict_json import JsonObject
from lora_kit.io.text import escape_text
from lora_kit.merging.preflight import MERGE_RECORD
from lora_kit.models.model_folder_card import CONFIG_FILE, infer_folder_task
from lora_kit.models.tasks import find_task_by_peft_type
from lora_kit.names import CHAT_TEMPLATE_FILE, KIT_BASE, METRICS_FILE, RECIPE_FILE

ADAPTER: Final = "adapter"
MODEL: Final = "model"
_JSON_LIMIT: Final = 64 * 2**20
_ADAPTER_FILES: Final = (CONFIG, WEIGHTS, OLD_WEIGHTS, RECORD, CARD, "loss.png", METRICS_FILE, CHAT_TEMPLATE_FILE)
_MODEL_FILES: Final = (
    "*.safetensors",
    "*.safetensors.index.json",
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.spm",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template.*",
    "*processor_config.json",
    MERGE_RECORD,
    MODEL_RECORD,
    CARD,
    "loss.png",
    METRICS_FILE,
)


@dataclass(frozen=True, kw_only=True)
class PublishedFolder:
    """What a folder holds.

    Attributes:
        folder: of the files.
        kind: `ADAPTER` or `MODEL`.
        base: name of the base that it was made for or from; None where that is not known.
        task: one of `lora_kit.models.tasks.TASKS`; None where that is not known.
        tag: how it was made, in a word.
        files: names of the files that are published.
        left_out: names of the others.
        metrics: measured values by name.
        max_length: tokens of a sample of its training, at most; None where that is not known.
        record: `lora_kit.json` of an adapter; None without one.
    """

    folder: Path
    kind: str
    base: str | None
    task: str | None
    tag: str
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    metrics: Mapping[str, object] = field(default_factory=dict)
    max_length: int | None = None
    record: JsonObject | None = None

    @property
    def base_on_hub(self) -> str | None:
        """The base's name where others find a base by it: an id of the hub, or `kit-base`."""
        return self.base if self.base and is_hub_name(self.base) else None


def is_hub_name(base: str) -> bool:
    """Return whether a base's name is an id of the hub and no folder here, or `kit-base`."""
    return base == KIT_BASE or (HubId.parse(base) is not None and not folder_exists(Path(base)))


def is_model_folder(folder: Path) -> bool:
    """Return whether a folder holds a whole model, in transformers' format."""
    return (folder / CONFIG_FILE).is_file() and any(folder.glob("*.safetensors"))


def open_published_folder(folder: Path) -> PublishedFolder:
    """Read what a folder holds: an adapter, or a model that was merged or trained in every weight.

    An adapter is read whole, and compared with its record.

    Raises:
        ExportError: it is neither.
        AdapterError, ConfigError, VerificationError: the adapter is damaged.
    """
    if has_adapter_files(folder):
        return _open_adapter(folder)
    if is_model_folder(folder):
        if (folder / MERGE_RECORD).is_file():
            return _open_merged_model(folder)
        if (folder / RECIPE_FILE).is_file():
            return _open_trained_model(folder)
    raise ExportError(
        f"{escape_text(folder)} is neither an adapter, nor a model that lora-kit merged or trained",
        hint="`hf upload` sends any folder",
    )


def _open_adapter(folder: Path) -> PublishedFolder:
    record = read_record(folder, allow=())
    if record is not None:
        _check_unchanged(folder, record)
    fields = read_json(folder / CONFIG, limit=_JSON_LIMIT)
    if fields.get("peft_type", "LORA") == "LORA" and (record or {}).get("method") != "peft":
        Adapter.load(folder)
    spec = find_task_by_peft_type(_text_or_none(fields.get("task_type")))
    metrics = (record or {}).get("metrics")
    files, left_out = _sort_files(folder, _ADAPTER_FILES)
    return PublishedFolder(
        folder=folder,
        kind=ADAPTER,
        base=_text_or_none(fields.get("base_model_name_or_path")),
        task=spec.name if spec else None,
        tag=str(fields.get("peft_type", "LORA")).lower(),
        files=files,
        left_out=left_out,
        metrics=metrics if isinstance(metrics, Mapping) else {},
        max_length=_find_max_length((record or {}).get("recipe")),
        record=record,
    )


def _check_unchanged(folder: Path, record: JsonObject) -> None:
    """Raise VerificationError unless the files are as they were saved, but for the card, which its owner may edit."""
    changes = [f"{name} {change}" for name, change in find_changed_files(folder, record).items() if name != CARD]
    if changes:
        raise VerificationError(f"{escape_text(folder)} is not as it was saved: {format_list(changes)}")


def _open_merged_model(folder: Path) -> PublishedFolder:
    base = read_json(folder / MERGE_RECORD, limit=_JSON_LIMIT).get("base")
    files, left_out = _sort_files(folder, _MODEL_FILES)
    return PublishedFolder(
        folder=folder,
        kind=MODEL,
        base=_text_or_none(base.get("name")) if isinstance(base, Mapping) else None,
        task=infer_folder_task(folder),
        tag="merged-lora",
        files=files,
        left_out=left_out,
    )


def _open_trained_model(folder: Path) -> PublishedFolder:
    import yaml

    recipe = yaml.safe_load((folder / RECIPE_FILE).read_text("utf-8"))
    files, left_out = _sort_files(folder, _MODEL_FILES)
    return PublishedFolder(
        folder=folder,
        kind=MODEL,
        base=_text_or_none(recipe.get("base")),
        task=infer_folder_task(folder),
        tag="fine-tuned",
        files=files,
        left_out=left_out,
        metrics=_read_last_metrics(folder / METRICS_FILE),
        max_length=_find_max_length(recipe),
    )


def _read_last_metrics(file: Path) -> dict[str, object]:
    """Return the numbers of the last line of a training's log; none where there is no log."""
    lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    entry = json.loads(lines[-1]) if lines else {}
    return {key: value for key, value in entry.items() if isinstance(value, (int, float))}


def _find_max_length(recipe: object) -> int | None:
    data = recipe.get("data") if isinstance(recipe, Mapping) else None
    length = data.get("max_length") if isinstance(data, Mapping) else None
    return length if isinstance(length, int) else None


def _sort_files(folder: Path, patterns: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the entries that match a pattern, and of the others; hidden ones are in neither."""
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    sent = [
        name
        for name in names
        if (folder / name).is_file() and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]
    return tuple(sent), tuple(name for name in names if name not in sent)


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
