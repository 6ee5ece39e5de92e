"""Separate learning rates for B (LoRA+) and for the head, set on an optimizer that transformers created."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from lora_kit.config.module_patterns import matches
from lora_kit.errors import RecipeError
from lora_kit.layers.initialization import B
from lora_kit.layers.linear import LoraLinear
from lora_kit.layers.saved_module import SavedModule
from lora_kit.layers.slot_layer import SlotLayer
from lora_kit.layers.unstacked_layer import UpdatedWeightLayer
from lora_kit.models.heads import find_head_modules
from lora_kit.models.tasks import CAUSAL_LM
from lora_kit.training.recipe.coerce import Section

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class LearningRates:
    """Learning rates that differ from the recipe's `learning_rate`.

    Attributes:
        b_ratio: the rate of B divided by that of A; None for 1.
        head: the rate of the head; None for `learning_rate`.
        by_pattern: the rates of modules by a pattern of their path, as in PEFT's `rank_pattern`: a regular expression
            for the end of the path. The first that matches counts.
        task: of the model; it tells which modules are the head.
    """

    b_ratio: float | None = None
    head: float | None = None
    by_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    task: str = CAUSAL_LM

    @classmethod
    def of(cls, train: Section, task: str) -> LearningRates:
        """Return the rates that a recipe's `train` section sets."""
        return cls(
            b_ratio=train.get("loraplus_lr_ratio"),
            head=train.get("head_learning_rate"),
            by_pattern=train.get("learning_rates") or {},
            task=task,
        )

    def apply_to(self, optimizer: torch.optim.Optimizer, model: PreTrainedModel) -> None:
        """Move tensors with a separate rate into separate parameter groups.

        Args:
            optimizer: one without a step or a schedule yet.
            model: the one whose parameters the optimizer updates.

        Raises:
            RecipeError: the head has a separate rate, but is not trained or shares its weight with the embeddings; or a
                pattern matches nothing that is trained.
        """
        ratio, head = self.b_ratio, self.head
        for pattern, tensors in find_tensors_by_pattern(model, self.by_pattern).items():
            _regroup(optimizer, tensors, functools.partial(_return_second, self.by_pattern[pattern]))
        if ratio is not None:
            _regroup(optimizer, find_lora_b_tensors(model), lambda rate: rate * ratio)
        if head is not None:
            _regroup(optimizer, find_head_tensors(model, self.task), lambda _: head)


ONE_RATE: Final = LearningRates()
"""The recipe's `learning_rate` for every tensor."""


def find_tensors_by_pattern(model: nn.Module, patterns: Collection[str]) -> dict[str, list[Tensor]]:
    """Return the trained tensors of the modules that each pattern matches first.

    Raises:
        RecipeError: a pattern matches nothing that is trained, or only what an earlier one matches.
    """
    found: dict[str, dict[int, Tensor]] = {pattern: {} for pattern in patterns}
    taken: set[int] = set()
    for pattern, tensors in found.items():
        for path, module in model.named_modules():
            if matches(rf"(?:.*\.)?(?:{pattern})", path):
                tensors |= {
                    id(leaf): leaf for leaf in module.parameters() if leaf.requires_grad and id(leaf) not in taken
                }
        if not tensors:
            hint = "a pattern is for the end of a module's path, such as 'layers\\.0\\..*'"
            raise RecipeError(f"train.learning_rates: {pattern!r} matches nothing that is trained", hint=hint)
        taken |= tensors.keys()
    return {pattern: list(tensors.values()) for pattern, tensors in found.items()}


def _return_second(rate: float, _: float) -> float:
    """Return a rate, whatever it was before."""
    return rate


def find_lora_b_tensors(model: nn.Module) -> list[Tensor]:
    """Return lora_B of every layer except embeddings: Hayou et al. 2024, arXiv:2402.12354.

    Embeddings keep one rate, since there A is initialized to zero, not B.
    """
    layers = [module for module in model.modules() if isinstance(module, (LoraLinear, UpdatedWeightLayer))]
    return [leaf for layer in layers for name, leaf in layer.named_parameters(recurse=False) if name.startswith(B)]


def find_head_tensors(model: PreTrainedModel, task: str) -> list[Tensor]:
    """Return the trained weights of the model's head, or an adapter's copy of them; not its LoRA weights.

    Raises:
        RecipeError: the head is not trained, or shares its weight with the embeddings.
    """
    tensors = list(_iterate_trained_tensors(model, find_head_modules(model, task)))
    if not tensors:
        hint = "lora.modules_to_save: [head] trains it, or leave the rate out"
        raise RecipeError("train.head_learning_rate is set, but the head is not trained", hint=hint)
    embeddings = {id(tensor) for tensor in model.get_input_embeddings().parameters()}
    if any(id(tensor) in embeddings for tensor in tensors):
        what = "train.head_learning_rate: the head of this base shares its weight with the embeddings"
        raise RecipeError(what, hint="leave it out")
    return tensors


def _iterate_trained_tensors(model: nn.Module, paths: tuple[str, ...]) -> Iterator[Tensor]:
    for path in paths:
        for module in model.get_submodule(path).modules():
            if isinstance(module, SavedModule) or not isinstance(module, SlotLayer):
                yield from (leaf for leaf in module.parameters(recurse=False) if leaf.requires_grad)


def _regroup(optimizer: torch.optim.Optimizer, tensors: list[Tensor], rate_from: Callable[[float], float]) -> None:
    """Move some tensors into groups that differ from their present ones in the learning rate only."""
    moving = {id(tensor) for tensor in tensors}
    for group in list(optimizer.param_groups):
        moved = [tensor for tensor in group["params"] if id(tensor) in moving]
        if moved:
            group["params"] = [tensor for tensor in group["params"] if id(tensor) not in moving]
            optimizer.add_param_group({**group, "params": moved, "lr": rate_from(group["lr"])})
