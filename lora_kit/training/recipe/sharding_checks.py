"""The key `train.fsdp`: whether the processes of a training share the weights of the base."""

from __future__ import annotations

from typing import Final

from lora_kit.errors import RecipeError
from lora_kit.training.recipe.coerce import Section, check_one_of
from lora_kit.training.recipe.objectives import SFT

FULL_SHARD: Final = "full_shard"
_METHODS: Final = ("lora", "features")


def is_base_sharded(train: Section) -> bool:
    """Return whether each process keeps a part of the base only."""
    return train.get("fsdp") is not None


def check_sharding(train: Section, *, method: str, objective: str, compiled: bool) -> None:
    """Raise RecipeError for a way to share the base that is not known, or does not go with the rest of the recipe."""
    if not is_base_sharded(train):
        return
    check_one_of("train.fsdp", train["fsdp"], (FULL_SHARD,))
    if method not in _METHODS:
        raise RecipeError(f"train.fsdp shards a frozen base; method {method} changes it", hint="use method lora")
    if objective != SFT:
        raise RecipeError(f"train.fsdp does not go with objective {objective}", hint="leave it out")
    if compiled:
        raise RecipeError("compile and train.fsdp do not go together", hint="compile: false")


def check_processes(train: Section, *, processes: int, is_base_given: bool) -> None:
    """Raise RecipeError where there is nobody to share the base with, or it is somebody's own."""
    if not is_base_sharded(train):
        return
    if processes == 1:
        hint = "torchrun --nproc-per-node 2 -m lora_kit train …, or leave it out"
        raise RecipeError("train.fsdp shards the base over several processes; there is one", hint=hint)
    if is_base_given:
        raise RecipeError("train.fsdp would shard the base that was given", hint="give none: the recipe's is loaded")
