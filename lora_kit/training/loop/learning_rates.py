"""What is done to an optimiser after transformers made it: learning rates of their own for B (LoRA+) and the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from lora_kit.errors import RecipeError
from lora_kit.layers.initialization import B
from lora_kit.layers.linear import LoraLinear
from lora_kit.layers.saved_module import SavedModule
from lora_kit.layers.slot_layer import SlotLayer
from lora_kit.layers.unstacked_layer import UpdatedWeightLayer
from lora_kit.models.heads import find_head_modules


@dataclass(frozen=True, kw_only=True)
class LearningRates:
    """What does not learn at the recipe's `learning_rate`.

    Attributes:
        b_ratio: how many times the rate of A that of B is; None for the same.
        head: the rate of the head; None for that of everything else.
        task: of the model, by which its head is known.
    """

    b_ratio: float | None = None
    head: float | None = None
    task: str = "causal-lm"

    @classmethod
    def of(cls, train: Mapping[str, Any], task: str) -> LearningRates:
        """Those of a recipe's `train` section."""
        return cls(b_ratio=train.get("loraplus_lr_ratio"), head=train.get("head_learning_rate"), task=task)

    def apply_to(self, optimizer: torch.optim.Optimizer, model: Any) -> None:
        """Move what has a rate of its own into groups of its own.

        Args:
            optimizer: that has made no step yet, and no schedule.
            model: whose parameters it has.

        Raises:
            RecipeError: the head is to have a rate, and is not trained, or not apart from the embeddings.
        """
        ratio, head = self.b_ratio, self.head
        if ratio is not None:
            _regroup(optimizer, find_lora_b_tensors(model), lambda rate: rate * ratio)
        if head is not None:
            _regroup(optimizer, find_head_tensors(model, self.task), lambda _: head)


ONE_RATE: Final = LearningRates()
"""Everything learns at the recipe's `learning_rate`."""


def find_lora_b_tensors(model: Any) -> list[Tensor]:
    """The B of every layer but embeddings: Hayou et al. 2024, arXiv:2402.12354.

    A and B of an embedding keep their rate: there it is A that begins at zero.
    """
    layers = [module for module in model.modules() if isinstance(module, (LoraLinear, UpdatedWeightLayer))]
    return [leaf for layer in layers for name, leaf in layer.named_parameters(recurse=False) if name.startswith(B)]


def find_head_tensors(model: Any, task: str) -> list[Tensor]:
    """What is trained of the model's head as a whole: its weights, or an adapter's copy of them; no pair's A and B.

    Raises:
        RecipeError: nothing is, or it is the embeddings as well.
    """
    found = list(_iterate_trained_tensors(model, find_head_modules(model, task)))
    if not found:
        hint = "lora.modules_to_save: [head] trains it whole, or leave the rate out"
        raise RecipeError("train.head_learning_rate is given, and the head is not trained", hint=hint)
    embeddings = {id(tensor) for tensor in model.get_input_embeddings().parameters()}
    if any(id(tensor) in embeddings for tensor in found):
        raise RecipeError("train.head_learning_rate: the head of this base is its embeddings too", hint="leave it out")
    return found


def _iterate_trained_tensors(model: Any, paths: tuple[str, ...]) -> Iterator[Tensor]:
    for path in paths:
        for module in model.get_submodule(path).modules():
            if isinstance(module, SavedModule) or not isinstance(module, SlotLayer):
                yield from (leaf for leaf in module.parameters(recurse=False) if leaf.requires_grad)


def _regroup(optimizer: torch.optim.Optimizer, tensors: list[Tensor], rate_from: Callable[[float], float]) -> None:
    """Groups of the same settings but the rate, for these tensors."""
    chosen = {id(tensor) for tensor in tensors}
    for group in list(optimizer.param_groups):
        moved = [tensor for tensor in group["params"] if id(tensor) in chosen]
        if moved:
            group["params"] = [tensor for tensor in group["params"] if id(tensor) not in chosen]
            optimizer.add_param_group({**group, "params": moved, "lr": rate_from(group["lr"])})
