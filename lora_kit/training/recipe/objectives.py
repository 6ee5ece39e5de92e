"""Objectives: what a training minimizes. `sft` is computed here, preferences and rewards by TRL's trainers.

TRL takes seconds to import, and only recipes with an objective other than `sft` need it.
"""

from __future__ import annotations

import dataclasses
import importlib
import typing
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

from lora_kit.data.layouts import FORMATS
from lora_kit.data.preferences import FEEDBACK_FORMATS, PAIR_FORMATS
from lora_kit.errors import RecipeError, format_list, suggest_nearest
from lora_kit.models.silence import silence_libraries
from lora_kit.models.tasks import CAUSAL_LM, CLASSIFY
from lora_kit.names import REWARD_OBJECTIVE
from lora_kit.training.recipe.coerce import Section, check_one_of

if TYPE_CHECKING:
    from transformers import TrainingArguments

SFT, DPO, KTO, ORPO, REWARD = "sft", "dpo", "kto", "orpo", REWARD_OBJECTIVE
REWARD_LABEL: Final = "reward"
"""The only label of a reward model's head."""


_LOSSES_OF_BATCHES: Final = ("aot", "aot_unpaired", "sft")
"""Losses of DPO that are no mean over rows: they sort the rows, or divide by the tokens of all."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """An objective that one of TRL's trainers computes.

    Attributes:
        config: the class of its arguments.
        module: the module of TRL that has it.
        formats: the formats of rows that it learns from.
        metrics: what an evaluation measures besides the loss, and whether a greater value is better.
        learning_rate: the default: ten times TRL's own, as adapters want it.
        task: of the model.
        methods: those that can train it.
        needs_reference: whether it compares the model with itself as it was before.
        loss_types: the values of `loss_type`; empty where there is no such key.
    """

    config: str
    module: str = "trl"
    formats: tuple[str, ...] = PAIR_FORMATS
    metrics: Mapping[str, bool]
    learning_rate: float = 1e-5
    task: str = CAUSAL_LM
    methods: tuple[str, ...] = ("lora",)
    needs_reference: bool = False
    loss_types: tuple[str, ...] = ()


_REWARD_METRICS: Final = {
    "rewards/accuracies": True,
    "rewards/margins": True,
    "rewards/chosen": True,
    "rewards/rejected": False,
}
_DPO_LOSSES: Final = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
TRL_OBJECTIVES: Final[Mapping[str, Objective]] = {
    DPO: Objective(config="DPOConfig", metrics=_REWARD_METRICS, needs_reference=True, loss_types=_DPO_LOSSES),
    KTO: Objective(
        config="KTOConfig",
        formats=(*FEEDBACK_FORMATS, *PAIR_FORMATS),
        metrics={"rewards/margins": True, "rewards/chosen": True, "rewards/rejected": False, "kl": False},
        needs_reference=True,
        loss_types=("kto", "apo_zero_unpaired"),
    ),
    ORPO: Objective(config="ORPOConfig", module="trl.experimental.orpo", metrics=_REWARD_METRICS),
    REWARD: Objective(
        config="RewardConfig",
        metrics={"accuracy": True, "margin": True},
        learning_rate=1e-3,
        task=CLASSIFY,
        methods=("lora", "features"),
    ),
}
"""By the name that a recipe has for it."""
OBJECTIVES: Final = (SFT, *TRL_OBJECTIVES)
_UNSUPPORTED_OBJECTIVES: Final[Mapping[str, str]] = {
    "grpo": "it generates between its steps, which checkpoints do not cover",
    "rloo": "it generates between its steps, which checkpoints do not cover",
    "ppo": "TRL has no such trainer any more",
}

_LENGTH: Final = "the recipe's data.max_length"
_NEVER_CUT: Final = "an answer is never cut; a prompt loses tokens on its left"
_LOADED: Final = "the base is loaded as the recipe says"
_BASE_REFERENCE: Final = "the reference never changes"
_TOKENIZER: Final = "the base's tokenizer and the recipe's data section decide it"
_UNSUPPORTED_KEYS: Final[Mapping[str, str]] = {
    "activation_offloading": "it is not supported; gradient_checkpointing saves memory as well",
    "chat_template_path": "the recipe's data.chat_template",
    "dataset_num_proc": "rows are read by one process",
    "eos_token": _TOKENIZER,
    "generate_during_eval": "the report has no generated texts of preferences",
    "is_encoder_decoder": _LOADED,
    "max_completion_length": _LENGTH,
    "max_length": _LENGTH,
    "model_init_kwargs": _LOADED,
    "pad_token": _TOKENIZER,
    "padding_free": "TRL does not support it at present",
    "padding_value": _TOKENIZER,
    "ref_model_mixup_alpha": _BASE_REFERENCE,
    "ref_model_sync_steps": _BASE_REFERENCE,
    "sync_ref_model": _BASE_REFERENCE,
    "truncation_mode": _NEVER_CUT,
    "trust_remote_code": _LOADED,
    # Keys of transformers.TrainingArguments that TRL's trainers ignore:
    "label_smoothing_factor": "TRL's trainers ignore it; dpo has label_smoothing",
}
"""Keys of TRL's configs that a recipe cannot set, and why."""


def check_objective(name: str) -> None:
    """Raise RecipeError for an objective that is unknown or cannot be trained."""
    if name in _UNSUPPORTED_OBJECTIVES:
        raise RecipeError(f"objective {name} is not supported: {_UNSUPPORTED_OBJECTIVES[name]}")
    check_one_of("objective", name, OBJECTIVES)


def find_formats(objective: str, task: str) -> tuple[str, ...]:
    """Return the formats of rows that an objective learns from on a model of a task."""
    return FORMATS[task] if objective == SFT else TRL_OBJECTIVES[objective].formats


def load_config_class(objective: str) -> type[TrainingArguments]:
    """Return TRL's class of the arguments of an objective.

    Raises:
        RecipeError: TRL is not installed, or its version has no such class.
    """
    found = load_trl_class(objective, TRL_OBJECTIVES[objective].config)
    return typing.cast("type[TrainingArguments]", found)


def load_trl_class(objective: str, name: str) -> type:
    """Return a class of TRL that an objective needs.

    Raises:
        RecipeError: TRL is not installed, or its version has no such class.
    """
    if find_spec("trl") is None:
        hint = "pip install 'lora-kit[preferences]'"
        raise RecipeError(f"objective {objective} needs TRL, which is not installed", hint=hint)
    with silence_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that experimental trainers may change
        try:
            found: type = getattr(importlib.import_module(TRL_OBJECTIVES[objective].module), name)
        except (ImportError, AttributeError) as error:
            what = f"objective {objective}: the installed TRL has no {name}: {' '.join(str(error).split())}"
            raise RecipeError(what, hint="lora-kit is tested with the version in constraints.txt") from None
    return found


def get_objective_types(objective: str) -> dict[str, object]:
    """Return the keys of `train` that an objective adds to transformers.TrainingArguments, with their types.

    Raises:
        RecipeError: TRL is not installed.
    """
    if objective == SFT:
        return {}
    from transformers import TrainingArguments

    config = load_config_class(objective)
    common = {field.name for field in dataclasses.fields(TrainingArguments)}
    hints = typing.get_type_hints(config)
    return {field.name: hints[field.name] for field in dataclasses.fields(config) if field.name not in common}


def check_objective_keys(objective: str, section: Section) -> None:
    """Raise RecipeError for a key of `train` that this objective does not take, and say why."""
    for key in section:
        if objective != SFT and key in _UNSUPPORTED_KEYS:
            raise RecipeError(f"train.{key} cannot be set for objective {objective}", hint=_UNSUPPORTED_KEYS[key])


def check_objective_values(objective: str, train: Section, *, lora_dropout: float) -> None:
    """Raise RecipeError for values that TRL would reject, or silently ignore, only in its first step."""
    if objective == SFT:
        return
    known = TRL_OBJECTIVES[objective].loss_types
    given = train.get("loss_type", [])
    for value in [given] if isinstance(given, str) else given:
        if value not in known:
            hint = suggest_nearest(value, known) or f"known: {format_list(known, most=len(known))}"
            raise RecipeError(f"train.loss_type {value!r} is not known to objective {objective}", hint=hint)
    _check_loss_weights(train)
    beta = train.get("beta")
    if beta is not None and beta <= 0:
        raise RecipeError(f"train.beta must be above 0; {beta} was given", hint="0.1 is a usual value")
    if lora_dropout and train.get("disable_dropout", True):
        what = f"lora.lora_dropout is {lora_dropout}, and objective {objective} trains without dropout"
        raise RecipeError(what, hint="train.disable_dropout: false, or leave lora_dropout out")


def reason_not_shareable(objective: str, train: Section) -> str | None:
    """Return why several processes cannot share the rows of a batch; None where they can.

    The loss of a batch has to be a mean over its rows, as each process computes it for its own.
    """
    if objective in (KTO, ORPO):
        return f"objective {objective} computes one loss for all rows of a batch"
    given = train.get("loss_type", []) if objective == DPO else []
    whole = [value for value in ([given] if isinstance(given, str) else given) if value in _LOSSES_OF_BATCHES]
    return f"train.loss_type {whole[0]} computes one loss for all rows of a batch" if whole else None


def _check_loss_weights(train: Section) -> None:
    """Raise RecipeError unless each loss has a weight, where weights are given."""
    weights: Sequence[object] | None = train.get("loss_weights")
    losses = train.get("loss_type", ["sigmoid"])
    if weights is not None and len(weights) != len(losses):
        raise RecipeError(f"train.loss_weights has {len(weights)} values, train.loss_type {len(losses)}")
