"""The `train` section of a recipe: fields of transformers.TrainingArguments, with our own defaults."""

from __future__ import annotations

import contextlib
import dataclasses
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch

from lora_kit.errors import ConfigError, RecipeError
from lora_kit.evaluation.metrics import METRICS, validate_metrics
from lora_kit.models.silence import silence_libraries
from lora_kit.training.recipe.coerce import Section, check_known_keys, check_one_of, coerce_value
from lora_kit.training.recipe.objectives import (
    SFT,
    TRL_OBJECTIVES,
    check_objective_keys,
    get_objective_types,
    load_config_class,
)
from lora_kit.training.recipe.train_keys import DEFAULTS, LEARNING_RATES, OWN_FIELDS, SAVE_STRATEGIES, UNSUPPORTED_KEYS

if TYPE_CHECKING:
    from transformers import TrainingArguments

_UNLIMITED: Final = 2**30
_COUNTS: Final = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
_LENGTHS: Final = ("num_train_epochs", "logging_steps", "save_steps", "eval_steps")
_AMOUNTS: Final = ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "dataloader_num_workers")
_SEEDS: Final = ("seed", "data_seed")

_NEWER_NAMES: Final = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Older names of TrainingArguments that recipes may use, and their names in newer versions of transformers."""


def parse_train_section(section: Section, method: str, objective: str = SFT) -> dict[str, object]:
    """Return the `train` section with its defaults, every value converted to its type.

    With an objective of TRL it may also have the keys of that objective's config.

    Raises:
        RecipeError: a key is unknown or cannot be set, or a value is invalid.
    """
    hints = {**get_objective_types(objective), **get_training_argument_types(), **OWN_FIELDS}
    check_objective_keys(objective, section)
    for key in section:
        if key in UNSUPPORTED_KEYS:
            raise RecipeError(f"train.{key} cannot be set", hint=UNSUPPORTED_KEYS[key])
        if key.startswith("hub_"):
            raise RecipeError(f"train.{key} cannot be set", hint="nothing is uploaded")
    check_known_keys(section, [key for key in hints if key not in UNSUPPORTED_KEYS], where="train.")
    values = {key: coerce_value(f"train.{key}", hints[key], value, split_names=False) for key, value in section.items()}
    _check_numbers(values)
    if isinstance(values.get("prefix_cache"), str):
        check_one_of("train.prefix_cache", values["prefix_cache"], ("auto", "off"))
    rate = LEARNING_RATES[method] if objective == SFT else TRL_OBJECTIVES[objective].learning_rate
    defaults = {**DEFAULTS, "learning_rate": rate, "save_strategy": SAVE_STRATEGIES[method]}
    train = {**defaults, **{key: value for key, value in values.items() if value is not None or key not in defaults}}
    best = "loss" if objective == SFT else TRL_OBJECTIVES[objective].best
    return {**_infer_best_model_defaults(train, best), **train}


def _check_numbers(values: Section) -> None:
    """Raise RecipeError for a number that would fail, or have no effect, only after the base is loaded."""
    ranges: tuple[tuple[Sequence[str], Callable[[float], bool], str], ...] = (
        (_COUNTS, lambda number: number >= 1, "1 or more"),
        (_LENGTHS, lambda number: number > 0, "above 0"),
        (_AMOUNTS, lambda number: number >= 0, "0 or more"),
        (_SEEDS, lambda number: 0 <= number < 2**32, "from 0 to below 2^32"),
        (("neftune_noise_alpha",), lambda number: number > 0, "above 0"),
        (
            ("prefix_cache",),
            lambda number: number is False or number > 0,
            "auto, off, or a number of gigabytes above 0",
        ),
        (("ema_decay",), lambda number: 0 < number < 1, "above 0 and below 1"),
        (("max_steps",), lambda number: number >= 1 or number == -1, "1 or more, or -1 to count in epochs"),
        (("label_smoothing_factor",), lambda number: 0 <= number < 1, "from 0 to below 1"),
    )
    for names, is_valid, expected in ranges:
        for name in names:
            value = values.get(name)
            if isinstance(value, (int, float)) and not is_valid(value):
                raise RecipeError(f"train.{name} must be {expected}; {value} was given")


def _infer_best_model_defaults(train: Section, best: str) -> dict[str, object]:
    """Return the settings for keeping the best adapter that the recipe leaves open; none where it is not kept.

    Args:
        best: the metric that counts where the recipe names none.
    """
    keeps_best = bool(train.get("early_stopping_patience") or train.get("metric_for_best_model"))
    if not train.get("load_best_model_at_end", keeps_best):
        return {}
    metric = best_metric_of(train, default=best)
    higher = is_greater_better(metric)
    return {"load_best_model_at_end": True, "metric_for_best_model": metric, "greater_is_better": higher}


def is_greater_better(metric: str) -> bool:
    """Return whether a greater value of a metric is better; False for one that is not known."""
    if metric in METRICS:
        return METRICS[metric].greater_is_better
    return any(objective.metrics.get(metric, False) for objective in TRL_OBJECTIVES.values())


def best_metric_of(train: Section, *, default: str = "loss") -> str:
    """Return the metric by which evaluations are compared."""
    return str(train.get("metric_for_best_model") or default).removeprefix("eval_")


def get_training_argument_types() -> dict[str, object]:
    """Return the fields of transformers.TrainingArguments with their types."""
    with silence_libraries():
        from transformers import TrainingArguments

        hints = typing.get_type_hints(TrainingArguments)
    return {field.name: hints[field.name] for field in dataclasses.fields(TrainingArguments) if field.init}


def check_evaluation(train: Section, validation: object) -> None:
    """Raise RecipeError for evaluations during training without validation rows."""
    keys = [key for key in ("eval_strategy", "eval_on_start") if train.get(key) not in (None, "no", False)]
    if keys and validation is None:
        raise RecipeError(f"train.{keys[0]} is {train[keys[0]]!r}, and there is no data.validation to evaluate on")


def check_best_model_settings(train: Section, task: str, problem: str | None = None, objective: str = SFT) -> None:
    """Raise RecipeError where the best adapter is to be kept and cannot be determined or saved."""
    patience, best = train.get("early_stopping_patience"), train.get("load_best_model_at_end")
    if patience is not None and patience < 1:
        raise RecipeError(f"train.early_stopping_patience must be 1 or more evaluations; {patience} was given")
    if patience and not best:
        raise RecipeError("train.early_stopping_patience keeps the best adapter, but load_best_model_at_end is false")
    metric = best_metric_of(train)
    if objective == SFT:
        try:
            check_best_metric(metric, task, problem)
        except ConfigError as error:
            raise RecipeError(f"train.metric_for_best_model: {error.message}", hint=error.hint) from None
    else:
        _check_objective_metric(train, objective)
    _check_direction(train)
    if train.get("save_strategy") == "best" and not best:
        what = "train.save_strategy is best, but load_best_model_at_end is not true"
        raise RecipeError(what, hint="train.load_best_model_at_end: true")
    if not best:
        return
    for key, purpose in (("eval_strategy", "finding"), ("save_strategy", "keeping")):
        if train.get(key, "no") == "no":
            what = f"train.{key} is no, but {purpose} the best adapter needs it"
            raise RecipeError(what, hint=f"train.{key}: epoch, or steps")


def _check_objective_metric(train: Section, objective: str) -> None:
    """Raise RecipeError for a metric by which adapters of an objective of TRL cannot be compared."""
    spec = TRL_OBJECTIVES[objective]
    names = ("loss", *spec.metrics) if spec.best == "loss" else tuple(spec.metrics)
    check_one_of("train.metric_for_best_model", best_metric_of(train, default=spec.best), names)


def check_best_metric(metric: str, task: str, problem: str | None) -> None:
    """Raise ConfigError for a metric by which no models can be compared."""
    validate_metrics([metric], task, problem)
    if not METRICS[metric].is_one_value:
        raise ConfigError(f"metric {metric!r} is not one number", hint="f1_macro is its mean over the labels")


def _check_direction(train: Section) -> None:
    """Raise RecipeError where `greater_is_better` would keep the worst adapter."""
    metric, greater = best_metric_of(train), train.get("greater_is_better")
    if greater is not None and greater != is_greater_better(metric):
        better = "higher" if is_greater_better(metric) else "lower"
        what = f"train.greater_is_better is {str(greater).lower()}, but a {better} {metric} is better"
        raise RecipeError(what, hint="leave it out: the metric decides")


def check_compilable(train: Section) -> None:
    """Raise RecipeError for gradient checkpointing of compiled layers."""
    key = checkpointing_key_of(train)
    if key:
        raise RecipeError(f"compile and train.{key} do not go together", hint="leave one of them out")


def checkpointing_key_of(train: Section) -> str | None:
    """Return the key that turns gradient checkpointing on; None where it is off."""
    return next((key for key in ("gradient_checkpointing", "activation_checkpointing") if train.get(key)), None)


def check_reporting(train: Section) -> None:
    """Raise RecipeError unless every tracker that `report_to` names is known and installed."""
    value = train["report_to"]
    trackers = [value] if isinstance(value, str) else list(value or [])
    if trackers in ([], ["none"]):
        return
    with silence_libraries():
        from transformers.integrations import get_reporting_integration_callbacks

        for name in trackers:
            try:
                for callback_class in get_reporting_integration_callbacks(name):
                    callback_class()
            except (ValueError, RuntimeError, ImportError) as error:
                hint = "pip install 'lora-kit[tracking]'" if name in ("tensorboard", "wandb", "trackio") else ""
                raise RecipeError(f"train.report_to {name}: {' '.join(str(error).split())}", hint=hint) from None


def build_training_arguments(
    train: Section, *, device: torch.device, folder: str, name: str, objective: str = SFT
) -> TrainingArguments:
    """Return a checked `train` section as transformers.TrainingArguments.

    Args:
        device: the base's.
        folder: the output folder that transformers requires; nothing is written to it.
        name: of the run, for experiment trackers.
        objective: whose class of arguments is returned; `sft` is transformers' own.

    Raises:
        RecipeError: the optimizer does not run on the device.
    """
    from transformers import TrainingArguments

    values, keeps_best = translate_section(train), train.get("load_best_model_at_end", False)
    if "paged" in str(values.get("optim")) and device.type != "cuda":
        # bitsandbytes would silently use states that are not paged.
        raise RecipeError(f"train.optim {values['optim']} needs a CUDA device", hint="adamw_8bit runs on a CPU too")
    # By default transformers hides the progress bar, because its own log is silenced here.
    values = {"disable_tqdm": False, "run_name": name, **values}
    config = TrainingArguments
    if objective != SFT:
        config = load_config_class(objective)
        # No limit of TRL's own: what is too long was found when the rows were encoded.
        defaults = {"max_length": _UNLIMITED, "bf16": False, "gradient_checkpointing": False, "disable_dropout": True}
        names = {field.name for field in dataclasses.fields(config)}
        values = {**{key: value for key, value in defaults.items() if key in names}, **values}
    with warnings.catch_warnings(), translate_argument_errors():
        warnings.simplefilter("ignore", FutureWarning)  # about names that TRL's configs still use
        args = config(
            output_dir=folder,
            use_cpu=device.type == "cpu",
            remove_unused_columns=False,
            label_names=["labels"],
            logging_nan_inf_filter=False,
            **values,
        )
    # With several devices transformers would use DataParallel, which copies the model in every step.
    args._n_gpu = min(args.n_gpu, 1)
    args.load_best_model_at_end = keeps_best
    return args


def translate_section(train: Section) -> dict[str, Any]:
    """Return arguments of transformers.TrainingArguments for a `train` section, except those that are set here."""
    values = {key: value for key, value in train.items() if key not in OWN_FIELDS}
    # Set afterwards: transformers would require checkpoints at evaluations only; here each new best one is saved.
    values.pop("load_best_model_at_end", None)
    for older, newer in _NEWER_NAMES.items():
        if older in values and newer in get_training_argument_types():
            values[newer] = values.pop(older)
    return values


@contextlib.contextmanager
def translate_argument_errors() -> Iterator[None]:
    """Raise RecipeError for what transformers makes of arguments that it does not accept."""
    try:
        yield
    except (ValueError, TypeError, KeyError, NotImplementedError, OSError, ImportError) as error:
        raise RecipeError(f"train: {' '.join(str(error).split())}") from error
