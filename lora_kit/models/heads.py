"""The head of a model: which modules it consists of, and whether the checkpoint has them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from lora_kit.errors import BaseModelError, format_list
from lora_kit.models.tasks import LABEL_TASKS, infer_task_from_architecture
from lora_kit.targets.match import HEAD_NAMES

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

_UNNAMED: Final = "LABEL_"
"""How transformers names the labels of a head to which nobody gave names: LABEL_0, LABEL_1, …"""
_INITIALIZER_RANGE: Final = 0.02
"""Standard deviation of a new head's weights, where the config has none."""


_POOLER: Final = "pooler"

# Labels


def list_head_labels(config: PretrainedConfig) -> tuple[str, ...]:
    """Return the labels of a model's head in the order of its classes."""
    names = {int(number): str(name) for number, name in (config.id2label or {}).items()}
    return tuple(names[number] for number in sorted(names))


def list_checkpoint_labels(config: PretrainedConfig, task: str) -> tuple[str, ...]:
    """Return the labels of a checkpoint's head in the order of its classes; empty if it has no head for the task."""
    architectures = config.architectures or []
    has_head = any(infer_task_from_architecture(name).name == task for name in architectures)
    return list_head_labels(config) if has_head and task in LABEL_TASKS else ()


def name_head_labels(head: Sequence[str], names: Collection[str]) -> tuple[str, ...]:
    """Return the labels of a head as rows write them: `0` for `LABEL_0` where all labels of the rows are numbers.

    Args:
        head: the labels of the head in the order of its classes.
        names: the labels of the rows.
    """
    return tuple(map(str, range(len(head))) if _is_unnamed(head) and all(map(str.isdecimal, names)) else head)


def order_labels(names: Sequence[str], head: Sequence[str]) -> tuple[str, ...]:
    """Return labels in the order of their classes: all those of a head that knows every name, else the names.

    Args:
        names: the labels of the training rows, sorted.
        head: the labels of the base's head in the order of its classes; empty without a head.
    """
    known = name_head_labels(head, names)
    return known if set(names) <= set(known) else tuple(names)


def _is_unnamed(head: Sequence[str]) -> bool:
    return list(head) == [f"{_UNNAMED}{number}" for number in range(len(head))]


def reason_new_head(head: Sequence[str], labels: Sequence[str]) -> str | None:
    """Return why a checkpoint's head cannot be used for labels; None if it can, or if there is no head.

    A head whose labels have no names is used for as many labels of any name.

    Args:
        head: the labels of the checkpoint's head in the order of its classes; empty without a head.
        labels: the labels of the model in the order of its classes.
    """
    if not head or list(head) == list(labels) or (_is_unnamed(head) and len(head) == len(labels)):
        return None
    order = " in another order" if set(head) == set(labels) else ""
    return f"its labels are {format_list(head)}{order}, not {format_list(labels)}"


def reason_figures_of_no_use(head: Sequence[str], labels: Sequence[str]) -> str | None:
    """Return why the answers of a base's own head cannot be compared with labels; None where they can.

    Args:
        head: the labels of the head in the order of its classes; empty without a head.
        labels: those that its classes are taken for, in their order.
    """
    if not head:
        return "it has no head for this task, so a new one with random weights answers"
    if _is_unnamed(head) and len(head) == len(labels) and not all(map(str.isdecimal, labels)):
        return f"its head names no labels, and {head[0]} is taken for {labels[0]}, {head[-1]} for {labels[-1]}"
    return None


def describe_head(head: Sequence[str], labels: Sequence[str]) -> str:
    """Return what becomes of a checkpoint's head in a training, in words; arguments as in `reason_new_head`."""
    if not head:
        return "new: the base has none for this task"
    reason = reason_new_head(head, labels)
    return f"new: the base has one, but {reason}" if reason else f"of the base, with the labels {format_list(labels)}"


def renew_label_layer(model: PreTrainedModel, task: str) -> None:
    """Give the layer that predicts the labels new random weights and a bias of zero; what precedes it stays.

    Weights are normal with the `initializer_range` of the model's config, drawn from torch's random numbers.
    """
    _, layer = find_label_layer(model, task)
    std = getattr(model.config.get_text_config(), "initializer_range", _INITIALIZER_RANGE)
    with torch.no_grad():
        nn.init.normal_(layer.weight, std=std)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def find_label_layer(model: PreTrainedModel, task: str) -> tuple[str, nn.Linear]:
    """Return the path of the layer that predicts the labels, and the layer.

    Raises:
        BaseModelError: there is no linear layer with as many outputs as the model has labels, or it is quantized.
    """
    layers = [
        (f"{path}.{inner}".rstrip("."), module)
        for path in find_head_modules(model, task)
        for inner, module in model.get_submodule(path).named_modules()
        if isinstance(module, nn.Linear) and module.out_features == model.config.num_labels
    ]
    if not layers or not layers[-1][1].weight.is_floating_point():
        raise BaseModelError(f"{type(model).__name__}: the layer that predicts the labels cannot be replaced")
    return layers[-1]


def widen_label_layer(layer: nn.Linear, width: int) -> None:
    """Give a layer that predicts labels more outputs, which are 0 for every text."""
    with torch.no_grad():
        layer.weight = nn.Parameter(pad_rows(layer.weight, width), requires_grad=layer.weight.requires_grad)
        if layer.bias is not None:
            layer.bias = nn.Parameter(pad_rows(layer.bias, width), requires_grad=layer.bias.requires_grad)
    layer.out_features = width


def pad_rows(tensor: Tensor, count: int) -> Tensor:
    """Return a tensor whose first axis has `count` entries: its own, then zeros."""
    return torch.cat([tensor.detach(), tensor.new_zeros(count - len(tensor), *tensor.shape[1:])])


# Modules


def check_loading_info(
    source: str, task: str, info: Mapping[str, Any], *, labels: Sequence[str] = ()
) -> tuple[str, ...]:
    """Reject a model that the checkpoint fills only in part. A new classification head is accepted, and logged.

    Returns:
        The paths of new modules that belong to the head but stand in the body: the pooler of a masked language model.

    Args:
        source: of the model, for messages.
        task: of the model.
        info: what `from_pretrained` returns with `output_loading_info`.
        labels: the names that the caller gave the labels: a head of another size is then replaced by a new one.

    Raises:
        BaseModelError: weights are missing, have another shape, or could not be loaded.
    """
    missing = sorted(info["missing_keys"])
    mismatched = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"])
    head = [key for key in [*missing, *(mismatched if labels else [])] if _is_in_head(key, task)]
    absent = [key for key in missing if key not in head]
    mismatched = [key for key in mismatched if key not in head]
    if absent or mismatched or info["error_msgs"]:
        details = format_list(mismatched) if mismatched else " ".join(map(str, info["error_msgs"]))
        problem = f"{format_list(absent)} missing" if absent else f"{details} of another shape"
        resized = mismatched and task in LABEL_TASKS
        hint = "num_labels differs from the checkpoint's head" if resized else "the checkpoint is incomplete"
        raise BaseModelError(f"{source}: the weights do not fill the model: {problem}", hint=hint)
    if head:
        logger.info("%s: new head, not in the checkpoint: %s", source, format_list(head))
    return tuple(dict.fromkeys(".".join(key.split(".")[:2]) for key in head if _is_in_pooler(key)))


def _is_in_head(key: str, task: str) -> bool:
    return task in LABEL_TASKS and (key.split(".")[0] in HEAD_NAMES or _is_in_pooler(key))


def _is_in_pooler(key: str) -> bool:
    """Return whether a key belongs to the layer of an encoder that only its head reads: `bert.pooler.dense.weight`."""
    return key.split(".")[1:2] == [_POOLER]


def find_head_modules(model: PreTrainedModel, task: str) -> tuple[str, ...]:
    """Return the paths of the modules of the model's head. Feature extraction trains these.

    Raises:
        BaseModelError: the model has no known head.
    """
    if task in LABEL_TASKS:
        children = ((name, child) for name, child in model.named_children() if name in HEAD_NAMES)
        paths = tuple(name for name, child in children if any(True for _ in child.parameters()))
    else:
        output = model.get_output_embeddings()
        paths = tuple(name for name, module in model.named_modules() if output is not None and module is output)[:1]
    if not paths:
        raise BaseModelError(
            f"{type(model).__name__} has no head that is known", hint="name it in lora.modules_to_save"
        )
    return paths
