"""The keys of a recipe's `train` section that are ours, those that cannot be set, and our defaults. Needs no torch."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Final, TypedDict


class OwnTrainKeys(TypedDict, total=False):
    """Keys of `train` that are no fields of transformers.TrainingArguments.

    Attributes:
        early_stopping_patience: evaluations that may pass without improvement before the training stops.
        loraplus_lr_ratio: the learning rate of B divided by that of A (Hayou et al. 2024, arXiv:2402.12354).
        head_learning_rate: the learning rate of the head, where all of it is trained.
        learning_rates: learning rates by module, as a mapping from the end of a path to the rate.
        ema_decay: the decay of a moving average of the trained tensors, which is then the result.
        prefix_cache: whether frozen layers below the lowest trained one are computed once and what they give is kept on
            disk: `auto` (the default) where that pays, `off`, or the most gigabytes that it may take.
        fsdp: `full_shard`, where each of several processes keeps a part of the base only.
    """

    early_stopping_patience: int
    loraplus_lr_ratio: float
    head_learning_rate: float
    learning_rates: dict[str, float]
    ema_decay: float
    prefix_cache: bool | float | str
    fsdp: str


OWN_FIELDS: Final[Mapping[str, object]] = typing.get_type_hints(OwnTrainKeys)
"""The types of these keys."""
DEFAULTS: Final[Mapping[str, int | str]] = {"logging_steps": 10, "report_to": "none", "save_total_limit": 2, "seed": 0}
"""Our defaults of `train`, where transformers' own is not wanted."""
SAVE_STRATEGIES: Final[Mapping[str, str]] = {"lora": "steps", "features": "steps", "full": "no", "peft": "steps"}
"""When checkpoints are written, by method: those of `full` hold every weight three times."""
LEARNING_RATES: Final[Mapping[str, float]] = {"lora": 2e-4, "features": 1e-3, "full": 5e-5, "peft": 1e-3}
"""The default learning rate, by method."""

_CHECKPOINTS: Final = "the same recipe resumes from its last checkpoint, which holds everything needed"
_SHARDING: Final = "train.fsdp: full_shard shares the base"
_LAUNCHER: Final = "the launcher decides: torchrun --nproc-per-node 2 -m lora_kit train …"
_COMPILE: Final = "the recipe's `compile: true` compiles the base's layers"
_OURS: Final = "it follows from the rest of the recipe"
_EVALUATION_DTYPE: Final = (
    "an evaluation computes in the dtype of the training: `bf16` or `fp16`, or the recipe's `dtype`"
)
UNSUPPORTED_KEYS: Final[Mapping[str, str]] = {
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
    "bf16_full_eval": _EVALUATION_DTYPE,
    "fp16_full_eval": _EVALUATION_DTYPE,
    "logging_nan_inf_filter": "a loss that is not finite is an error",
    "use_cache": _OURS,
    "save_only_model": _CHECKPOINTS,
    "save_on_each_node": "one process writes, to a folder that all share",
    "resume_from_checkpoint": _CHECKPOINTS,
    "ignore_data_skip": _CHECKPOINTS,
    "restore_callback_states_from_checkpoint": _CHECKPOINTS,
    "enable_jit_checkpoint": _CHECKPOINTS,
    "auto_find_batch_size": "the micro-batch is halved automatically where memory runs out",
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "use_liger_kernel": "it would replace parts of the base, which must not change",
    "liger_kernel_config": "it would replace parts of the base, which must not change",
    "push_to_hub": "nothing is uploaded",
    "deepspeed": f"its broadcast takes no tensor that is stored by columns, as lora_B is; {_SHARDING}",
    "fsdp_config": _SHARDING,
    "parallelism_config": _SHARDING,
    "local_rank": _LAUNCHER,
    "full_determinism": "a run always repeats bit for bit on one machine",
}
"""Fields of transformers.TrainingArguments that a recipe cannot set, and why."""
