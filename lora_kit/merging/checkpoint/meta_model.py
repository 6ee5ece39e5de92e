"""The meta model of a base: its modules as transformers builds them, and which stored tensor fills each parameter."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_kit.adapter.adapter import Adapter
from lora_kit.errors import BaseModelError, MergeError, format_list
from lora_kit.io.text import escape_text
from lora_kit.merging.checkpoint.fused_weights import FusedPiece, FusedWeights
from lora_kit.merging.checkpoint.shards import Shard
from lora_kit.models.locate import translate_load_errors
from lora_kit.models.silence import silence_libraries
from lora_kit.models.tasks import (
    CAUSAL_LM,
    CLASSIFY,
    PROBLEMS,
    SINGLE_LABEL,
    TASK_SPECS,
    TASKS,
    TaskSpec,
    describe_peft_type,
    find_task_by_peft_type,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class TaskHead:
    """The task of an adapter, and so the class and head of its model.

    Attributes:
        task: PEFT's `task_type`.
        num_labels: size of a classification head; None for the base's own.
        labels: names of its classes; empty where they are not known.
        problem: what a head over whole texts predicts; None for other heads.
    """

    task: str | None
    num_labels: int | None = None
    labels: tuple[str, ...] = ()
    problem: str | None = None

    @classmethod
    def of(cls, adapter: Adapter) -> TaskHead:
        """Raises MergeError for a task there is no class for."""
        task = adapter.config.task_type
        spec = find_task_by_peft_type(task)
        if task is not None and spec is None:
            raise MergeError(
                f"the adapter is for {describe_peft_type(task)}", hint=f"tasks that are merged: {format_list(TASKS)}"
            )
        if spec is None or spec.is_generative:
            return cls(task)
        labels = tuple(map(str, adapter.record.get("labels") or ()))
        sizes = [t.shape[0] for key, t in adapter.saved().items() if key.endswith(".weight") and t.ndim == 2]
        problem = str(adapter.record.get("problem", SINGLE_LABEL)) if spec.name == CLASSIFY else None
        if problem is not None and problem not in PROBLEMS:
            what = f"the adapter's record has the problem {escape_text(problem)}"
            raise MergeError(what, hint=f"known: {format_list(PROBLEMS)}")
        return cls(task, len(labels) or (sizes[-1] if sizes else None), labels, problem)

    @property
    def spec(self) -> TaskSpec:
        """The task; `causal-lm` where the adapter names none."""
        return find_task_by_peft_type(self.task) or TASK_SPECS[CAUSAL_LM]

    @property
    def fields(self) -> dict[str, object]:
        """The fields of the model's config that it sets."""
        if self.labels:
            numbers = dict(enumerate(self.labels))
            return {"id2label": numbers, "label2id": {label: number for number, label in numbers.items()}}
        return {"num_labels": self.num_labels} if self.num_labels else {}

    @property
    def record_fields(self) -> dict[str, object]:
        """What an adapter's record says of it: the labels and the problem, where there are any."""
        labels = {"labels": list(self.labels)} if self.labels else {}
        return {**labels, **({"problem": self.problem} if self.problem else {})}


@dataclass(frozen=True)
class MetaModel:
    """A model whose parameters are the stored tensors themselves, mapped from their files.

    Attributes:
        config: of the model.
        model: parameters that no file holds, or holds in another form, are on the meta device.
        names: for each state dict key that one stored tensor fills as it is, the name of that tensor.
        converted: keys that transformers fuses from several stored tensors, or from parts of one.
        conversions: how it does, by the first of the keys that are filled together.
        unclaimed: stored tensors that fill nothing and that transformers does not know as harmless leftovers.
        missing: keys that nothing fills.
        ties: for every tied parameter, its keys.
        resized_embeddings: keys of embeddings that an adapter replaces with another number of rows.
        declared_ties: keys that the config ties, whatever the files hold.
    """

    config: PretrainedConfig
    model: PreTrainedModel
    names: Mapping[str, str]
    converted: frozenset[str]
    conversions: Mapping[str, FusedWeights]
    unclaimed: tuple[str, ...]
    missing: tuple[str, ...]
    ties: tuple[tuple[str, ...], ...]
    resized_embeddings: tuple[str, ...]
    declared_ties: tuple[tuple[str, ...], ...]

    @cached_property
    def values(self) -> Mapping[str, Tensor]:
        """The model's state dict, cached, since building it takes long."""
        values: Mapping[str, Tensor] = self.model.state_dict()
        return values

    def find_pieces(self, key: str) -> tuple[FusedPiece, ...] | None:
        """Return the stored tensors that a parameter is fused from; None where one is not rows of a matrix of it."""
        conversion = self.conversions.get(key)
        return conversion.find_pieces(self.model) if conversion else None

    def find_tied_keys(self, key: str) -> tuple[str, ...]:
        """Return the keys of the same parameter, with the key itself."""
        return next((group for group in self.ties if key in group), (key,))

    def find_declared_ties(self, key: str) -> tuple[str, ...]:
        """Return the keys that the config ties to this one, with the key itself."""
        return next((group for group in self.declared_ties if key in group), (key,))


def read_config(folder: Path, head: TaskHead) -> PretrainedConfig:
    """Return transformers' config of a model folder, with this head.

    Raises:
        BaseModelError: it cannot be read.
    """
    from transformers import AutoConfig

    with silence_libraries(), translate_load_errors(folder):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **head.fields
        )
    return config


def build_empty_model(config: PretrainedConfig, head: TaskHead) -> PreTrainedModel:
    """Return the model of a config on the meta device, without weights.

    Raises:
        BaseModelError: transformers cannot build it.
    """
    import transformers

    # An adapter that names no task was made for the class that the config names.
    named = [getattr(transformers, str(name), None) for name in config.architectures or ()]
    architecture = named[0] if named else None
    with silence_libraries(), translate_load_errors(str(config._name_or_path)), torch.device("meta"):
        if head.task is None and isinstance(architecture, type):
            model: PreTrainedModel = architecture(config)
        else:
            model = getattr(transformers, head.spec.auto_class).from_config(config)
    model.eval()
    return model


def build_meta_model(
    folder: Path, shards: Sequence[Shard], head: TaskHead, *, saved: Mapping[str, Tensor] | None = None
) -> MetaModel:
    """Return the model that transformers would load from a folder, filled with the mapped tensors.

    Args:
        folder: of the model.
        shards: its weight files.
        head: its task and labels.
        saved: `modules_to_save` of an adapter; embeddings in it with another number of rows resize the model's.

    Raises:
        BaseModelError: the config cannot be read, or a tensor has another shape than its parameter.
        MergeError: the adapter resizes only one of the embeddings.
    """
    config = read_config(folder, head)
    model = build_empty_model(config, head)
    resized = find_resized_embeddings(model, saved or {})
    if resized:
        config.get_text_config().vocab_size = len((saved or {})[resized[0]])
        model = build_empty_model(config, head)
    stored = {name: tensor for shard in shards for name, tensor in shard.tensors.items()}
    names, conversions, unclaimed = _assign_tensors(model, stored)
    converted = {target for one in conversions.values() for target in one.find_filled_keys(model)}
    state = model.state_dict(keep_vars=True)
    # bitsandbytes quantizes the transposed weight of a Conv1D.
    turned = {name for key, name in names.items() if stored[name].is_meta and stored[name].shape != state[key].shape}
    stored |= {name: stored[name].mT for name in turned}
    mismatches = [
        f"{name} {tuple(stored[name].shape)} for {key} {tuple(state[key].shape)}"
        for key, name in names.items()
        if stored[name].shape != state[key].shape and key not in resized
    ]
    if mismatches:
        listed = format_list(mismatches, most=3)
        raise BaseModelError(f"{escape_text(folder)}: the weights do not match the model: {listed}")
    groups = _group_tied_keys(model)
    for group in (group for group in groups if not set(group) & set(resized)):
        _fill_parameter(model, group, {key: stored[names[key]] for key in group if key in names})
    filled = {key for group in groups if any(key in names for key in group) for key in group}
    info: Any = SimpleNamespace(missing_keys=set(state) - filled - converted, unexpected_keys=unclaimed)
    model._adjust_missing_and_unexpected_keys(info)  # drops the leftovers that transformers knows as harmless
    return MetaModel(
        config=config,
        model=model,
        names=names,
        converted=frozenset(converted),
        conversions=conversions,
        unclaimed=tuple(sorted(info.unexpected_keys)),
        missing=tuple(sorted(info.missing_keys)),
        ties=tuple(tuple(group) for group in _group_tied_keys(model) if len(group) > 1),
        resized_embeddings=resized,
        declared_ties=tuple(tuple(group) for group in groups if len(group) > 1),
    )


def find_resized_embeddings(model: PreTrainedModel, saved: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the keys of a model's embeddings if an adapter replaces them with another number of rows, else none.

    Raises:
        MergeError: it replaces one of them only.
    """
    own = model.state_dict()
    modules = _find_embeddings(model)
    tables = tuple(
        key for path, module in model.named_modules() if module in modules and (key := f"{path}.weight") in own
    )
    replaced = [key for key in tables if key in saved and saved[key].shape[1:] == own[key].shape[1:]]
    resized = [key for key in replaced if len(saved[key]) != len(own[key])]
    if not resized:
        return ()
    rows = len(saved[resized[0]])
    others = [key for key in tables if key not in saved or len(saved[key]) != rows]
    if others:
        raise MergeError(
            f"the adapter brings {resized[0]} with {rows:,} rows, and nothing of that size for {format_list(others)}",
            hint="put the embedding and the head into the adapter's modules_to_save",
        )
    return tables


def _find_embeddings(model: PreTrainedModel) -> list[nn.Module]:
    """Return the input and the output embedding of a model, those that it has."""
    modules = []
    for find in (model.get_input_embeddings, model.get_output_embeddings):
        with contextlib.suppress(NotImplementedError):  # a model of images or of sound
            modules.append(find())
    return [module for module in modules if module is not None]


def _assign_tensors(
    model: PreTrainedModel, stored: Mapping[str, Tensor]
) -> tuple[dict[str, str], dict[str, FusedWeights], set[str]]:
    """Assign stored tensors to state dict keys, by transformers' own key mapping.

    Returns:
        The name of the tensor that fills each key as it is; the conversions; and the names that are left over.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    renamings: list[Any] = [entry for entry in transforms if not isinstance(entry, WeightConverter)]
    keys, prefix = model.state_dict(), model.base_model_prefix
    names: dict[str, str] = {}
    conversions: dict[str, FusedWeights] = {}
    leftover: set[str] = set()
    for name in sorted(stored, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, keys)
        if key not in keys and name in keys:
            key, pattern = rename_source_key(name, [], [], prefix, keys)
        if key not in keys:
            leftover.add(name)
        elif pattern is not None:
            converter = next(entry for entry in converters if pattern in entry.source_patterns)
            fused = conversions.setdefault(key, FusedWeights(key, converter, {}))
            fused.sources.setdefault(pattern, {})[name] = stored[name]
        elif key in names:
            raise BaseModelError(f"{escape_text(names[key])} and {escape_text(name)} both fill {key}")
        else:
            names[key] = name
    return names, conversions, leftover


def _group_tied_keys(model: nn.Module) -> list[list[str]]:
    """Return the state dict keys of a model, grouped by parameter."""
    groups: dict[int, list[str]] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(key)
    return list(groups.values())


def _fill_parameter(model: nn.Module, keys: Sequence[str], stored: Mapping[str, Tensor]) -> None:
    """Fill a parameter that has several keys from the tensors that are stored for them.

    Where these differ, each becomes a parameter of its own, as transformers loads them.
    """
    values = list(stored.values())
    if not values:
        return
    same = all(torch.equal(values[0], other) for other in values[1:])
    shared = _make_parameter(values[0])
    for key in keys:
        value = shared if same or key not in stored else _make_parameter(stored[key])
        path, _, leaf = key.rpartition(".")
        module = model.get_submodule(path)
        if leaf in module._parameters:
            module._parameters[leaf] = value
        else:
            module._buffers[leaf] = value.data


def _make_parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
