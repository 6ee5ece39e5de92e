"""Hooks of a bank's model: a forward and a generation keep the route that they began with, and have its rows."""

from __future__ import annotations

import copy
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from lora_kit.bank.routes import RouteChoices
from lora_kit.bank.row_count import GENERATE, INPUT_NAMES, check_prompt_count, check_row_count, list_inputs
from lora_kit.layers.forward_scope import ForwardScope, Sizes, leading_sizes
from lora_kit.layers.route import BASE_SLOT
from lora_kit.layers.route_stack import find_module_call
from lora_kit.layers.routing import Routing
from lora_kit.layers.slot_layer import SlotLayer
from lora_kit.layers.token_runs import RunRoute, check_token_count
from lora_kit.torch_utils import preserve_random_states, use_eval_mode

_PART_INPUTS: Final = frozenset(INPUT_NAMES) - {"inputs", "encoder_outputs"}


class ForwardHooks:
    """Hooks by which each call of a module is a forward with one route.

    Args:
        routing: what the layers read.
        is_part: whether the module is a part of the bank's model: inside a forward of that, its calls are no others.
    """

    def __init__(self, routing: Routing, *, is_part: bool) -> None:
        self._routing = routing
        self._is_part = is_part

    def register(self, module: nn.Module) -> list[RemovableHandle]:
        """Register the hooks; return their handles."""
        return [
            module.register_forward_pre_hook(self.begin, with_kwargs=True),
            module.register_forward_hook(self.end, always_call=True),
        ]

    def begin(self, module: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        """Begin a forward.

        Raises:
            RoutingError: its batch has not one row for each that `rows` named.
        """
        # A check of the number of rows would make compiled code be compiled again for each.
        if torch.compiler.is_compiling():
            return
        outer = self._routing.get_forward()
        if self._is_part and outer is not None:
            return
        route = self._routing.get_upcoming()
        inputs = list_inputs(args, kwargs) if route.row_count is not None or route.mixed else []
        if isinstance(route, RunRoute):
            check_token_count(route, list_inputs(args, kwargs))
        if route.row_count is not None and inputs:
            check_row_count(route.row_count, inputs[0])
        forward = ForwardScope(route, inputs, frame=find_module_call(), outer=outer)
        if forward.batch is not None:
            forward.measure_one_row = partial(
                self._measure_one_row, module, args, kwargs, forward.batch, forward.fullest_row or 0
            )
        self._routing.begin_forward(forward)

    def _measure_one_row(
        self, module: nn.Module, args: Sequence[object], kwargs: Mapping[str, object], batch: int, row: int
    ) -> Mapping[nn.Module, set[Sizes]]:
        """Return the leading sizes of each layer's inputs in a forward of a row alone, with the base.

        Empty where the module cannot compute one row, as with a cache of all rows: then nothing is known.
        """
        recorder, base = _SizeRecorder(), self._routing.make_route((BASE_SLOT,))
        layers = [layer for layer in module.modules() if isinstance(layer, SlotLayer)]
        hooks = [layer.register_forward_pre_hook(recorder) for layer in layers]
        random = preserve_random_states(layers[0].device)
        try:
            with torch.no_grad(), use_eval_mode(module), random, self._routing.repeat_forward(base, None):
                module(*_select_row(tuple(args), batch, row), **_select_row(dict(kwargs), batch, row))
        except Exception:
            return {}
        finally:
            for hook in hooks:
                hook.remove()
        return recorder.sizes

    def end(self, module: nn.Module, args: object, output: object) -> None:
        """End the forward that the same call began."""
        if torch.compiler.is_compiling():
            return
        forward = self._routing.get_forward()
        if forward is not None and forward.frame is find_module_call():
            self._routing.end_forward(forward)


def remove_copied_hooks(model: nn.Module) -> None:
    """Take away what a copy of a model with a bank brought along."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if _is_own_hook(hook)]:
                del hooks[key]
    generate = model.__dict__.get(GENERATE)
    if isinstance(generate, RoutedGenerate):
        generate.remove()


def _is_own_hook(hook: object) -> bool:
    return isinstance(getattr(hook, "__self__", None), ForwardHooks)


class _SizeRecorder:
    """Notes the leading sizes of what layers are given in one thread."""

    def __init__(self) -> None:
        self.sizes: dict[nn.Module, set[Sizes]] = {}
        self._thread = threading.get_ident()

    def __call__(self, layer: nn.Module, args: Sequence[object]) -> None:
        if args and isinstance(args[0], Tensor) and threading.get_ident() == self._thread:
            self.sizes.setdefault(layer, set()).add(tuple(leading_sizes(args[0])))


class RoutedGenerate:
    """`model.generate` with one route from its first step to its last. It stands in the model's own attributes.

    Args:
        model: whose generation it is.
        choices: of the bank.
    """

    def __init__(self, model: nn.Module, choices: RouteChoices) -> None:
        self._model = model
        self._choices = choices
        self._own: Callable[..., object] | None = model.__dict__.get(GENERATE)  # else its class has the method
        model.__dict__[GENERATE] = self

    def remove(self) -> None:
        """Give the model its own method back, unless somebody else has replaced this."""
        if self._model.__dict__.get(GENERATE) is self:
            del self._model.__dict__[GENERATE]
            if self._own is not None:
                self._model.__dict__[GENERATE] = self._own

    @property
    def __wrapped__(self) -> Callable[..., object]:
        if self._own is not None:
            return self._own
        method: Callable[..., object] = getattr(type(self._model), GENERATE).__get__(self._model)
        return method

    def __call__(self, *args: object, **kwargs: object) -> object:
        with self._choices.enter_generation(sys._getframe()) as route:
            prompts = list_inputs(args, kwargs) if route.row_count is not None else []
            if route.row_count is not None and prompts:
                check_prompt_count(route.row_count, prompts[0])
            return self.__wrapped__(*args, **kwargs)


def find_parts(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of a model that people call by themselves: those that are given a batch by its name."""
    kinds = dict.fromkeys(type(module) for module in model.modules() if module._modules)
    takes_batch = {kind: not _PART_INPUTS.isdisjoint(_list_parameters(kind)) for kind in kinds}
    for module in model.modules():
        if module is not model and takes_batch.get(type(module), False):
            yield module


def _list_parameters(kind: type[nn.Module]) -> Iterable[str]:
    try:
        return inspect.signature(kind.forward).parameters
    except (TypeError, ValueError):  # written in another language
        return ()


def _select_row(values: object, batch: int, row: int) -> Any:
    """Return a call's arguments for a row alone; objects that a forward changes are copied."""

    def select(value: object) -> object:
        if isinstance(value, Tensor):
            return value[row : row + 1] if value.ndim and value.shape[0] == batch else value
        return copy.deepcopy(value)

    return tree_map(select, values)
