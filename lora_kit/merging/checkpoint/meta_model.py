"""A base as transformers would load it, of which nothing is read: its modules, and which stored tensor fills what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lora_kit.adapter.adapter import Adapter
from lora_kit.errors import BaseModelError, MergeError, format_list
from lora_kit.io.text import escape_text
from lora_kit.merging.checkpoint.fused_weights import FusedPiece, FusedWeights
from lora_kit.merging.checkpoint.shards import Shard
from lora_kit.models.locate import translate_load_errors
from lora_kit.models.silence import silence_libraries
from lora_kit.models.tasks import CAUSAL_LM, TASK_SPECS, TaskSpec, find_task_by_peft_type


@dataclass(frozen=True)
class TaskHead:
    """Which model of a base an adapter was made for.

    Attributes:
        task: PEFT's `task_type`.
        num_labels: size of a classification head; None for the base's own.
        labels: what its classes are called, where that is known.
    """

    task: str | None
    num_labels: int | None = None
    labels: tuple[str, ...] = ()

    @classmethod
    def of(cls, adapter: Adapter) -> TaskHead:
        """Raises MergeError for a task there is no class for."""
        task = adapter.config.task_type
        spec = find_task_by_peft_type(task)
        if task is not None and spec is None:
            known = [spec.peft_type for spec in TASK_SPECS.values()]
            raise MergeError(
                f"the adapter was made for {escape_text(task)}, which is not merged",
                hint=f"merged are: {format_list(known)}",
            )
        if spec is None or spec.is_generative:
            return cls(task)
        labels = tuple(map(str, adapter.record.get("labels") or ()))
        sizes = [t.shape[0] for key, t in adapter.saved().items() if key.endswith(".weight") and t.ndim == 2]
        return cls(task, len(labels) or (sizes[-1] if sizes else None), labels)

    @property
    def spec(self) -> TaskSpec:
        """The task; `causal-lm` where the adapter names none."""
        return find_task_by_peft_type(self.task) or TASK_SPECS[CAUSAL_LM]

    @property
    def fields(self) -> dict[str, Any]:
        """What the model's config says of it."""
        if self.labels:
            numbers = dict(enumerate(self.labels))
            return {"id2label": numbers, "label2id": {label: number for number, label in numbers.items()}}
        return {"num_labels": self.num_labels} if self.num_labels else {}


@dataclass(frozen=True)
class MetaModel:
    """A model whose parameters are the stored tensors themselves, mapped from their files.

    Attributes:
        config: transformers' config of it.
        model: what no file holds, or holds in another form, is on the meta device.
        names: of each state dict key that one stored tensor fills as it is, that tensor's name.
        converted: keys that transformers makes of several stored tensors, or of parts of one.
        conversions: how it does, by the first of the keys that are made at once.
        unclaimed: stored tensors that fill nothing, and that transformers does not know as harmless leftovers.
        missing: keys that nothing fills.
        ties: keys that are one parameter, for every such parameter.
        resized: keys of embeddings that an adapter brings with another number of rows.
        declared: keys that are one parameter by the config, whatever the files hold.
    """

    config: Any
    model: nn.Module
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
        """The model's state dict, made once: making it takes longer than what is done with an entry."""
        values: Mapping[str, Tensor] = self.model.state_dict()
        return values

    def find_pieces(self, key: str) -> tuple[FusedPiece, ...] | None:
        """The stored tensors that a parameter is made of, where each is some rows of one of its matrices."""
        conversion = self.conversions.get(key)
        return conversion.find_pieces(self.model) if conversion else None

    def find_tied_keys(self, key: str) -> tuple[str, ...]:
        """Keys of the same parameter, the key itself among them."""
        return next((group for group in self.ties if key in group), (key,))

    def find_declared_ties(self, key: str) -> tuple[str, ...]:
        """Keys that the config ties to this one, the key itself among them."""
        return next((group for group in self.declared_ties if key in group), (key,))


def read_config(folder: Path, head: TaskHead) -> Any:
    """transformers' config of a model folder, with this head."""
    from transformers import AutoConfig

    with silence_libraries(), translate_load_errors(folder):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **head.fields)


def build_empty_model(config: Any, head: TaskHead) -> nn.Module:
    """The model of a config without weights, on the meta device."""
    import transformers

    # An adapter that names no task was made for the class the config names.
    named: list[Any] = [getattr(transformers, str(name), None) for name in config.architectures or ()]
    with silence_libraries(), translate_load_errors(str(config._name_or_path)), torch.device("meta"):
        if head.task is None and isinstance(named[0] if named else None, type):
            model: nn.Module = named[0](config)
        else:
            model = getattr(transformers, head.spec.auto_class).from_config(config)
    return model.eval()


def build_meta_model(
    folder: Path, shards: Sequence[Shard], head: TaskHead, *, saved: Mapping[str, Tensor] | None = None
) -> MetaModel:
    """What transformers would fill with what, were it to load this folder.

    Args:
        saved: tensors that an adapter brings; where its embeddings have other rows than the model's, the model has
            theirs.

    Raises:
        BaseModelError: the config cannot be read, or a tensor has another shape than its place.
        MergeError: only some of the tables of a vocabulary have another size.
    """
    config = read_config(folder, head)
    model = build_empty_model(config, head)
    resized = find_resized_embeddings(model, saved or {})
    if resized:
        config.get_text_config().vocab_size = len((saved or {})[resized[0]])
        model = build_empty_model(config, head)
    stored = {name: tensor for shard in shards for name, tensor in shard.tensors.items()}
    names, conversions, unclaimed = _assign_tensors(model, stored)
    converted = {target for one in conversions.values() for target in one.check(model)}
    places = model.state_dict(keep_vars=True)
    # Of a Conv1D, bitsandbytes quantises the transposed weight.
    turned = {name for key, name in names.items() if stored[name].is_meta and stored[name].shape != places[key].shape}
    stored |= {name: stored[name].mT for name in turned}
    misfits = [
        f"{name} {tuple(stored[name].shape)} for {key} {tuple(places[key].shape)}"
        for key, name in names.items()
        if stored[name].shape != places[key].shape and key not in resized
    ]
    if misfits:
        raise BaseModelError(f"{escape_text(folder)}: the weights do not fit the model: {format_list(misfits, most=3)}")
    groups = _group_tied_keys(model)
    for group in (group for group in groups if not set(group) & set(resized)):
        _fill_parameter(model, group, {key: stored[names[key]] for key in group if key in names})
    filled = {key for group in groups if any(key in names for key in group) for key in group}
    missing = set(places) - filled - converted
    info: Any = SimpleNamespace(missing_keys=missing, unexpected_keys=unclaimed)
    model._adjust_missing_and_unexpected_keys(info)  # type: ignore[operator]  # transformers' own list of leftovers
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


def find_resized_embeddings(model: Any, saved: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Keys of a model's embeddings, where an adapter brings them with another number of rows.

    Raises:
        MergeError: it brings one, and nothing for the other.
    """
    own = model.state_dict()
    modules = {module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None}
    tables = tuple(f"{path}.weight" for path, module in model.named_modules() if module in modules)
    other = [key for key in tables if key in saved and saved[key].shape[1:] == own[key].shape[1:]]
    other = [key for key in other if len(saved[key]) != len(own[key])]
    if not other:
        return ()
    rows = len(saved[other[0]])
    left = [key for key in tables if key not in saved or len(saved[key]) != rows]
    if left:
        raise MergeError(
            f"the adapter brings {other[0]} with {rows:,} rows, and nothing of that size for {format_list(left)}",
            hint="save both with the adapter: modules_to_save with the embedding and the head",
        )
    return tables


def _assign_tensors(
    model: Any, stored: Mapping[str, Tensor]
) -> tuple[dict[str, str], dict[str, FusedWeights], set[str]]:
    """By transformers' own key mapping: the name of each key filled as it is, what it converts, names left over."""
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
            found = conversions.setdefault(key, FusedWeights(key, converter, {}))
            found.sources.setdefault(pattern, {})[name] = stored[name]
        elif key in names:
            raise BaseModelError(f"{escape_text(names[key])} and {escape_text(name)} are both for {key}")
        else:
            names[key] = name
    return names, conversions, leftover


def _group_tied_keys(model: nn.Module) -> list[list[str]]:
    """State dict keys by the tensor they stand for."""
    groups: dict[int, list[str]] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(key)
    return list(groups.values())


def _fill_parameter(model: nn.Module, group: Sequence[str], found: Mapping[str, Tensor]) -> None:
    """Put the stored tensors of one parameter in its places.

    Where several are stored and differ, they are parameters of their own: so transformers loads them too.
    """
    values = list(found.values())
    if not values:
        return
    same = all(torch.equal(values[0], other) for other in values[1:])
    shared = _make_parameter(values[0])
    for key in group:
        value = shared if same or key not in found else _make_parameter(found[key])
        path, _, leaf = key.rpartition(".")
        module = model.get_submodule(path)
        if leaf in module._parameters:
            module._parameters[leaf] = value
        else:
            module._buffers[leaf] = value.data


def _make_parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
