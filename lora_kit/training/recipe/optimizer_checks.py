"""Learning rates, the optimizer and the schedule of a recipe: what a training would reject, found before it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import types
from collections.abc import Iterator, Mapping
from typing import Any, Final, cast

import torch

from lora_kit.config.module_patterns import matches
from lora_kit.errors import ConfigError, RecipeError
from lora_kit.io.text import format_value, shorten
from lora_kit.models.silence import silence_libraries
from lora_kit.training.recipe.coerce import Section

_WITHOUT_ARGUMENTS: Final = ("constant", "constant_with_warmup")
"""Schedules that take no arguments; transformers would ignore them."""
_DEFAULT_OPTIMIZER: Final = "adamw_torch"
_ADAM_FIELDS: Final = ("adam_beta1", "adam_beta2", "adam_epsilon")
_PROBES: Final = ("0.123", "7", "true")
"""Values, one of which changes what transformers makes of an argument, or is an error, if it is read at all."""
_STEPS: Final = 10
"""Steps of the schedule that is tried out."""


def check_learning_rates(train: Section, method: str) -> None:
    """Raise RecipeError for a learning rate of tensors that the method does not train, or that is not above 0."""
    ratio, head = train.get("loraplus_lr_ratio"), train.get("head_learning_rate")
    for pattern, rate in (train.get("learning_rates") or {}).items():
        try:
            matches(pattern, "")
        except ConfigError as error:
            raise RecipeError(f"train.learning_rates: {error.message}", hint=error.hint) from None
        if rate < 0:
            raise RecipeError(f"train.learning_rates {pattern!r} must be 0 or more; {rate} was given")
    if ratio is not None:
        if method != "lora":
            raise RecipeError(f"train.loraplus_lr_ratio is for lora_A and lora_B; method {method} has none")
        if ratio <= 0:
            raise RecipeError(f"train.loraplus_lr_ratio must be above 0; {ratio} was given", hint="16 is a usual value")
    if head is not None:
        if method == "features":
            what = "method features trains the head alone: train.head_learning_rate would be its only rate"
            raise RecipeError(what, hint="train.learning_rate")
        if method == "peft":
            raise RecipeError("train.head_learning_rate is for the methods lora and full; the method is peft")
        if head <= 0:
            hint = "ten times train.learning_rate is a good first try for a new head"
            raise RecipeError(f"train.head_learning_rate must be above 0; {head} was given", hint=hint)


def check_schedule(train: Section) -> None:
    """Raise RecipeError for a schedule that cannot be built with its `lr_scheduler_kwargs`, or ignores them."""
    name, arguments = str(train.get("lr_scheduler_type", "linear")), train.get("lr_scheduler_kwargs")
    if arguments is None and "lr_scheduler_type" not in train:
        return
    if name == "reduce_lr_on_plateau" and train.get("eval_strategy", "no") == "no":
        what = "train.lr_scheduler_type reduce_lr_on_plateau requires an eval strategy"
        raise RecipeError(what, hint="train.eval_strategy: epoch, or steps")
    values = _parse_schedule_arguments(arguments)
    if values and name in _WITHOUT_ARGUMENTS:
        raise RecipeError(f"train.lr_scheduler_kwargs: the schedule {name} takes no arguments", hint="leave them out")
    with _translate_errors("train.lr_scheduler_kwargs"):
        from transformers import get_scheduler

        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=float(train["learning_rate"]))
        get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=_STEPS, scheduler_specific_kwargs=values)


def check_optimizer(train: Section) -> None:
    """Raise RecipeError for an optimizer whose package is missing or whose arguments are invalid."""
    arguments = train.get("optim_args")
    if not any(key in ("optim", "optim_args") or key.startswith("adam_") for key in train):
        return
    for item in [] if arguments is None else str(arguments).split(","):
        if item.count("=") != 1 or not all(part.strip() for part in item.split("=")):
            expected = "train.optim_args must be name=value with commas between"
            raise RecipeError(f"{expected}; {format_value(arguments)} was given", hint="beta1=0.9,beta2=0.95")
    key = "train.optim" if arguments is None else "train.optim_args"
    optimizer, options = _choose_optimizer(train, key)
    with _translate_errors(key):
        if optimizer.__module__.startswith("torch."):
            optimizer([torch.nn.Parameter(torch.zeros(()))], **options)
    _refuse_unread_arguments(train, (optimizer, options))


def _choose_optimizer(train: Section, key: str) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Return the class of optimizer that transformers chooses, and its arguments.

    Raises:
        RecipeError: it chooses none; the message begins with `key`.
    """
    with _translate_errors(key):
        from transformers import Trainer, TrainingArguments
        from transformers.training_args import OptimizerNames

        defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments) if field.init}
        values = {**defaults, "optim": _DEFAULT_OPTIMIZER, **train}
        values["optim"] = OptimizerNames(values["optim"])
        # A stand-in: real TrainingArguments would choose the device of the whole process.
        optimizer, options = Trainer.get_optimizer_cls_and_kwargs(
            cast("TrainingArguments", types.SimpleNamespace(**values))
        )
        return optimizer, dict(options)


def _refuse_unread_arguments(train: Section, chosen: tuple[type[torch.optim.Optimizer], dict[str, object]]) -> None:
    """Raise RecipeError for arguments that change nothing whatever their value: the optimizer does not read them."""
    name, arguments = train.get("optim", _DEFAULT_OPTIMIZER), str(train.get("optim_args") or "")
    items = dict(item.replace(" ", "").split("=") for item in arguments.split(",") if item)
    for key in items:
        others = [",".join(f"{k}={other if k == key else v}" for k, v in items.items()) for other in _PROBES]
        if all(_is_chosen({**train, "optim_args": other}, chosen) for other in others):
            adam = f"adam_{key}" if f"adam_{key}" in _ADAM_FIELDS else ""
            raise RecipeError(
                f"train.optim_args: {name} does not read {key}", hint=f"train.{adam}" if adam else "leave it out"
            )
    for key in (key for key in _ADAM_FIELDS if key in train):
        if _is_chosen({**train, key: float(train[key]) / 2 + 0.1}, chosen):
            raise RecipeError(f"train.{key}: {name} does not read it", hint="leave it out, or choose an Adam")


def _is_chosen(train: Section, chosen: tuple[type[torch.optim.Optimizer], dict[str, object]]) -> bool:
    """Return whether transformers makes the same choice for a section; it does not where that raises an error."""
    try:
        return _choose_optimizer(train, "") == chosen
    except RecipeError:
        return False


def _parse_schedule_arguments(arguments: object) -> dict[str, object]:
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments)
    if arguments is not None and not isinstance(arguments, Mapping):
        raise RecipeError(f"train.lr_scheduler_kwargs must be a mapping; {format_value(arguments)} was given")
    return dict(arguments or {})


@contextlib.contextmanager
def _translate_errors(key: str) -> Iterator[None]:
    """Raise RecipeError for what transformers and torch raise in this block."""
    try:
        with silence_libraries():
            yield
    except Exception as error:  # whatever a schedule or an optimizer makes of wrong arguments
        raise RecipeError(f"{key}: {shorten(error)}") from error
