"""Models that share the tensors of one base: each has modules of its own, so that an adapter can be beside it alone."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn

from lora_kit.models.loading import Base
from lora_kit.models.tasks import LABEL_TASKS
from lora_kit.training.job.base_model import load_recipe_base
from lora_kit.training.recipe.recipe import Recipe

Model = TypeVar("Model", bound=nn.Module)


def copy_without_tensors(model: Model) -> Model:
    """Return a copy of a model whose parameters and buffers are those of the model itself."""
    memo: dict[int, object] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        memo[id(tensor)] = tensor
        state = getattr(tensor, "quant_state", None)  # of a quantized weight; its layer may have it as well
        if state is not None:
            memo[id(state)] = state
    return copy.deepcopy(model, memo)


class SharedBase:
    """The base of several recipes, loaded once.

    Args:
        given: a base that is loaded already, which stays as it is; None to load that of the first recipe.

    Attributes:
        source: what the others share their tensors with; None until one is loaded.
    """

    def __init__(self, given: Base | None = None) -> None:
        self.given = self.source = given

    def copy_source(self) -> Base:
        """Return a base of its own modules, and with the tensors of the source."""
        assert self.source is not None
        return dataclasses.replace(self.source, model=copy_without_tensors(self.source.model))

    def load(self, recipe: Recipe, label2id: Mapping[str, int], problem: str | None) -> Base:
        """Return the base that `load_recipe_base` would return, which shares its tensors with the others.

        Raises:
            BaseModelError: as `load_recipe_base`.
        """
        if self.source is None:
            self.source = load_recipe_base(recipe, label2id, problem)
        elif recipe.task in LABEL_TASKS:  # each has a head of its own, made as it would be alone
            base = load_recipe_base(recipe, label2id, problem)
            _share_equal_tensors(base.model, self.source.model)
            return base
        return self.copy_source()


def _share_equal_tensors(model: nn.Module, source: nn.Module) -> None:
    """Replace the parameters and buffers of a model by those of another one that are the same bit for bit."""
    theirs: dict[str, Tensor] = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    for module_path, module in model.named_modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                other = theirs.get(f"{module_path}.{name}".lstrip("."))
                if tensor is not None and other is not None and _is_same(tensor, other):
                    own[name] = other


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


@contextlib.contextmanager
def freeze_weights(models: Sequence[nn.Module]) -> Iterator[None]:
    """Freeze the parameters of models until the block ends.

    What detaches from one of several models that share them must not thaw them for the others.
    """
    parameters = {id(each): each for model in models for each in model.parameters()}.values()
    before = [(parameter, parameter.requires_grad) for parameter in parameters]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
