"""What a training changes for a while, on a model and in the process, and puts back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lora_kit.errors import BaseModelError


@contextlib.contextmanager
def preserve_model_settings(model: Any) -> Iterator[None]:
    """Puts back, whatever happens, what the Trainer changes on a model besides its trained weights.

    That is: training mode, `config.use_cache`, gradient checkpointing, and what accelerate hangs on the model.
    """
    modes = [(module, module.training) for module in model.modules()]
    attributes, use_cache = dict(vars(model)), model.config.use_cache if hasattr(model.config, "use_cache") else None
    checkpointing = _has_gradient_checkpointing(model)
    try:
        yield
    finally:
        if _has_gradient_checkpointing(model) and not checkpointing:
            _get_renamed_attribute(model, "activation_checkpointing_disable", "gradient_checkpointing_disable")()
        for name in set(vars(model)) - set(attributes):
            delattr(model, name)
        if use_cache is not None:
            model.config.use_cache = use_cache
        elif hasattr(model.config, "use_cache"):
            del model.config.use_cache
        for module, mode in modes:
            module.training = mode


def disable_gradient_checkpointing(model: Any) -> list[nn.Module]:
    """Turn gradient checkpointing off, and give the layers that were checkpointed; none where it was off."""
    if not _has_gradient_checkpointing(model):
        return []
    _get_renamed_attribute(model, "activation_checkpointing_disable", "gradient_checkpointing_disable")()
    return _find_repeated_layers(model)


def _has_gradient_checkpointing(model: Any) -> bool:
    return bool(_get_renamed_attribute(model, "is_activation_checkpointing", "is_gradient_checkpointing"))


def _get_renamed_attribute(model: Any, name: str, older: str) -> Any:
    """An attribute under its present name, or under the one it has in older versions of transformers."""
    return getattr(model, name) if hasattr(type(model), name) else getattr(model, older, None)


@contextlib.contextmanager
def use_deterministic_kernels(device: torch.device) -> Iterator[None]:
    """The same bits from the same run: on CUDA the deterministic kernels, which the CPU always uses."""
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
def compile_layers(model: Any) -> Iterator[None]:
    """Each of the model's repeated layers compiled within; one graph serves batches of any length.

    Raises:
        BaseModelError: the model has no list of layers of one class.
    """
    import torch._dynamo

    layers = _find_repeated_layers(model)
    before = [layer._compiled_call_impl for layer in layers]
    # All layers share their code, so its few graphs (with and without gradients, masks, several rows) count as one's.
    with torch._dynamo.config.patch(recompile_limit=64):
        try:
            for layer in layers:
                layer.compile(dynamic=True)
            yield
        finally:
            for layer, call in zip(layers, before, strict=True):
                layer._compiled_call_impl = call


def _find_repeated_layers(model: Any) -> list[nn.Module]:
    """The longest list of modules of one class: the decoder's (or the encoder's) layers."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    same = [layers for layers in lists if len({type(layer) for layer in layers}) == 1]
    if not same:
        raise BaseModelError(f"{type(model).__name__} has no repeated layers to compile", hint="compile: false")
    return max(same, key=lambda layers: sum(p.numel() for layer in layers for p in layer.parameters()))
