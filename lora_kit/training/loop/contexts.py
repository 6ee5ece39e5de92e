"""What a training changes on a model and in the process while it runs, and restores afterwards."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_kit.errors import BaseModelError
from lora_kit.models.loading import Base

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def set_up_training(base: Base, *, compiled: bool) -> Iterator[str]:
    """Prepare a base and the process for a training; both are restored afterwards.

    Args:
        compiled: whether the base's repeated layers are compiled.

    Yields:
        A temporary folder: transformers.Trainer requires one, though nothing is written to it.

    Raises:
        BaseModelError: the base has no repeated layers to compile.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="lora_kit-"))
        stack.enter_context(use_deterministic_kernels(base.device))
        stack.enter_context(preserve_model_settings(base.model))
        if compiled:
            stack.enter_context(compile_layers(base.model))
        yield folder


@contextlib.contextmanager
def preserve_model_settings(model: PreTrainedModel) -> Iterator[None]:
    """Restore at the end of the block what the Trainer changes on a model besides its trained weights.

    That is: training mode, `config.use_cache`, gradient checkpointing, and attributes that accelerate adds; and what
    TRL sets besides: dropout, the pad token, and gradients of the embeddings' output.
    """
    modes = [(module, module.training) for module in model.modules()]
    attributes, use_cache = set(vars(model)), getattr(model.config, "use_cache", None)
    had_checkpointing = _has_gradient_checkpointing(model)
    dropouts = [(module, module.p) for module in model.modules() if isinstance(module, nn.Dropout)]
    pads = [(config, config.pad_token_id) for config in _list_configs_with_pad(model)]
    try:
        yield
    finally:
        for dropout, probability in dropouts:
            dropout.p = probability
        for config, pad in pads:
            config.pad_token_id = pad
        if {"_require_grads_hook", "_require_grads_hooks"} & (set(vars(model)) - attributes):
            model.disable_input_require_grads()
        if not had_checkpointing:
            _disable_gradient_checkpointing(model)
        for name in set(vars(model)) - attributes:
            delattr(model, name)
        if use_cache is not None:
            model.config.use_cache = use_cache
        elif hasattr(model.config, "use_cache"):
            del model.config.use_cache
        for module, mode in modes:
            module.training = mode


def _list_configs_with_pad(model: PreTrainedModel) -> list[Any]:
    """Return the configs of a model in which TRL sets the pad token."""
    generation = getattr(model, "generation_config", None)
    return [model.config.get_text_config(), *([generation] if generation is not None else [])]


def start_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Have the layers of a model compute their forward again in the backward, instead of keeping what it gave."""
    enable: Callable[[], None] = getattr(model, _choose_name(model, "{}_checkpointing_enable"))
    enable()


def _disable_gradient_checkpointing(model: PreTrainedModel) -> bool:
    """Turn gradient checkpointing off; return whether it was on."""
    was_on = _has_gradient_checkpointing(model)
    if was_on:
        disable: Callable[[], None] = getattr(model, _choose_name(model, "{}_checkpointing_disable"))
        disable()
    return was_on


def _has_gradient_checkpointing(model: PreTrainedModel) -> bool:
    return bool(getattr(model, _choose_name(model, "is_{}_checkpointing"), False))


def _choose_name(model: PreTrainedModel, pattern: str) -> str:
    """Return the attribute's name in newer versions of transformers if the model has it, else the older name."""
    newer = pattern.format("activation")
    return newer if hasattr(type(model), newer) else pattern.format("gradient")


@contextlib.contextmanager
def use_deterministic_kernels(device: torch.device) -> Iterator[None]:
    """Make a run repeat bit for bit: use the deterministic kernels of CUDA; those of the CPU always are."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


@contextlib.contextmanager
def compile_layers(model: nn.Module) -> Iterator[None]:
    """Compile each of the model's repeated layers until the block ends; one graph serves batches of any length.

    Raises:
        BaseModelError: the model has no list of layers of one class.
    """
    import torch._dynamo

    layers = find_repeated_layers(model)
    before = [layer._compiled_call_impl for layer in layers]
    # All layers share their code, so its graphs (with and without gradients, masks, several rows) count as one layer's.
    with torch._dynamo.config.patch(recompile_limit=64):
        try:
            for layer in layers:
                layer.compile(dynamic=True)
            yield
        finally:
            for layer, call in zip(layers, before, strict=True):
                layer._compiled_call_impl = call


def find_repeated_layers(model: nn.Module) -> list[nn.Module]:
    """Return the largest list of modules of one class: the layers of the decoder (or encoder)."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    same = [layers for layers in lists if len({type(layer) for layer in layers}) == 1]
    if not same:
        raise BaseModelError(f"{type(model).__name__} has no repeated layers", hint="compile: false, and no train.fsdp")
    return max(same, key=lambda layers: sum(p.numel() for layer in layers for p in layer.parameters()))
