"""Recipes: what to train on what, checked before any work is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import yaml

from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import RecipeError
from lora_kit.models.prompt_tokens import DEFAULT_SEPARATOR
from lora_kit.models.quantization import QUANTIZATIONS
from lora_kit.models.tasks import CAUSAL_LM, TASKS
from lora_kit.training.recipe.coerce import as_json, check_one_of
from lora_kit.training.recipe.peft_config import parse_peft_section
from lora_kit.training.recipe.training_arguments import (
    check_best_model_settings,
    check_compilable,
    check_evaluation,
    check_learning_rates,
    parse_train_section,
)

METHODS: Final = ("lora", "features", "full", "peft")
DTYPES: Final = ("auto", "bf16", "fp16", "fp32")
_SECTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "lora": ("lora",),
    "features": ("lora",),
    "full": (),
    "peft": ("peft",),
}
"""Which of the sections `lora` and `peft` a recipe of a method has."""
METHODS_CHANGING_BASE: Final = ("full", "peft")
"""Methods that change the model they are given, which nobody else must have then."""
HEAD: Final = "head"
"""Stands in `modules_to_save` for the head of whatever base is loaded."""
_DESCRIPTIVE_FIELDS: Final = ("base_model_name_or_path", "revision", "task_type", "inference_mode")


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """The data of a recipe.

    Attributes:
        train: a file of rows, see `lora_kit.data`; paths count from the working directory.
        validation: another one, for the metrics before and after; no evaluation without it.
        separator: joined to every prompt, in training and in generation.
        chat_template: of conversations: `plain`, a Jinja file or the text of one; None for the tokenizer's own.
        max_length: tokens of a sample at the most; None for what the base can see, 2,048 at the most.
        packing: several samples to train on in one row of `max_length` tokens, each computed as if it were alone.
    """

    train: str
    validation: str | None = None
    separator: str = DEFAULT_SEPARATOR
    chat_template: str | None = None
    max_length: int | None = None
    packing: bool = False


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train on what.

    Attributes:
        base: hub id, local folder or `kit-base`.
        data: files and how they are read.
        out: folder of the result; the name of the adapter is its last part.
        task: one of `lora_kit.models.tasks.TASKS`.
        method: `lora`; `features` to train only the head; `full` to train every weight; `peft` for an adapter that PEFT
            makes, trains and saves.
        lora: the adapter's config.
        peft: `peft_type` and fields of PEFT's config of that type, for method `peft`; see `peft_section`.
        train: names of transformers.TrainingArguments with their values; what is not named has that class's default,
            but for `DEFAULTS`, `LEARNING_RATES` and `SAVE_STRATEGIES` here. Besides: `early_stopping_patience`, how
            many evaluations may pass without a better one, `loraplus_lr_ratio`, how many times the learning rate of A
            that of B is (Hayou et al. 2024, arXiv:2402.12354), and `head_learning_rate`, that of the head.
        dtype: of the base: `auto` for the checkpoint's own (`full` then trains in fp32), `bf16`, `fp16`, `fp32`.
        quantize: one of `lora_kit.models.quantization.QUANTIZATIONS`, to train an adapter on a quantised base.
        compile: compile the base's repeated layers (torch.compile) for the training.

    Raises:
        RecipeError: on construction, for a value that is not known or of the wrong type.
    """

    base: str
    data: DataSpec
    out: str
    task: str = CAUSAL_LM
    method: str = "lora"
    lora: LoraConfig = field(default_factory=LoraConfig)
    peft: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    quantize: str | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        check_one_of("task", self.task, TASKS)
        check_one_of("method", self.method, METHODS)
        check_one_of("dtype", self.dtype, DTYPES)
        if self.quantize is not None:
            check_one_of("quantize", self.quantize, QUANTIZATIONS)
        if self.method == "full" and self.quantize:
            raise RecipeError(
                f"method full cannot train the weights of a base in {self.quantize}", hint="use method lora"
            )
        if not self.base.strip() or not self.out.strip() or not self.data.train.strip():
            raise RecipeError("base, out and data.train must not be empty")
        if self.data.packing and self.task != CAUSAL_LM:
            raise RecipeError(f"data.packing is for text that goes on (task causal-lm); the task is {self.task}")
        if self.data.max_length is not None and self.data.max_length < 2:
            raise RecipeError(f"data.max_length must be at least 2; {self.data.max_length} was given")
        object.__setattr__(self, "train", MappingProxyType(parse_train_section(self.train, self.method)))
        object.__setattr__(self, "lora", _choose_lora_config(self.method, self.lora))
        object.__setattr__(self, "peft", MappingProxyType(self._parse_own_peft_section()))
        check_evaluation(self.train, self.data.validation)
        check_best_model_settings(self.train, self.task)
        check_learning_rates(self.train, self.method)
        if self.compile:
            check_compilable(self.train)

    def _parse_own_peft_section(self) -> dict[str, Any]:
        if self.method != "peft":
            if self.peft:
                raise RecipeError(f"method {self.method} has no peft section", hint="use method peft, or take it out")
            return {}
        if self.compile:
            raise RecipeError("compile is not for method peft: not every layer of PEFT compiles", hint="compile: false")
        checkpointing = any(self.train.get(key) for key in ("gradient_checkpointing", "activation_checkpointing"))
        return parse_peft_section(self.peft, packing=self.data.packing, checkpointing=checkpointing)

    @property
    def seed(self) -> int:
        return int(self.train["seed"])

    @property
    def name(self) -> str:
        """What the adapter is called: the last part of `out`."""
        return Path(self.out).name

    def replace(self, **changes: Any) -> Recipe:
        """A recipe with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON values, from which `load_recipe` makes the same recipe again."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["data"] = dataclasses.asdict(self.data)
        fields["train"] = {key: as_json(value) for key, value in sorted(self.train.items())}
        fields["lora"] = _collect_lora_fields(self.lora)
        fields["peft"] = as_json(dict(self.peft))
        for section in ("lora", "peft"):
            if section not in _SECTIONS[self.method]:
                del fields[section]
        return fields

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)


def _choose_lora_config(method: str, config: LoraConfig) -> LoraConfig:
    """The config a method trains with: the one given, or for `features` one of the head alone.

    Raises:
        RecipeError: the config says something that the method does not do.
    """
    untouched = config == LoraConfig()
    if "lora" not in _SECTIONS[method] and not untouched:
        what = "trains every weight and " if method == "full" else ""
        raise RecipeError(f"method {method} {what}has no lora section", hint="take it out, or use method lora")
    if method != "features":
        return config
    if untouched:
        return LoraConfig(target_modules=(), modules_to_save=(HEAD,))
    labels = {name: getattr(config, name) for name in _DESCRIPTIVE_FIELDS}
    if config.target_modules or config != LoraConfig(
        target_modules=(), modules_to_save=config.modules_to_save, **labels
    ):
        raise RecipeError(
            "method features trains the head alone: lora may hold modules_to_save only", hint="use method lora"
        )
    return config


def _collect_lora_fields(config: LoraConfig) -> dict[str, Any]:
    """The fields of a config that are not the default, r and lora_alpha always."""
    plain, default = config.to_dict(), LoraConfig().to_dict()
    always = ("r", "lora_alpha", "target_modules")
    own = [f.name for f in dataclasses.fields(LoraConfig) if f.name in plain]
    fields = {key: plain[key] for key in own if plain[key] != default.get(key) or key in always}
    if not config.target_modules and not config.target_parameters:
        return {key: value for key, value in fields.items() if key not in always}
    return fields
