"""A base and a full fine-tune of it: two model folders, mapped into memory and found to be alike."""

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
from lora_kit.models.tasks import CAUSAL_LM, TASK_SPECS, infer_task_from_architecture


@dataclass(frozen=True)
class ModelFolder:
    """A model folder, mapped into memory."""

    name: str
    shards: tuple[Shard, ...]
    head: TaskHead
    outline: MetaModel

    @property
    def state(self) -> dict[str, Tensor]:
        return {key: tensor.detach() for key, tensor in self.outline.model.state_dict(keep_vars=True).items()}

    @property
    def unplaced_tensors(self) -> dict[str, Tensor]:
        """Stored tensors that are not one parameter as they are, by name."""
        placed = set(self.outline.names.values())
        return {name: t for shard in self.shards for name, t in shard.tensors.items() if name not in placed}


def open_model_pair(base: str | Path, tuned: str | Path) -> tuple[ModelFolder, ModelFolder]:
    """A base and a fine-tune of it, found to be alike.

    Raises:
        MergeError: one is quantised, or they are not of one architecture. BaseModelError: one cannot be read.
    """
    folders = find_base(base), find_base(tuned)
    for name, folder in zip((base, tuned), folders, strict=True):
        if read_quantization_config(folder / "config.json") is not None:
            raise MergeError(
                f"{escape_text(name)} is quantised: what it lost hides the difference", hint="the originals"
            )
    head = _read_head(folders[1])
    shards = [read_shards(folder) for folder in folders]
    one, two = (
        ModelFolder(escape_text(name), found, head, build_meta_model(folder, found, head))
        for name, folder, found in zip((base, tuned), folders, shards, strict=True)
    )
    _check_same_architecture(one, two)
    return one, two


def _read_head(folder: Path) -> TaskHead:
    """Which model of its base a fine-tune is, by what its config says."""
    try:
        fields = json.loads((folder / "config.json").read_text("utf-8"))
        architecture = str((fields.get("architectures") or [""])[0])
        labels = fields.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
        names = tuple(str(labels[number]) for number in sorted(labels, key=int))
    except (OSError, ValueError, AttributeError, TypeError, IndexError, RecursionError):
        return TaskHead(TASK_SPECS[CAUSAL_LM].peft_type)  # reading it says what is wrong with it
    task = infer_task_from_architecture(architecture)
    return TaskHead(task.peft_type) if task.is_generative else TaskHead(task.peft_type, len(names), names)


def _check_same_architecture(one: ModelFolder, two: ModelFolder) -> None:
    """Raise MergeError unless both have the same parameters in the same shapes, and everything stored has its place."""
    first, second = one.outline.values, two.outline.values
    if first.keys() != second.keys():
        raise MergeError(
            f"{one.name} and {two.name} are not of one architecture: "
            f"{format_list(sorted(first.keys() ^ second.keys()))}"
        )
    unlike = [
        f"{key} {tuple(first[key].shape)} and {tuple(second[key].shape)}"
        for key in first
        if first[key].shape != second[key].shape and key not in one.outline.missing
    ]
    if unlike:
        raise MergeError(
            f"no adapter changes shapes, and {one.name} and {two.name} have others: {format_list(unlike, most=4)}",
            hint="give the base the vocabulary of the fine-tune first" if "embed" in unlike[0] else "",
        )
    if one.outline.converted != two.outline.converted:
        raise MergeError(
            f"{one.name} and {two.name} store what transformers keeps as one tensor in different forms",
            hint="load one of them with transformers and save it again",
        )
    if two.outline.missing or two.outline.unclaimed:
        lacking = format_list([*two.outline.missing, *two.outline.unclaimed])
        raise MergeError(f"{two.name} does not fill its own model: {lacking}", hint="the fine-tune is not whole")
