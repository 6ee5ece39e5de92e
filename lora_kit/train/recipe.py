"""Recipes: what to train on what, from YAML, TOML, a mapping or flags, checked before any work is done."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import yaml

from lora_kit.config import LoraConfig
from lora_kit.errors import ConfigError, RecipeError, listed, nearest
from lora_kit.models import DEFAULT_SEPARATOR, LATER_TASKS, QUANTIZATIONS, TASKS, quiet
from lora_kit.train.values import Loader, coerced, parsed

METHODS: Final = ("lora", "features", "full")
LATER_METHODS: Final = ("peft",)
DTYPES: Final = ("auto", "bf16", "fp16", "fp32")
_SIZE_LIMIT: Final = 2**20

DEFAULTS: Final[Mapping[str, Any]] = {"logging_steps": 10, "report_to": "none", "save_total_limit": 2, "seed": 0}
"""What `train` holds where a recipe says nothing and transformers' own default is not wanted."""
SAVE_STRATEGIES: Final[Mapping[str, str]] = {"lora": "steps", "features": "steps", "full": "no"}
"""When checkpoints are written: those of `full` hold every weight three times."""
LEARNING_RATES: Final[Mapping[str, float]] = {"lora": 2e-4, "features": 1e-3, "full": 5e-5}

OWN_FIELDS: Final[Mapping[str, Any]] = {"early_stopping_patience": int, "loraplus_lr_ratio": float}
"""What `train` may hold besides names of transformers.TrainingArguments."""
METRICS: Final[Mapping[str, tuple[str, ...]]] = {"causal-lm": ("loss", "perplexity"), "classify": ("loss", "accuracy")}
"""What an evaluation gives, by task."""

_CHECKPOINTS: Final = "a checkpoint holds all it takes to go on, and the same recipe goes on from it by itself"
_ONE_DEVICE: Final = "training runs on one device so far"
_COMPILE: Final = "the recipe's `compile: true` compiles the base's layers"
_OURS: Final = "this is decided by what is trained on what"
_REFUSED: Final[Mapping[str, str]] = {
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
    "auto_find_batch_size": "halving the batch when memory runs out is not there yet",
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


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """The data of a recipe.

    Attributes:
        train: a file of rows, see `lora_kit.data`; paths count from the working directory.
        validation: another one, for the metrics before and after; no evaluation without it.
        separator: joined to every prompt, in training and in generation.
        chat_template: of conversations: `plain`, a Jinja file or the text of one; None for the tokenizer's own.
        max_length: tokens of a sample at the most; None for what the base can see, 2,048 at the most.
    """

    train: str
    validation: str | None = None
    separator: str = DEFAULT_SEPARATOR
    chat_template: str | None = None
    max_length: int | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train on what.

    Attributes:
        base: hub id, local folder or `kit-base`.
        data: files and how they are read.
        out: folder of the result; the name of the adapter is its last part.
        task: `causal-lm` or `classify`.
        method: `lora`; `features` to train only the head; `full` to train every weight.
        lora: the adapter's config.
        train: names of transformers.TrainingArguments with their values; what is not named has that class's default,
            but for `DEFAULTS`, `LEARNING_RATES` and `SAVE_STRATEGIES` here. Besides: `early_stopping_patience`, how
            many evaluations may pass without a better one, and `loraplus_lr_ratio`, how many times the learning rate
            of A that of B is (Hayou et al. 2024, arXiv:2402.12354).
        dtype: of the base: `auto` for the checkpoint's own (`full` then trains in fp32), `bf16`, `fp16`, `fp32`.
        quantize: `nf4` or `int8` to train an adapter on a quantised base.
        compile: compile the base's repeated layers (torch.compile) for the training.

    Raises:
        RecipeError: on construction, for a value that is not known or of the wrong type.
    """

    base: str
    data: DataSpec
    out: str
    task: str = "causal-lm"
    method: str = "lora"
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    quantize: str | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        _one_of("task", self.task, TASKS, later=LATER_TASKS)
        _one_of("method", self.method, METHODS, later=LATER_METHODS)
        _one_of("dtype", self.dtype, DTYPES)
        if self.quantize is not None:
            _one_of("quantize", self.quantize, QUANTIZATIONS)
        if self.method == "full" and self.quantize:
            raise RecipeError(
                f"method full cannot train the weights of a base in {self.quantize}", hint="use method lora"
            )
        if not self.base.strip() or not self.out.strip() or not self.data.train.strip():
            raise RecipeError("base, out and data.train must not be empty")
        if self.data.max_length is not None and self.data.max_length < 2:
            raise RecipeError(f"data.max_length must be at least 2; {self.data.max_length} was given")
        object.__setattr__(self, "train", MappingProxyType(_train_section(self.train, self.method)))
        object.__setattr__(self, "lora", _lora_for(self.method, self.lora))
        _check_evaluation(self.train, self.data.validation)
        _check_best(self.train, self.task)
        _check_loraplus(self.train, self.method)
        if self.compile:
            _check_compilable(self.train)

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
        fields["train"] = {key: _plain(value) for key, value in sorted(self.train.items())}
        fields["lora"] = _lora_fields(self.lora)
        if self.method == "full":
            del fields["lora"]
        return fields

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)


def load_recipe(
    source: str | Path | Mapping[str, Any] | Recipe, *, overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """A recipe from a YAML or TOML file, a mapping, or a recipe; overrides win.

    Args:
        source: the file (`.yaml`, `.yml` or `.toml`), or what stands in one.
        overrides: values by dotted key (`lora.r`, `train.learning_rate`, `out`); strings are read as the key's type.

    Raises:
        RecipeError: the file cannot be read, a key is unknown (the nearest is named), or a value does not fit.
    """
    if isinstance(source, Recipe):
        fields, where = source.to_dict(), "the recipe"
    elif isinstance(source, Mapping):
        fields, where = _copied(source), "the recipe"
    else:
        fields, where = _read(Path(source)), str(source)
    for key, value in (overrides or {}).items():
        _override(fields, key, value)
    try:
        return _built(fields)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error.message}", hint=error.hint) from None


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a recipe's file."""
    suffix = path.suffix.lower()
    if suffix not in (".yaml", ".yml", ".toml"):
        raise RecipeError(f"{path}: a recipe is a .yaml, .yml or .toml file")
    try:
        contents = path.read_bytes()
        text = contents.decode("utf-8")
    except FileNotFoundError:
        here = [str(path.parent / item.name) for item in path.parent.iterdir()] if path.parent.is_dir() else []
        raise RecipeError(f"{path}: no such file", hint=nearest(str(path), here)) from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 at byte {error.start}") from None
    if len(contents) > _SIZE_LIMIT:
        raise RecipeError(f"{path} has {len(contents):,} bytes; a recipe has at most {_SIZE_LIMIT:,}")
    try:
        fields = tomllib.loads(text) if suffix == ".toml" else yaml.load(text, Loader=Loader)
    except (tomllib.TOMLDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be parsed: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise RecipeError(f"{path}: a mapping was expected, found {type(fields).__name__}")
    return fields


def _override(fields: dict[str, Any], key: str, value: Any) -> None:
    """Put a value at a dotted key of the fields of a recipe."""
    section, dot, name = key.partition(".")
    if section == "data" and isinstance(fields.get("data"), str) and dot:
        fields["data"] = {"train": fields["data"]}
    if not dot:
        fields[key] = value
        return
    if section not in ("data", "lora", "train"):
        known = [f.name for f in dataclasses.fields(Recipe)]
        raise RecipeError(
            f"--{key}: a recipe has no section {section!r}", hint=nearest(section, known) or f"known: {listed(known)}"
        )
    inside = fields.setdefault(section, {})
    if inside is None:
        inside = fields[section] = {}
    if not isinstance(inside, dict):
        raise RecipeError(f"{section} must be a mapping; {inside!r} was given")
    inside[name] = value


def _built(fields: Mapping[str, Any]) -> Recipe:
    _known(fields, [f.name for f in dataclasses.fields(Recipe)], where="")
    missing = [name for name in ("base", "data", "out") if fields.get(name) is None]
    if missing:
        raise RecipeError(f"{listed(missing)} missing", hint="a recipe has base, data and out at least")
    values = {key: value for key, value in fields.items() if value is not None}
    method = values.get("method", "lora")
    for name in ("base", "out", "task", "method", "dtype", "quantize"):
        if name in values:
            values[name] = coerced(name, str, values[name])
    if "compile" in values:
        values["compile"] = coerced("compile", bool, values["compile"])
    if values.get("quantize") in ("none", "null", ""):
        del values["quantize"]
    values["data"] = _data_section(values["data"])
    if not isinstance(values.get("lora"), LoraConfig):
        values["lora"] = _lora_section(_section("lora", values.get("lora", {})), method)
    values["train"] = _section("train", values.get("train", {}))
    return Recipe(**values)


def _data_section(given: Any) -> DataSpec:
    if isinstance(given, (str, Path)):
        return DataSpec(train=str(given))
    section = _section("data", given)
    hints = typing.get_type_hints(DataSpec)
    _known(section, list(hints), where="data.")
    values = {key: coerced(f"data.{key}", hints[key], value) for key, value in section.items() if value is not None}
    if "train" not in values:
        raise RecipeError("data.train is missing", hint="it is a file of rows")
    return DataSpec(**values)


def _lora_section(section: Mapping[str, Any], method: str) -> LoraConfig:
    hints = {key: hint for key, hint in typing.get_type_hints(LoraConfig).items() if key != "extra"}
    _known(section, list(hints), where="lora.")
    values = {key: _lora_value(key, hints[key], value) for key, value in section.items() if value is not None}
    if method == "features":
        # A config must hold something; what the head is called is known once the model is there.
        values = {"target_modules": (), "modules_to_save": (HEAD,), **values}
    try:
        return LoraConfig(**values)
    except ConfigError as error:
        dot = "." if error.message.partition(" ")[0] in hints else ": "
        raise RecipeError(f"lora{dot}{error.message}", hint=error.hint) from None


def _lora_for(method: str, config: LoraConfig) -> LoraConfig:
    """The config a method trains with: the one given, or for `features` one of the head alone.

    Raises:
        RecipeError: the config says something that the method does not do.
    """
    untouched = config == LoraConfig()
    if method == "full" and not untouched:
        raise RecipeError(
            "method full trains every weight and has no lora section", hint="take it out, or use method lora"
        )
    if method != "features":
        return config
    if untouched:
        return LoraConfig(target_modules=(), modules_to_save=(HEAD,))
    labels = {name: getattr(config, name) for name in _LABELS}
    if config.target_modules or config != LoraConfig(
        target_modules=(), modules_to_save=config.modules_to_save, **labels
    ):
        raise RecipeError(
            "method features trains the head alone: lora may hold modules_to_save only", hint="use method lora"
        )
    return config


def _check_evaluation(train: Mapping[str, Any], validation: str | None) -> None:
    asked = [key for key in ("eval_strategy", "eval_on_start") if train.get(key) not in (None, "no", False)]
    if asked and validation is None:
        raise RecipeError(f"train.{asked[0]} is {train[asked[0]]!r}, and there is no data.validation to evaluate on")


def _check_best(train: Mapping[str, Any], task: str) -> None:
    """Whether the best adapter can be told, where it is to be kept."""
    patience, best = train.get("early_stopping_patience"), train.get("load_best_model_at_end")
    if patience is not None and patience < 1:
        raise RecipeError(f"train.early_stopping_patience counts evaluations from 1; {patience} was given")
    if patience and not best:
        raise RecipeError("train.early_stopping_patience keeps the best adapter; load_best_model_at_end is false")
    if not best:
        return
    metric = str(train["metric_for_best_model"]).removeprefix("eval_")
    if metric not in METRICS[task]:
        hint = nearest(metric, METRICS[task]) or f"known for {task}: {listed(METRICS[task])}"
        raise RecipeError(f"train.metric_for_best_model {metric!r} is no metric of an evaluation", hint=hint)
    for key, why in (
        ("eval_strategy", "the best adapter is told by"),
        ("save_strategy", "the best adapter is kept by"),
    ):
        if train.get(key, "no") == "no":
            raise RecipeError(f"train.{key} is no, and {why} it", hint=f"train.{key}: epoch, or steps")


def _check_loraplus(train: Mapping[str, Any], method: str) -> None:
    ratio = train.get("loraplus_lr_ratio")
    if ratio is None:
        return
    if method != "lora":
        raise RecipeError(f"train.loraplus_lr_ratio is a matter of A and B; method {method} has none")
    if ratio <= 0:
        raise RecipeError(f"train.loraplus_lr_ratio must be above 0; {ratio} was given", hint="16 is a usual value")


def _check_compilable(train: Mapping[str, Any]) -> None:
    asked = [key for key in ("gradient_checkpointing", "activation_checkpointing") if train.get(key)]
    if asked:
        raise RecipeError(f"compile and train.{asked[0]} do not go together", hint="leave one of them out")


_LABELS: Final = ("base_model_name_or_path", "revision", "task_type", "inference_mode")
HEAD: Final = "head"
"""Stands in `modules_to_save` for the head of whatever base is loaded."""
_NAMES: Final = re.compile(r"[\w.-]+(,[\w.-]+)*")


def _lora_value(key: str, hint: Any, value: Any) -> Any:
    listable = key in ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
    if isinstance(value, str) and listable and value != "all-linear":
        if value.startswith("["):
            value = parsed(f"lora.{key}", value)
        elif _NAMES.fullmatch(value):
            # A bare name as a regular expression could only match a module at the top: names are meant.
            value = value.split(",")
        if key == "layers_to_transform" and isinstance(value, list):
            value = [coerced(f"lora.{key}", int, item) for item in value]
    if listable:
        return tuple(value) if isinstance(value, list) else value
    return coerced(f"lora.{key}", hint, value)


def _lora_fields(config: LoraConfig) -> dict[str, Any]:
    """The fields of a config that are not the default, r and lora_alpha always."""
    plain, default = config.to_dict(), LoraConfig().to_dict()
    own = [f.name for f in dataclasses.fields(LoraConfig) if f.name != "extra"]
    fields = {
        key: plain[key] for key in own if plain[key] != default[key] or key in ("r", "lora_alpha", "target_modules")
    }
    if not config.target_modules:
        return {key: value for key, value in fields.items() if key not in ("r", "lora_alpha", "target_modules")}
    return fields


def _train_section(given: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The `train` section with its defaults, every value of its type."""
    hints = {**training_fields(), **OWN_FIELDS}
    for key in given:
        if key in _REFUSED:
            raise RecipeError(f"train.{key} cannot be set", hint=_REFUSED[key])
        if key.startswith("hub_"):
            raise RecipeError(f"train.{key} cannot be set", hint="nothing is sent anywhere")
    _known(given, [key for key in hints if key not in _REFUSED], where="train.")
    values = {key: coerced(f"train.{key}", hints[key], value) for key, value in given.items()}
    defaults = {**DEFAULTS, "learning_rate": LEARNING_RATES[method], "save_strategy": SAVE_STRATEGIES[method]}
    found = {**defaults, **{key: value for key, value in values.items() if value is not None or key not in defaults}}
    return {**_best_defaults(found), **found}


def _best_defaults(train: Mapping[str, Any]) -> dict[str, Any]:
    """What keeping the best adapter means where the recipe leaves it open."""
    if not train.get("load_best_model_at_end", bool(train.get("early_stopping_patience"))):
        return {}
    metric = str(train.get("metric_for_best_model") or "loss").removeprefix("eval_")
    higher = metric not in ("loss", "perplexity")
    return {"load_best_model_at_end": True, "metric_for_best_model": metric, "greater_is_better": higher}


def training_fields() -> dict[str, Any]:
    """The names of transformers.TrainingArguments with their types."""
    with quiet():
        from transformers import TrainingArguments

        hints = typing.get_type_hints(TrainingArguments)
    return {f.name: hints[f.name] for f in dataclasses.fields(TrainingArguments) if f.init}


def _known(given: Mapping[str, Any], known: Sequence[str], *, where: str) -> None:
    unknown = [key for key in given if key not in known]
    if unknown:
        close = nearest(str(unknown[0]), known)
        raise RecipeError(f"unknown key {where}{unknown[0]}", hint=close or f"known: {listed(sorted(known), most=12)}")


def _section(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{name} must be a mapping of keys to values; {value!r} was given")
    return dict(value)


def _one_of(name: str, value: str, known: Sequence[str], *, later: Sequence[str] = ()) -> None:
    if value in later:
        raise RecipeError(f"{name} {value!r} is not there yet", hint=f"known: {listed(known)}")
    if value not in known:
        raise RecipeError(
            f"{name} {value!r} is not known", hint=nearest(str(value), known) or f"known: {listed(known)}"
        )


def _copied(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in fields.items()}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
