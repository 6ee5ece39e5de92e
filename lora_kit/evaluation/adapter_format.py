"""How the rows of a file become samples for an adapter: as those of its training did."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from lora_kit.adapter.adapter import Adapter
from lora_kit.data.batches import EncodedDataset
from lora_kit.data.chat import ChatTemplate, chat_template
from lora_kit.data.encode import DEFAULT_MAX_LENGTH, encode
from lora_kit.data.layouts import FORMATS
from lora_kit.data.rows import Rows
from lora_kit.errors import AdapterError, DataError, format_list
from lora_kit.generation.prompts import PromptStyle, data_of, separator_of, template_of
from lora_kit.io.read import read_text
from lora_kit.models.loading import Base
from lora_kit.models.prompt_tokens import DEFAULT_SEPARATOR
from lora_kit.models.tasks import LABEL_TASKS, SEQ2SEQ
from lora_kit.names import RECIPE_FILE

logger = logging.getLogger(__name__)

_MAX_RECIPE_BYTES: Final = 2**20


@dataclass(frozen=True)
class EncodingSettings:
    """What decides how rows are put.

    Attributes:
        style: of prompts.
        max_length: tokens of a sample at the most.
        labels: the names of the labels, in the order of their numbers.
    """

    style: PromptStyle
    max_length: int
    labels: tuple[str, ...] = ()


def task_for(rows: Rows) -> str:
    """The task that rows are for, where nothing else says."""
    return next(task for task, formats in FORMATS.items() if rows.format in formats)


def check_format(rows: Rows, task: str) -> None:
    """Raise DataError unless the task takes these rows."""
    if rows.format not in FORMATS[task]:
        told = f"{rows.path} has rows of the format {rows.format}; task {task} takes {format_list(FORMATS[task])}"
        raise DataError(told, hint=f"they are for an adapter of task {task_for(rows)}")


def labels_of_adapter(adapter: Adapter) -> tuple[str, ...]:
    """The names of the labels in an adapter's record; empty where it does not say."""
    names = adapter.record.get("labels")
    return tuple(map(str, names)) if isinstance(names, Sequence) and not isinstance(names, str) else ()


def resolve_settings(
    base: Base, values: Mapping[str, Adapter | None], rows: Rows, *, max_length: int | None
) -> dict[str, EncodingSettings]:
    """The setting of each adapter, by label; the base has that of the first adapter beside it.

    Raises:
        AdapterError: the labels of an adapter are not as many as the model's.
        DataError: the base alone has no chat template to put conversations in.
    """
    own = {label: _settings_of_adapter(base, value, max_length) for label, value in values.items() if value is not None}
    first = next(iter(own.values()), None) or _settings_of_base(base, rows, max_length)
    found = {label: own.get(label, first) for label in values}
    if base.task in LABEL_TASKS:
        size = base.model.config.num_labels
        for label, setting in found.items():
            if len(setting.labels) != size:
                told = f"adapter {label!r} has {len(setting.labels)} labels, the model's head {size}"
                raise AdapterError(told, hint="evaluate adapters with other labels apart")
    return found


def _settings_of_adapter(base: Base, adapter: Adapter, max_length: int | None) -> EncodingSettings:
    recorded = (data_of(adapter) or {}).get("max_length")
    style = template_of(adapter) or separator_of(adapter)
    return EncodingSettings(
        style, _resolve_max_length(base, max_length, recorded), labels_of_adapter(adapter) or _labels_of_model(base)
    )


def _settings_of_base(base: Base, rows: Rows, max_length: int | None) -> EncodingSettings:
    """Of a base alone: what stands in the recipe it was trained whole by, else what a recipe would say by default."""
    recorded = _read_recipe_data(base)
    style: PromptStyle = recorded.get("separator", "" if base.task == SEQ2SEQ else DEFAULT_SEPARATOR)
    if isinstance(recorded.get("chat_template"), str):
        style = ChatTemplate(recorded["chat_template"], f"the chat template of {base.name}")
    elif rows.format == "chat":
        style = chat_template(None, base.tokenizer, base=base.name)
    return EncodingSettings(
        style, _resolve_max_length(base, max_length, recorded.get("max_length")), _labels_of_model(base)
    )


def _read_recipe_data(base: Base) -> Mapping[str, Any]:
    path = Path(base.name).expanduser() / RECIPE_FILE
    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(read_text(path, limit=_MAX_RECIPE_BYTES))
    except yaml.YAMLError:
        found = None
    data = found.get("data") if isinstance(found, Mapping) else None
    return data if isinstance(data, Mapping) else {}


def _resolve_max_length(base: Base, wanted: int | None, recorded: Any) -> int:
    own = recorded if isinstance(recorded, int) and recorded > 1 else DEFAULT_MAX_LENGTH
    return min(wanted or own, base.max_length)


def _labels_of_model(base: Base) -> tuple[str, ...]:
    if base.task not in LABEL_TASKS:
        return ()
    names = base.model.config.id2label
    return tuple(str(names[number]) for number in sorted(names))


def encode_rows(base: Base, rows: Rows, setting: EncodingSettings) -> EncodedDataset:
    """The rows as an adapter of this setting saw those of its training.

    Raises:
        DataError: they cannot be put so; names their lines.
    """
    return encode(
        _convert_rows(rows, setting.style),
        base.tokenizer,
        max_length=setting.max_length,
        separator=setting.style if isinstance(setting.style, str) else "",
        template=setting.style if isinstance(setting.style, ChatTemplate) else None,
        label2id={name: number for number, name in enumerate(setting.labels)},
        task=base.task,
    )


def _convert_rows(rows: Rows, style: PromptStyle) -> Rows:
    """Prompts and completions as conversations of one exchange, or the other way round."""
    if isinstance(style, ChatTemplate) and rows.format == "completion":
        told = tuple(((("user", prompt), ("assistant", completion)),) for prompt, completion in rows.values)
        return dataclasses.replace(rows, format="chat", values=told)
    if isinstance(style, str) and rows.format == "chat":
        longer = [
            line
            for line, (messages,) in zip(rows.lines, rows.values, strict=True)
            if [role for role, _ in messages] != ["user", "assistant"]
        ]
        if longer:
            hint = "an adapter that was trained on conversations brings one"
            raise DataError(f"{rows.path}:{longer[0]}: a conversation, and no chat template to put it in", hint=hint)
        values = tuple((messages[0][1], messages[1][1]) for (messages,) in rows.values)
        return dataclasses.replace(rows, format="completion", values=values)
    return rows
