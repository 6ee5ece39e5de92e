"""Recipes: what to train on which base and data, checked before any work is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import yaml

from lora_kit.config.lora_config import LoraConfig
from lora_kit.data.messages import ALL, LEARN
from lora_kit.data.mixture import DataSource
from lora_kit.errors import RecipeError
from lora_kit.io.text import format_value
from lora_kit.models.prompt_tokens import DEFAULT_SEPARATOR
from lora_kit.models.quantization import QUANTIZATIONS
from lora_kit.models.tasks import CAUSAL_LM, CLASSIFY, LABEL_TASKS, MULTI_LABEL, PROBLEMS, REGRESSION, SEQ2SEQ, TASKS
from lora_kit.training.recipe.argument_checks import check_arguments
from lora_kit.training.recipe.class_weights import ClassWeights, parse_class_weights
from lora_kit.training.recipe.coerce import Section, as_json, check_one_of
from lora_kit.training.recipe.data_files import check_data_files, describe_data_files
from lora_kit.training.recipe.limits import check_largest, check_output_name
from lora_kit.training.recipe.objectives import (
    SFT,
    TRL_OBJECTIVES,
    check_objective,
    check_objective_values,
)
from lora_kit.training.recipe.optimizer_checks import check_learning_rates, check_optimizer, check_schedule
from lora_kit.training.recipe.peft_config import parse_peft_section
from lora_kit.training.recipe.reward_specs import RewardSpecs, check_rewards, describe_rewards, parse_rewards
from lora_kit.training.recipe.sharding_checks import check_sharding
from lora_kit.training.recipe.training_arguments import (
    check_best_model_settings,
    check_compilable,
    check_evaluation,
    checkpointing_key_of,
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
"""Which of the sections `lora` and `peft` a method has."""
METHODS_CHANGING_BASE: Final = ("full", "peft")
"""Methods that change the model itself, which nothing else may use then."""
HEAD: Final = "head"
"""In `modules_to_save`: the head of whatever base is loaded."""
_LABEL_FIELDS: Final = ("problem", "class_weights")
"""Fields that a recipe without labels does not have."""
_DESCRIPTIVE_FIELDS: Final = ("base_model_name_or_path", "revision", "task_type", "inference_mode")


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """The data of a recipe.

    Attributes:
        train: file of the training rows, or several with their weights, see `lora_kit.data` and
            `lora_kit.data.mixture`; relative paths start from the working directory.
        validation: file or files of the rows that metrics are computed on; None for no evaluation.
        separator: appended to every prompt, in training and in generation.
        chat_template: for conversations: `plain`, a Jinja file or its text; None for the tokenizer's own.
        chat_template_kwargs: variables of the chat template, such as `enable_thinking: false`, in training and in
            generation.
        learn: which answers of a conversation are learned: `all`, but for those that say `train: false`; the `last`; or
            those `marked` with `train: true`.
        max_length: tokens of a sample, at most; None for the base's context length, capped at 2,048.
        packing: whether several training samples share one row of `max_length` tokens, each computed as if alone.
        streaming: whether the training rows are read in chunks and their samples kept on the disk, for what does not
            fit in memory; the result is the same.
    """

    train: DataSource
    validation: DataSource | None = None
    separator: str = DEFAULT_SEPARATOR
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, object] = field(default_factory=dict, hash=False)
    learn: str = ALL
    max_length: int | None = None
    packing: bool = False
    streaming: bool = False


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train, on which base, on which data.

    Attributes:
        base: hub id, local folder or `kit-base`.
        data: the files and how they are read.
        out: folder of the result; its last part is the adapter's name.
        task: `causal-lm`, `seq2seq`, `classify` or `tokens`: see `lora_kit.models.tasks`.
        problem: what task `classify` predicts: `single-label`, `multi-label` or `regression`; None to infer it from the
            form of the labels.
        class_weights: weight of each label in the loss by its name, 1 for labels that are not named; `balanced` for the
            inverse of how frequent they are; None for equal weights.
        objective: `sft` to learn the answers; `dpo`, `kto`, `orpo` to prefer some answers to others, `reward` to score
            them, and `grpo` to write answers that functions reward, by TRL's trainers; see
            `lora_kit.training.recipe.objectives`. A reward model's task is `classify`.
        rewards: for `grpo` the functions that reward answers: `FILE.py:FUNCTION`, or a list of these and of
            `{function, weight}`. The file is run as Python; a relative path starts from the working directory.
        start_from: the adapter that the training starts from: a folder, a name in the store or a hub id; None for a new
            one. The key is `from`. Its config is then the default of `lora`.
        method: `lora`; `features` to train only the head; `full` to train every weight; `peft` for one of PEFT's own
            adapter types.
        lora: the adapter's config.
        peft: `peft_type` and fields of PEFT's config of that type, for method `peft`.
        train: fields of transformers.TrainingArguments, and of TRL's config of the objective. A field that is not set
            has that class's default, except for `DEFAULTS`, `LEARNING_RATES` and `SAVE_STRATEGIES` in `train_keys` and
            the learning rate of an `Objective`. Further keys: those of `OwnTrainKeys`.
        dtype: of the base: `auto` for the checkpoint's own (`full` then trains in fp32), `bf16`, `fp16`, `fp32`.
        quantize: `nf4`, `nf4-double`, `fp4`, `fp4-double` or `int8`, to train an adapter on a quantized base.
        compile: whether the base's repeated layers are compiled (torch.compile) for the training.

    Raises:
        RecipeError: on construction, for a value that is unknown or invalid.
    """

    base: str
    data: DataSpec
    out: str
    task: str = CAUSAL_LM
    problem: str | None = None
    class_weights: ClassWeights = None
    objective: str = SFT
    rewards: RewardSpecs = ()
    start_from: str | None = None
    method: str = "lora"
    lora: LoraConfig = field(default_factory=LoraConfig)
    peft: Section = field(default_factory=dict)
    train: Section = field(default_factory=dict)
    dtype: str = "auto"
    quantize: str | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        self._check_plain_fields()
        self._check_data()
        train = parse_train_section(self.train, self.method, self.objective)
        object.__setattr__(self, "train", MappingProxyType(train))
        object.__setattr__(self, "lora", _choose_lora_config(self.method, self.lora))
        object.__setattr__(self, "peft", MappingProxyType(self._parse_peft()))
        check_evaluation(self.train, self.data.validation)
        check_best_model_settings(self.train, self.task, self.problem, self.objective)
        check_learning_rates(self.train, self.method)
        check_schedule(self.train)
        check_optimizer(self.train)
        check_arguments(self.train)
        check_objective_values(self.objective, self.train, lora_dropout=self.lora.lora_dropout)
        check_largest(self.train)
        if self.compile:
            check_compilable(self.train)
        check_sharding(self.train, method=self.method, objective=self.objective, compiled=self.compile)

    def _check_plain_fields(self) -> None:
        check_one_of("task", self.task, TASKS)
        if self.problem is not None:
            check_one_of("problem", self.problem, PROBLEMS)
        check_one_of("method", self.method, METHODS)
        self._resolve_objective()
        object.__setattr__(self, "rewards", parse_rewards(self.rewards))
        check_rewards(self.objective, self.rewards)
        if self.start_from is not None and self.method not in ("lora", "features"):
            what = f"from is for the methods lora and features; the method is {self.method}"
            raise RecipeError(what, hint="leave it out")
        self._check_labels()
        check_one_of("dtype", self.dtype, DTYPES)
        if self.quantize is not None:
            check_one_of("quantize", self.quantize, QUANTIZATIONS)
        if self.method == "full" and self.quantize:
            what = f"method full cannot train the weights of a base in {self.quantize}"
            raise RecipeError(what, hint="use method lora")

    def _resolve_objective(self) -> None:
        """Check the objective, and set the task that a reward model has."""
        check_objective(self.objective)
        if self.objective == SFT:
            return
        objective = TRL_OBJECTIVES[self.objective]
        if self.task != objective.task:
            if self.task != CAUSAL_LM:
                what = f"objective {self.objective} is for task {objective.task}; the task is {self.task}"
                raise RecipeError(what, hint="leave the task out")
            object.__setattr__(self, "task", objective.task)
        for key, is_wrong, hint in (
            (f"method {self.method}", self.method not in objective.methods, f"use method {objective.methods[0]}"),
            (f"problem {self.problem}", self.problem not in (None, REGRESSION), "leave the problem out"),
            ("class_weights", self.class_weights is not None, "leave them out"),
            ("data.packing", self.data.packing, "packing: false"),
            ("data.streaming", self.data.streaming, "streaming: false"),
            ("compile", self.compile, "compile: false"),
        ):
            if is_wrong:
                raise RecipeError(f"{key} does not go with objective {self.objective}", hint=hint)

    def _check_labels(self) -> None:
        if self.problem is not None and self.task != CLASSIFY:
            raise RecipeError(f"problem is for task {CLASSIFY}; the task is {self.task}", hint=f"task: {CLASSIFY}")
        if self.problem in (MULTI_LABEL, REGRESSION) and self.train.get("label_smoothing_factor"):
            what = f"train.label_smoothing_factor has no effect on the loss of problem {self.problem}"
            raise RecipeError(what, hint="take it out")
        object.__setattr__(self, "class_weights", parse_class_weights(self.class_weights))
        if self.class_weights is None:
            return
        if self.task not in LABEL_TASKS or self.problem == REGRESSION:
            what = f"problem {REGRESSION}" if self.problem == REGRESSION else f"task {self.task}"
            raise RecipeError(f"class_weights are weights of labels, which {what} has not", hint="take them out")

    def _check_data(self) -> None:
        check_output_name(self.out)
        if not self.base.strip() or not self.out.strip():
            raise RecipeError("base and out must not be empty")
        check_data_files(self.data.train, self.data.validation)
        if self.data.packing and self.task != CAUSAL_LM:
            raise RecipeError(f"data.packing is for task causal-lm; the task is {self.task}")
        if self.data.streaming and self.task not in (CAUSAL_LM, SEQ2SEQ):
            what = f"data.streaming is for the tasks {CAUSAL_LM} and {SEQ2SEQ}; the task is {self.task}"
            raise RecipeError(what, hint="leave it out: its labels are found in all rows at once")
        check_one_of("data.learn", self.data.learn, LEARN)
        if self.data.max_length is not None and not 2 <= self.data.max_length < 2**31:
            shown = format_value(self.data.max_length)
            raise RecipeError(f"data.max_length must be at least 2 and below 2^31; {shown} was given")

    def _parse_peft(self) -> Section:
        if self.method != "peft":
            if self.peft:
                raise RecipeError(f"method {self.method} has no peft section", hint="use method peft, or take it out")
            return {}
        if self.compile:
            raise RecipeError("compile is not for method peft: not every layer of PEFT compiles", hint="compile: false")
        return parse_peft_section(
            self.peft, packing=self.data.packing, checkpointing=bool(checkpointing_key_of(self.train))
        )

    @property
    def seed(self) -> int:
        return int(self.train["seed"])

    @property
    def name(self) -> str:
        """The name of the adapter: the last part of `out`."""
        return Path(self.out).name

    def replace(self, **changes: Any) -> Recipe:
        """Return a recipe with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON values, from which `load_recipe` builds the same recipe again."""
        fields = dict(vars(self))
        fields["data"] = dataclasses.asdict(self.data) | {
            name: describe_data_files(getattr(self.data, name)) for name in ("train", "validation")
        }
        fields["train"] = {key: as_json(value) for key, value in sorted(self.train.items())}
        fields["lora"] = _collect_lora_fields(self.lora)
        fields["peft"] = as_json(dict(self.peft))
        start = fields.pop("start_from")
        if start is not None:
            fields["from"] = start
        if self.objective == SFT:
            del fields["objective"]  # as it was before there were others
        fields["rewards"] = describe_rewards(self.rewards)
        if not self.rewards:
            del fields["rewards"]
        fields["class_weights"] = as_json(self.class_weights)
        for name in _LABEL_FIELDS:
            if fields[name] is None:
                del fields[name]
        for section in ("lora", "peft"):
            if section not in _SECTIONS[self.method]:
                del fields[section]
        return fields

    def to_yaml(self) -> str:
        """Return the recipe as YAML, from which `load_recipe` builds the same recipe again."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)


def _choose_lora_config(method: str, config: LoraConfig) -> LoraConfig:
    """Return the config that a method trains with: for `features`, the default is the head alone."""
    is_default = config == LoraConfig()
    if "lora" not in _SECTIONS[method] and not is_default:
        what = "trains every weight and " if method == "full" else ""
        raise RecipeError(f"method {method} {what}has no lora section", hint="take it out, or use method lora")
    if method != "features":
        return config
    if is_default:
        return LoraConfig(target_modules=(), modules_to_save=(HEAD,))
    descriptive = {name: getattr(config, name) for name in _DESCRIPTIVE_FIELDS}
    head_only = LoraConfig(target_modules=(), modules_to_save=config.modules_to_save, **descriptive)
    if config.target_modules or config != head_only:
        raise RecipeError(
            "method features trains the head alone: lora may set modules_to_save only", hint="use method lora"
        )
    return config


def _collect_lora_fields(config: LoraConfig) -> dict[str, object]:
    """Return the fields of a config that differ from the default; r, lora_alpha and target_modules always."""
    plain, default = config.to_dict(), LoraConfig().to_dict()
    always = ("r", "lora_alpha", "target_modules")
    names = [field.name for field in dataclasses.fields(LoraConfig) if field.name in plain]
    fields = {key: plain[key] for key in names if plain[key] != default.get(key) or key in always}
    if not config.target_modules and not config.target_parameters:
        return {key: value for key, value in fields.items() if key not in always}
    return fields
