"""Check a `train` section as transformers would check it when the training begins."""

from __future__ import annotations

import dataclasses
from typing import Final

import torch
from torch.utils.checkpoint import checkpoint

from lora_kit.errors import RecipeError, format_list
from lora_kit.models.silence import silence_libraries
from lora_kit.training.recipe.coerce import Section
from lora_kit.training.recipe.training_arguments import (
    get_training_argument_types,
    translate_argument_errors,
    translate_section,
)

_TOKEN_COUNTS: Final = ("all", "non_padding", "no")
"""What `include_num_input_tokens_seen` may be, besides true and false."""


def check_arguments(train: Section) -> None:
    """Raise RecipeError for values that transformers, or the training, would reject only once a base is loaded."""
    with silence_libraries():
        from transformers import TrainingArguments
        from transformers.utils import is_torch_tf32_available

    choices = {field.name: field.metadata.get("choices") for field in dataclasses.fields(TrainingArguments)}
    for key, values in {**choices, "include_num_input_tokens_seen": _TOKEN_COUNTS}.items():
        if values is not None and isinstance(train.get(key), str) and train[key] not in values:
            known = format_list([str(value) for value in values], most=len(values))
            raise RecipeError(f"train.{key} must be one of {known}; {train[key]!r} was given")
    _check_checkpointing(train)
    for key in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if train.get(key) and not train.get("dataloader_num_workers"):
            raise RecipeError(f"train.{key} needs train.dataloader_num_workers of 1 or more")
    if train.get("tf32") and not is_torch_tf32_available():
        raise RecipeError("train.tf32 needs a CUDA device of the Ampere generation or newer", hint="leave it out")

    class _WithoutDevice(TrainingArguments):
        """Arguments that are checked as transformers does, and choose no device of the process."""

        @property
        def device(self) -> torch.device:
            return torch.device("cpu")

    names = get_training_argument_types()  # without keys that belong to an objective of TRL
    values = {key: value for key, value in translate_section(train).items() if key in names}
    with translate_argument_errors(), silence_libraries():
        # tf32 would set a flag of the process; whether there is that flag was checked above.
        _WithoutDevice(output_dir="-", use_cpu=True, **{**values, "tf32": None})


def _check_checkpointing(train: Section) -> None:
    """Raise RecipeError for arguments that torch's gradient checkpointing does not take: it is tried on one number."""
    for key in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        if train.get(key):
            options = {"use_reentrant": False, **train[key]}
            try:
                checkpoint(torch.clone, torch.zeros(()), **options)
            except Exception as error:
                raise RecipeError(f"train.{key}: {' '.join(str(error).split())}") from error
