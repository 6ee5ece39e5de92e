"""The `train` section of a recipe: names of transformers.TrainingArguments, with defaults of our own."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import torch

from lora_kit.errors import ConfigError, RecipeError
from lora_kit.evaluation.metrics import METRICS, validate_metrics
from lora_kit.models.silence import silence_libraries
from lora_kit.training.recipe.coerce import check_known_keys, coerce_value

if TYPE_CHECKING:
    from transformers import TrainingArguments

DEFAULTS: Final[Mapping[str, Any]] = {"logging_steps": 10, "report_to": "none", "save_total_limit": 2, "seed": 0}
"""What `train` holds where a recipe says nothing and transformers' own default is not wanted."""
SAVE_STRATEGIES: Final[Mapping[str, str]] = {"lora": "steps", "features": "steps", "full": "no", "peft": "steps"}
"""When checkpoints are written: those of `full` hold every weight three times."""
LEARNING_RATES: Final[Mapping[str, float]] = {"lora": 2e-4, "features": 1e-3, "full": 5e-5, "peft": 1e-3}

OWN_FIELDS: Final[Mapping[str, Any]] = {
    "early_stopping_patience": int,
    "loraplus_lr_ratio": float,
    "head_learning_rate": float,
}
"""What `train` may hold besides names of transformers.TrainingArguments."""

_COUNTS: Final = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
_LENGTHS: Final = ("num_train_epochs", "logging_steps", "save_steps", "eval_steps")
_AMOUNTS: Final = ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "dataloader_num_workers")
_SEEDS: Final = ("seed", "data_seed")

_CHECKPOINTS: Final = "a checkpoint holds all it takes to go on, and the same recipe goes on from it by itself"
_ONE_DEVICE: Final = "training runs on one device so far"
_COMPILE: Final = "the recipe's `compile: true` compiles the base's layers"
_OURS: Final = "this is decided by what is trained on what"
_UNSUPPORTED_KEYS: Final[Mapping[str, str]] = {
    "output_dir": "the output is the recipe's `out`",
    "do_train": _OURS,
    "do_eval": _OURS,
    "do_predict": _OURS,
    "use_cpu": "the base's device decides",
    "remove_unused_columns": _OURS,
    "label_names": _OURS,
    "prediction_loss_only": "logits are never kept",
    "include_for_metrics": "logits are never kept",
    "batch_eval_metrics": "logits are never kept",
    "eval_accumulation_steps": "logits are never kept",
    "eval_do_concat_batches": "logits are never kept",
    "logging_nan_inf_filter": "a loss that is not finite is an error",
    "use_cache": _OURS,
    "save_only_model": _CHECKPOINTS,
    "save_on_each_node": _ONE_DEVICE,
    "resume_from_checkpoint": _CHECKPOINTS,
    "ignore_data_skip": _CHECKPOINTS,
    "restore_callback_states_from_checkpoint": _CHECKPOINTS,
    "enable_jit_checkpoint": _CHECKPOINTS,
    "auto_find_batch_size": "the micro-batch halves by itself where memory runs out",
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "use_liger_kernel": "it replaces parts of the base, which stays as it is",
    "liger_kernel_config": "it replaces parts of the base, which stays as it is",
    "neftune_noise_alpha": "it is not there yet",
    "push_to_hub": "nothing is sent anywhere",
    "deepspeed": _ONE_DEVICE,
    "fsdp": _ONE_DEVICE,
    "fsdp_config": _ONE_DEVICE,
    "parallelism_config": _ONE_DEVICE,
    "local_rank": _ONE_DEVICE,
    "full_determinism": "a run on one machine always repeats bit for bit",
}
"""Names of transformers.TrainingArguments that a recipe cannot set, and why."""

_NEWER_NAMES: Final = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Older names of TrainingArguments that recipes may use, and what newer versions of transformers call them."""


def parse_train_section(given: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The `train` section with its defaults, every value of its type."""
    hints = {**get_training_argument_types(), **OWN_FIELDS}
    for key in given:
        if key in _UNSUPPORTED_KEYS:
            raise RecipeError(f"train.{key} cannot be set", hint=_UNSUPPORTED_KEYS[key])
        if key.startswith("hub_"):
            raise RecipeError(f"train.{key} cannot be set", hint="nothing is sent anywhere")
    check_known_keys(given, [key for key in hints if key not in _UNSUPPORTED_KEYS], where="train.")
    values = {key: coerce_value(f"train.{key}", hints[key], value) for key, value in given.items()}
    _check_numbers(values)
    defaults = {**DEFAULTS, "learning_rate": LEARNING_RATES[method], "save_strategy": SAVE_STRATEGIES[method]}
    found = {**defaults, **{key: value for key, value in values.items() if value is not None or key not in defaults}}
    return {**_infer_best_model_defaults(found), **found}


def _check_numbers(values: Mapping[str, Any]) -> None:
    """Raise RecipeError for a number that training would fail on, or do nothing with, after the base was loaded."""
    wanted = (
        (_COUNTS, lambda number: number >= 1, "1 or more"),
        (_LENGTHS, lambda number: number > 0, "above 0"),
        (_AMOUNTS, lambda number: number >= 0, "0 or more"),
        (_SEEDS, lambda number: 0 <= number < 2**32, "from 0 to below 2^32"),
        (("max_steps",), lambda number: number, "1 or more, or -1 to count in epochs"),
    )
    for names, holds, expected in wanted:
        for name in names:
            value = values.get(name)
            if isinstance(value, (int, float)) and not holds(value):
                raise RecipeError(f"train.{name} must be {expected}; {value} was given")


def _infer_best_model_defaults(train: Mapping[str, Any]) -> dict[str, Any]:
    """What keeping the best adapter means where the recipe leaves it open."""
    wanted = bool(train.get("early_stopping_patience") or train.get("metric_for_best_model"))
    if not train.get("load_best_model_at_end", wanted):
        return {}
    metric = best_metric_of(train)
    higher = metric in METRICS and METRICS[metric].greater_is_better
    return {"load_best_model_at_end": True, "metric_for_best_model": metric, "greater_is_better": higher}


def best_metric_of(train: Mapping[str, Any]) -> str:
    """The metric by which an evaluation is better than another."""
    return str(train.get("metric_for_best_model") or "loss").removeprefix("eval_")


def get_training_argument_types() -> dict[str, Any]:
    """The names of transformers.TrainingArguments with their types."""
    with silence_libraries():
        from transformers import TrainingArguments

        hints = typing.get_type_hints(TrainingArguments)
    return {f.name: hints[f.name] for f in dataclasses.fields(TrainingArguments) if f.init}


def check_evaluation(train: Mapping[str, Any], validation: str | None) -> None:
    asked = [key for key in ("eval_strategy", "eval_on_start") if train.get(key) not in (None, "no", False)]
    if asked and validation is None:
        raise RecipeError(f"train.{asked[0]} is {train[asked[0]]!r}, and there is no data.validation to evaluate on")


def check_best_model_settings(train: Mapping[str, Any], task: str) -> None:
    """Whether the best adapter can be told, where it is to be kept."""
    patience, best = train.get("early_stopping_patience"), train.get("load_best_model_at_end")
    if patience is not None and patience < 1:
        raise RecipeError(f"train.early_stopping_patience counts evaluations from 1; {patience} was given")
    if patience and not best:
        raise RecipeError("train.early_stopping_patience keeps the best adapter; load_best_model_at_end is false")
    try:
        validate_metrics([best_metric_of(train)], task)
    except ConfigError as error:
        raise RecipeError(f"train.metric_for_best_model: {error.message}", hint=error.hint) from None
    if not best:
        return
    for key, why in (
        ("eval_strategy", "the best adapter is told by"),
        ("save_strategy", "the best adapter is kept by"),
    ):
        if train.get(key, "no") == "no":
            raise RecipeError(f"train.{key} is no, and {why} it", hint=f"train.{key}: epoch, or steps")


def check_learning_rates(train: Mapping[str, Any], method: str) -> None:
    """Whether what has a learning rate of its own is there to have one."""
    ratio, head = train.get("loraplus_lr_ratio"), train.get("head_learning_rate")
    if ratio is not None:
        if method != "lora":
            raise RecipeError(f"train.loraplus_lr_ratio is a matter of A and B; method {method} has none")
        if ratio <= 0:
            raise RecipeError(f"train.loraplus_lr_ratio must be above 0; {ratio} was given", hint="16 is a usual value")
    if head is not None:
        if method == "features":
            raise RecipeError(
                "method features trains the head alone: train.head_learning_rate would be its only rate",
                hint="train.learning_rate",
            )
        if method == "peft":
            raise RecipeError("train.head_learning_rate is for the methods lora and full; the method is peft")
        if head <= 0:
            hint = "ten times train.learning_rate is a good first try for a new head"
            raise RecipeError(f"train.head_learning_rate must be above 0; {head} was given", hint=hint)


def check_compilable(train: Mapping[str, Any]) -> None:
    asked = [key for key in ("gradient_checkpointing", "activation_checkpointing") if train.get(key)]
    if asked:
        raise RecipeError(f"compile and train.{asked[0]} do not go together", hint="leave one of them out")


def check_reporting(train: Mapping[str, Any]) -> None:
    """Whether what `report_to` names is known and installed.

    Raises:
        RecipeError: it is not.
    """
    given = train["report_to"]
    asked = [given] if isinstance(given, str) else list(given or [])
    if asked in ([], ["none"]):
        return
    with silence_libraries():
        from transformers.integrations import get_reporting_integration_callbacks

        for name in asked:
            try:
                for make in get_reporting_integration_callbacks(name):
                    make()
            except (ValueError, RuntimeError, ImportError) as error:
                hint = f"pip install {name}" if name in ("tensorboard", "wandb", "trackio") else ""
                raise RecipeError(f"train.report_to {name}: {' '.join(str(error).split())}", hint=hint) from None


def build_training_arguments(
    train: Mapping[str, Any], *, device: torch.device, folder: str, name: str
) -> TrainingArguments:
    """A checked `train` section as transformers takes it.

    Args:
        device: that the base is on.
        folder: of transformers' own, which nothing is written to.
        name: of the run, for what is reported elsewhere.

    Raises:
        RecipeError: an optimiser that the device cannot have.
    """
    from transformers import TrainingArguments

    # Left open, transformers would hide the bar because its own log is quiet here.
    values = {"disable_tqdm": False, "run_name": name, **train}
    for own in OWN_FIELDS:
        values.pop(own, None)
    # Transformers would have checkpoints at the evaluations only; here the best is kept whenever it is found.
    best = values.pop("load_best_model_at_end", False)
    for older, newer in _NEWER_NAMES.items():
        if older in values and newer in get_training_argument_types():
            values[newer] = values.pop(older)
    if "paged" in str(values.get("optim")) and device.type != "cuda":
        # bitsandbytes would go on with states that are not paged.
        raise RecipeError(f"train.optim {values['optim']} needs a CUDA device", hint="adamw_8bit runs on a CPU too")
    args = TrainingArguments(
        output_dir=folder,
        use_cpu=device.type == "cpu",
        remove_unused_columns=False,
        label_names=["labels"],
        logging_nan_inf_filter=False,
        **values,
    )
    # More devices than one would be wrapped in DataParallel, which copies the model in every step.
    args._n_gpu = min(args.n_gpu, 1)
    args.load_best_model_at_end = best
    return args
