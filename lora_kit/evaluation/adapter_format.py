"""The sample format of an adapter: how the rows of its training became samples."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.use_record import find_recorded_data
from lora_kit.data.label_problem import resolve_problem
from lora_kit.data.layouts import FORMATS
from lora_kit.data.messages import ALL, LEARN
from lora_kit.data.mixture import has_text_pairs
from lora_kit.data.preferences import describe_use
from lora_kit.data.rows import Rows
from lora_kit.data.sample_format import DEFAULT_MAX_LENGTH, PromptStyle, SampleFormat
from lora_kit.data.templates import ChatTemplate, chat_template
from lora_kit.errors import AdapterError, DataError, format_list
from lora_kit.generation.prompts import build_recorded_template, find_adapter_style, find_training_data
from lora_kit.io.text import format_value
from lora_kit.models.checkpoint_head import find_checkpoint_problem
from lora_kit.models.heads import list_head_labels, name_head_labels
from lora_kit.models.loading import Base
from lora_kit.models.prompt_tokens import DEFAULT_SEPARATOR
from lora_kit.models.tasks import CLASSIFY, LABEL_TASKS, PROBLEMS, SEQ2SEQ, SINGLE_LABEL

logger = logging.getLogger(__name__)


def find_task(rows: Rows) -> str:
    """Return the task that rows are for, if nothing else decides it.

    Raises:
        DataError: the rows are preferences.
    """
    task = next((task for task, formats in FORMATS.items() if rows.format in formats), None)
    if task is None:
        raise DataError(
            f"{rows.path} has rows of the format {rows.format}, which are measured in training only",
            hint=describe_use(rows.format),
        )
    return task


def check_format(rows: Rows, task: str) -> None:
    """Raise DataError unless the task takes rows of this format."""
    if rows.format not in FORMATS[task]:
        message = f"{rows.path} has rows of the format {rows.format}; task {task} takes {format_list(FORMATS[task])}"
        raise DataError(message, hint=f"they are for an adapter of task {find_task(rows)}")


def find_adapter_labels(adapter: Adapter) -> tuple[str, ...]:
    """Return the names of the labels in an adapter's record; empty if it has none."""
    names = adapter.record.get("labels")
    return tuple(map(str, names)) if isinstance(names, Sequence) and not isinstance(names, str) else ()


def find_adapter_problem(adapter: Adapter) -> str | None:
    """Return what an adapter was trained to predict of a whole text; None where its record does not say.

    Raises:
        AdapterError: the record says something else.
    """
    problem = adapter.record.get("problem", SINGLE_LABEL if find_adapter_labels(adapter) else None)
    if problem is not None and problem not in PROBLEMS:
        what = f"the adapter's record has the problem {format_value(problem)}"
        raise AdapterError(what, hint=f"known: {format_list(PROBLEMS)}")
    return problem


def check_inputs(base: Base, label: str, adapter: Adapter | None, *, are_pairs: bool) -> None:
    """Check that an adapter, or a base alone, is given what it was trained on: texts, or pairs of texts.

    Not every record says it.

    Raises:
        DataError: it was trained on the other.
    """
    trained = (base if adapter is None else adapter).record.get("text_pairs")
    if trained in (None, are_pairs):
        return
    if are_pairs:
        what, hint = "single texts, and two texts were given", "leave out the second one"
    else:
        what, hint = "pairs of texts, and one text was given", "--text-pair gives the second one, or a column text_pair"
    name = base.name if adapter is None else f"adapter {label!r}"
    raise DataError(f"{name} was trained on {what}", hint=hint)


def find_thresholds(record: Mapping[str, object], labels: Sequence[str]) -> tuple[float, ...]:
    """Return the thresholds in a record, one for each label; empty for 0.5.

    Raises:
        AdapterError: they are not numbers, one for each label.
    """
    values = record.get("thresholds") or []
    if not isinstance(values, list):
        raise AdapterError(f"the record has the thresholds {format_value(values)}", hint="a list of numbers")
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if values and (len(numbers) != len(values) or len(numbers) != len(labels)):
        what = f"the record has {len(values)} thresholds for {len(labels)} labels"
        raise AdapterError(what, hint="one number for each label is expected")
    return tuple(map(float, numbers))


def resolve_eval_problem(base: str | Base, adapters: Mapping[str, Adapter | None], rows: Rows) -> str:
    """Return what is predicted of whole texts: what the adapters were trained for, else what the base's head says.

    Where neither says it, the labels of the rows do.

    Raises:
        AdapterError: the adapters were trained for different problems.
    """
    problems: dict[str, str] = {}
    for label, adapter in adapters.items():
        problem = None if adapter is None else find_adapter_problem(adapter)
        if problem is not None:
            problems.setdefault(problem, label)
    if len(problems) > 1:
        listed = ", ".join(f"{label!r} for {problem}" for problem, label in problems.items())
        raise AdapterError(f"adapters of different problems: {listed}", hint="use adapters of one problem")
    if problems:
        return next(iter(problems))
    own = base.problem if isinstance(base, Base) else find_checkpoint_problem(base)
    return own or resolve_problem(rows, None)


def resolve_sample_formats(
    base: Base,
    adapters: Mapping[str, Adapter | None],
    rows: Rows,
    *,
    max_length: int | None,
    problem: str | None = None,
) -> dict[str, SampleFormat]:
    """Return the sample format of each adapter; the base has that of the first adapter beside it.

    Where the base's own head has the labels of that adapter, the base's rows have them in the order of its head.

    Args:
        adapters: by label; None for the base.
        max_length: most tokens of a sample; None for what each adapter was trained with.
        problem: what is predicted of whole texts; None for other tasks.

    Raises:
        AdapterError: an adapter has more or fewer labels than the model's head.
        DataError: the rows are conversations, and the base, which is alone, has no chat template; or they have two
            texts each, and an adapter was trained on single ones, or the other way round.
    """
    own = {
        label: _find_adapter_format(base, adapter, max_length)
        for label, adapter in adapters.items()
        if adapter is not None
    }
    default = next(iter(own.values()), None) or _find_base_format(base, rows, max_length)
    learn, problem = find_learn(adapters), problem or SINGLE_LABEL
    formats = {
        label: dataclasses.replace(own.get(label, _use_head_order(base, default)), learn=learn, problem=problem)
        for label in adapters
    }
    if base.task == CLASSIFY:
        for label, adapter in adapters.items():
            if adapter is not None or len(adapters) == 1:  # beside adapters the base gets what they get
                check_inputs(base, label, adapter, are_pairs=has_text_pairs(rows))
    if base.task in LABEL_TASKS:
        size = base.model.config.num_labels
        for label, sample_format in formats.items():
            if len(sample_format.labels) != size:
                message = f"adapter {label!r} has {len(sample_format.labels)} labels, the model's head {size}"
                raise AdapterError(message, hint="evaluate adapters with other labels separately")
    return formats


def build_prediction_format(
    base: Base, adapter: Adapter | None, *, max_length: int | None, problem: str | None
) -> SampleFormat:
    """Return how texts are put to an adapter, as in its training, or to the base's own head.

    Raises:
        AdapterError: the adapter has more or fewer labels than the model's head.
    """
    if adapter is None:
        length = _resolve_max_length(base, max_length, _find_base_data(base).get("max_length"))
        found = _build_format(base, "", length, _find_model_labels(base))
    else:
        found = _find_adapter_format(base, adapter, max_length)
    size = base.model.config.num_labels
    if len(found.labels) != size:
        raise AdapterError(f"the adapter has {len(found.labels)} labels, the model's head {size}")
    return dataclasses.replace(found, problem=problem or SINGLE_LABEL)


def find_learn(adapters: Mapping[str, Adapter | None]) -> str:
    """Return which answers of conversations are measured: those that the first adapter was to learn, else all."""
    records = [find_training_data(adapter) or {} for adapter in adapters.values() if adapter is not None]
    learn = records[0].get("learn") if records else None
    return learn if isinstance(learn, str) and learn in LEARN else ALL


def _use_head_order(base: Base, sample_format: SampleFormat) -> SampleFormat:
    """Return the format with its labels in the order of the base's head, if it has the same labels."""
    labels = _find_model_labels(base)
    if set(labels) != set(sample_format.label2id):
        return sample_format
    return dataclasses.replace(sample_format, label2id={name: number for number, name in enumerate(labels)})


def _find_adapter_format(base: Base, adapter: Adapter, max_length: int | None) -> SampleFormat:
    recorded = (find_training_data(adapter) or {}).get("max_length")
    labels = find_adapter_labels(adapter) or _find_model_labels(base)
    length = _resolve_max_length(base, max_length, recorded)
    return _build_format(base, find_adapter_style(adapter), length, labels)


def _find_base_format(base: Base, rows: Rows, max_length: int | None) -> SampleFormat:
    """Return the format of a base alone: that of its training, where its folder says it, else the default one."""
    recorded = _find_base_data(base)
    separator = recorded.get("separator")
    template = build_recorded_template(recorded, f"the chat template of {base.name}")
    style: PromptStyle = "" if base.task == SEQ2SEQ else DEFAULT_SEPARATOR
    if template is not None:
        style = template
    elif rows.format == "chat":
        style = chat_template(None, base.tokenizer, base=base.name)
    elif isinstance(separator, str):
        style = separator
    length = _resolve_max_length(base, max_length, recorded.get("max_length"))
    names = {str(label) for labels in rows.labels for label in labels}
    return _build_format(base, style, length, name_head_labels(_find_model_labels(base), names))


def _build_format(base: Base, style: PromptStyle, max_length: int, labels: Sequence[str]) -> SampleFormat:
    return SampleFormat(
        max_length=max_length,
        separator=style if isinstance(style, str) else "",
        template=style if isinstance(style, ChatTemplate) else None,
        label2id={name: number for number, name in enumerate(labels)},
        task=base.task,
    )


def _find_base_data(base: Base) -> Mapping[str, object]:
    return find_recorded_data(base.record) or {}


def _resolve_max_length(base: Base, requested: int | None, recorded: object) -> int:
    own = recorded if isinstance(recorded, int) and recorded > 1 else DEFAULT_MAX_LENGTH
    return min(requested or own, base.max_length)


def _find_model_labels(base: Base) -> tuple[str, ...]:
    if base.task not in LABEL_TASKS:
        return ()
    return list_head_labels(base.model.config)
