"""A base and a full fine-tune of it: two model folders of one architecture, mapped into memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lora_kit.errors import MergeError, format_list
from lora_kit.io.text import escape_text
from lora_kit.merging.checkpoint.meta_model import MetaModel, TaskHead, build_meta_model
from lora_kit.merging.checkpoint.shards import Shard, read_shards
from lora_kit.merging.preflight import read_quantization_config
from lora_kit.models.locate import find_base
from lora_kit.models.tasks import (
    CAUSAL_LM,
    CLASSIFY,
    SINGLE_LABEL,
    TASK_SPECS,
    find_problem_by_type,
    infer_task_from_architecture,
)


@dataclass(frozen=True)
class ModelFolder:
    """A model folder, mapped into memory.

    Attributes:
        name: what messages call it.
        shards: its weight files.
        head: its task and labels.
        meta: the model that its tensors fill.
    """

    name: str
    shards: tuple[Shard, ...]
    head: TaskHead
    meta: MetaModel

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors of the model, by state dict key."""
        return dict(self.meta.values)

    @property
    def unplaced_tensors(self) -> dict[str, Tensor]:
        """Stored tensors that transformers keeps in another form, by name."""
        placed = set(self.meta.names.values())
        return {name: t for shard in self.shards for name, t in shard.tensors.items() if name not in placed}


def open_model_pair(base: str | Path, tuned: str | Path) -> tuple[ModelFolder, ModelFolder]:
    """Open a base and a fine-tune of it.

    Raises:
        MergeError: one is quantized, or they are not of one architecture.
        BaseModelError: one cannot be read.
    """
    folders = find_base(base), find_base(tuned)
    for name, folder in zip((base, tuned), folders, strict=True):
        if read_quantization_config(folder / "config.json") is not None:
            message = f"{escape_text(name)} is quantized: its rounding errors hide the difference"
            raise MergeError(message, hint="give the unquantized models")
    head = _read_head(folders[1])
    shards = [read_shards(folder) for folder in folders]
    one, two = (
        ModelFolder(escape_text(name), own, head, build_meta_model(folder, own, head))
        for name, folder, own in zip((base, tuned), folders, shards, strict=True)
    )
    _check_same_architecture(one, two)
    return one, two


def _read_head(folder: Path) -> TaskHead:
    """Return the task and labels of a fine-tune, from its config."""
    try:
        fields = json.loads((folder / "config.json").read_text("utf-8"))
        architecture = str((fields.get("architectures") or [""])[0])
        labels = fields.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
        names = tuple(str(labels[number]) for number in sorted(labels, key=int))
    except (OSError, ValueError, AttributeError, TypeError, IndexError, RecursionError):
        return TaskHead(TASK_SPECS[CAUSAL_LM].peft_type)  # reading it says what is wrong with it
    task = infer_task_from_architecture(architecture)
    if task.is_generative:
        return TaskHead(task.peft_type)
    problem = find_problem_by_type(fields.get("problem_type")) if task.name == CLASSIFY else None
    return TaskHead(task.peft_type, len(names), names, problem or (SINGLE_LABEL if task.name == CLASSIFY else None))


def _check_same_architecture(one: ModelFolder, two: ModelFolder) -> None:
    """Raise MergeError unless both have the same parameters in the same shapes, and the fine-tune fills its model."""
    first, second = one.meta.values, two.meta.values
    if first.keys() != second.keys():
        raise MergeError(
            f"{one.name} and {two.name} are not of one architecture: "
            f"{format_list(sorted(first.keys() ^ second.keys()))}"
        )
    unlike = [
        f"{key} {tuple(first[key].shape)} and {tuple(second[key].shape)}"
        for key in first
        if first[key].shape != second[key].shape and key not in one.meta.missing
    ]
    if unlike:
        raise MergeError(
            f"no adapter changes shapes; those of {one.name} and {two.name} differ: {format_list(unlike, most=4)}",
            hint="give the base the vocabulary of the fine-tune first" if "embed" in unlike[0] else "",
        )
    if one.meta.converted != two.meta.converted:
        raise MergeError(
            f"{one.name} and {two.name} store what transformers keeps as one tensor in different forms",
            hint="load one of them with transformers and save it again",
        )
    if two.meta.missing or two.meta.unclaimed:
        lacking = format_list([*two.meta.missing, *two.meta.unclaimed])
        raise MergeError(f"{two.name} does not fill its own model: {lacking}", hint="the fine-tune is incomplete")
