"""Objectives: what a training minimizes. `sft` is computed here, all others by TRL's trainers.

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
from lora_kit.data.prompt_rows import PROMPT_FORMATS, LayoutFinder, require_prompt_layout
from lora_kit.errors import RecipeError, format_list, suggest_nearest
from lora_kit.models.silence import silence_libraries
from lora_kit.models.tasks import CAUSAL_LM, CLASSIFY
from lora_kit.names import REWARD_OBJECTIVE
from lora_kit.training.recipe.coerce import Section, check_one_of

if TYPE_CHECKING:
    from transformers import TrainingArguments

SFT, DPO, KTO, ORPO, REWARD, GRPO = "sft", "dpo", "kto", "orpo", REWARD_OBJECTIVE, "grpo"
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
        best: the metric by which the best adapter is found where a recipe names none.
        generates: whether it learns from answers that the model writes during the training, and functions reward.
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
    best: str = "loss"
    generates: bool = False


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
    GRPO: Objective(
        config="GRPOConfig",
        formats=PROMPT_FORMATS,
        metrics={"reward": True, "kl": False, "completions/clipped_ratio": False},
        needs_reference=True,
        loss_types=("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"),
        best="reward",
        generates=True,
    ),
}
"""By the name that a recipe has for it."""
OBJECTIVES: Final = (SFT, *TRL_OBJECTIVES)
_UNSUPPORTED_OBJECTIVES: Final[Mapping[str, str]] = {
    "rloo": "grpo learns from the same rows and rewards",
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
_OWN_ORDER: Final = "the order follows from the seed; shuffle_dataset: false keeps that of the file"
_NO_ENGINE: Final = "the model itself generates, as it is at that step"
_NO_COMPLETION_LOG: Final = "the log has the rewards, and the report answers to validation rows"
_UNSUPPORTED_WITH_GENERATION: Final[Mapping[str, str]] = {
    **{key: why for key, why in _UNSUPPORTED_KEYS.items() if key != "max_completion_length"},
    "cast_lm_head_to_fp32": "it changes the base, which must not change; dtype: fp32 loads it so",
    "chat_template_kwargs": "the recipe's data.chat_template_kwargs",
    "data_seed": _OWN_ORDER,
    "ds3_gather_for_generation": "DeepSpeed is not supported",
    "length_column_name": _OWN_ORDER,
    "log_completions": _NO_COMPLETION_LOG,
    "log_completions_hub_repo": "nothing is uploaded",
    "log_multimodal": "prompts are text",
    "log_unique_prompts": _NO_COMPLETION_LOG,
    "max_tool_calling_iterations": "no tools are called",
    "num_completions_to_print": _NO_COMPLETION_LOG,
    "reward_weights": "the recipe's rewards have weights: {function: rewards.py:short, weight: 0.5}",
    "train_sampling_strategy": _OWN_ORDER,
    "transformers_continuous_batching_config": _NO_ENGINE,
    "use_transformers_continuous_batching": _NO_ENGINE,
    "use_transformers_paged": _NO_ENGINE,
    "use_vllm": _NO_ENGINE,
}
"""The same where the model generates."""
_DEFAULT_ANSWER_TOKENS: Final = 512
"""TRL's default of `max_completion_length`."""
_GENERATION_DEFAULTS: Final[Mapping[str, int]] = {
    "num_generations": 8,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 1,
}
"""Defaults of TRL and transformers that say how many answers are generated at once."""


def check_objective(name: str) -> None:
    """Raise RecipeError for an objective that is unknown or cannot be trained."""
    if name in _UNSUPPORTED_OBJECTIVES:
        raise RecipeError(f"objective {name} is not supported: {_UNSUPPORTED_OBJECTIVES[name]}")
    check_one_of("objective", name, OBJECTIVES)


def generates_answers(objective: str) -> bool:
    """Return whether an objective learns from answers that the model writes during the training."""
    return objective != SFT and TRL_OBJECTIVES[objective].generates


def find_formats(objective: str, task: str) -> tuple[str, ...]:
    """Return the formats of rows that an objective learns from on a model of a task."""
    return FORMATS[task] if objective == SFT else TRL_OBJECTIVES[objective].formats


def find_layout_finder(objective: str) -> LayoutFinder | None:
    """Return what finds the layout of a file for an objective; None where the columns alone decide."""
    return require_prompt_layout if generates_answers(objective) else None


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
    if objective == SFT:
        return
    reasons = _UNSUPPORTED_WITH_GENERATION if generates_answers(objective) else _UNSUPPORTED_KEYS
    for key in section:
        reason = _NO_ENGINE if key.startswith("vllm_") else reasons.get(key)
        if reason is not None:
            raise RecipeError(f"train.{key} cannot be set for objective {objective}", hint=reason)


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
    beta, generates = train.get("beta"), generates_answers(objective)
    if beta is not None and (beta < 0 or (beta == 0 and not generates)):
        least, usual = ("0 or more", "0.04") if generates else ("above 0", "0.1")
        raise RecipeError(f"train.beta must be {least}; {beta} was given", hint=f"{usual} is a usual value")
    if generates:
        _check_generation(train)
    if lora_dropout and train.get("disable_dropout", True):
        what = f"lora.lora_dropout is {lora_dropout}, and objective {objective} trains without dropout"
        raise RecipeError(what, hint="train.disable_dropout: false, or leave lora_dropout out")


def reason_not_shareable(objective: str, train: Section) -> str | None:
    """Return why several processes cannot share the rows of a batch; None where they can.

    The loss of a batch has to be a mean over its rows, as each process computes it for its own.
    """
    if objective in (KTO, ORPO):
        return f"objective {objective} computes one loss for all rows of a batch"
    if objective == GRPO:
        return f"objective {objective} compares the answers of a whole batch"
    given = train.get("loss_type", []) if objective == DPO else []
    whole = [value for value in ([given] if isinstance(given, str) else given) if value in _LOSSES_OF_BATCHES]
    return f"train.loss_type {whole[0]} computes one loss for all rows of a batch" if whole else None


def count_answers(objective: str, train: Section) -> int:
    """Return how many answers to a prompt the model generates, each a row of a batch; 1 where it generates none."""
    if not generates_answers(objective):
        return 1
    return int(train.get("num_generations") or _GENERATION_DEFAULTS["num_generations"])


def count_answer_tokens(objective: str, train: Section, max_length: int) -> int:
    """Return how many tokens of a sample are left to the answer that the model generates; 0 where it generates none.

    Raises:
        RecipeError: they leave none to the prompt.
    """
    if not generates_answers(objective):
        return 0
    tokens: int = train.get("max_completion_length", _DEFAULT_ANSWER_TOKENS)
    if tokens >= max_length:
        what = f"an answer may have {tokens} tokens, and a prompt and its answer have {max_length} together"
        raise RecipeError(what, hint=f"train.max_completion_length: {max_length // 2}, or a longer data.max_length")
    return tokens


def _check_generation(train: Section) -> None:
    """Raise RecipeError unless each prompt of a batch has all its answers in it."""
    sizes = {name: train.get(name) or default for name, default in _GENERATION_DEFAULTS.items()}
    answers, rows = sizes["num_generations"], sizes["per_device_train_batch_size"]
    if answers < 2:
        raise RecipeError(f"train.num_generations must be 2 or more answers to a prompt; {answers} was given")
    tokens = train.get("max_completion_length", _DEFAULT_ANSWER_TOKENS)
    if tokens is None or tokens < 1:
        raise RecipeError(f"train.max_completion_length must be 1 token or more; {tokens} was given")
    steps = train.get("steps_per_generation") or sizes["gradient_accumulation_steps"]
    at_once = train.get("generation_batch_size") or rows * steps
    if at_once % answers:
        what = f"{at_once} answers are generated at once, which is no multiple of train.num_generations, {answers}"
        hint = "that is per_device_train_batch_size × gradient_accumulation_steps, or × steps_per_generation"
        raise RecipeError(what, hint=hint)


def _check_loss_weights(train: Section) -> None:
    """Raise RecipeError unless each loss has a weight, where weights are given."""
    weights: Sequence[object] | None = train.get("loss_weights")
    losses = train.get("loss_type", ["sigmoid"])
    if weights is not None and len(weights) != len(losses):
        raise RecipeError(f"train.loss_weights has {len(weights)} values, train.loss_type {len(losses)}")
