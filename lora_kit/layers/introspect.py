"""What kind of layer a module is: its size, whether it is quantized, whether it is a black box."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor, nn

from lora_kit.layers.slot_layer import SlotLayer

PLAIN_TENSOR_TYPES: Final = (Tensor, nn.Parameter)
"""Types of tensors that compute as torch does. Their subclasses compute in ways of their own."""
_PLAIN_PARAMETER_TYPES: Final = (nn.Parameter, type(None), Tensor)
"""The same with None, which stands for a bias that a layer does not have; the most frequent first."""
_PACKING_FLAG: Final = "support_avx512bf16_for_cpu"
_COMPILED_NAME: Final = "_orig_mod"
"""torch's name for the module inside a compiled one."""
WRAPPER_NAMES: Final = (_COMPILED_NAME, "_checkpoint_wrapped_module", "_forward_module", "_fsdp_wrapped_module")
"""Names of the module inside others that torch.compile, checkpoint_wrapper, Lightning and FSDP put around it.

They are in no name of a layer, and of the keys of state dicts they are removed.
"""
_PARALLEL_NAME: Final = "module"
"""Name of the model in what DataParallel, DistributedDataParallel and engines for training put around it."""


def unwrap_module(module: nn.Module) -> nn.Module:
    """Return the model's own module inside a wrapper, or inside several."""
    while isinstance(module, SlotLayer):
        module = module.base_layer
    return module


def unwrap_outer(module: nn.Module) -> nn.Module:
    """Return the module inside what torch.compile, checkpoint_wrapper, Lightning or FSDP put around it; else itself."""
    while (inner := _find_inner(module)) is not None:
        module = inner
    return module


def _find_inner(module: nn.Module) -> nn.Module | None:
    children = module._modules
    return next((children[name] for name in WRAPPER_NAMES if name in children), None) if children else None


def is_compiled(module: nn.Module) -> bool:
    """Return whether `torch.compile(module)` returned a module, alone or inside another that is around it."""
    while (inner := _find_inner(module)) is not None:
        if _COMPILED_NAME in module._modules:
            return True
        module = inner
    return False


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model itself of one that torch.compile, a trainer or an engine put something around."""
    while model is not (inner := _unwrap_parallel(unwrap_outer(model))):
        model = inner
    return model


def _unwrap_parallel(model: nn.Module) -> nn.Module:
    """Return `model.module` of a module that has nothing else."""
    inner = model._modules.get(_PARALLEL_NAME)
    is_around = inner is not None and not (len(model._modules) > 1 or model._parameters or model._buffers)
    return inner if is_around and inner is not None else model


def find_module(model: nn.Module, path: str) -> nn.Module:
    """Return the module of a model at a path, with the wrappers of a bank that are around it.

    Raises:
        AttributeError: there is none.
    """
    module = model
    for name in path.split(".") if path else ():
        child = unwrap_outer(unwrap_module(unwrap_outer(module)))._modules.get(name)
        if child is None:
            raise AttributeError(f"{type(model).__name__} has no module {path}")
        module = child
    return module


def kind_of(module: nn.Module) -> str | None:
    """Return `linear`, `embedding`, `convolution`, or None for a module that cannot have LoRA weights."""
    module = unwrap_module(module)
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D" or is_quantized_linear(module):
        return "linear"
    return "convolution" if isinstance(module, (nn.Conv1d, nn.Conv2d)) else None


def reason_black_box(module: nn.Module) -> str | None:
    """Return why a module may compute something else than its class says; None for a module that computes as it says.

    Quantized, parametrized and hooked layers, and those whose forward was replaced, are black boxes.
    """
    # Look-ups in one dictionary, since this runs in every forward of a linear layer.
    own = module.__dict__
    if own["_forward_pre_hooks"] or own["_forward_hooks"] or own["_backward_pre_hooks"] or own["_backward_hooks"]:
        return "has hooks"
    if "forward" in own:
        return "has a forward of its own"
    for parameter in own["_parameters"].values():
        if type(parameter) not in _PLAIN_PARAMETER_TYPES:
            return f"has a {type(parameter).__name__} for a parameter"
    return None


def maps_features(module: nn.Linear) -> bool:
    """Return whether a module maps (..., in) to (..., out) and returns nothing else, as far as that can be known.

    Subclasses of nn.Linear with a forward of their own may do something else (routers return several tensors). They
    are tried with tensors that have a shape and no values.
    """
    if type(module).forward is nn.Linear.forward or reason_black_box(module) or not is_unquantized(module.weight):
        return True
    tensors = {name: tensor.to("meta") for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    x = torch.empty(2, module.in_features, device="meta", dtype=module.weight.dtype)
    try:
        with torch.no_grad():
            y = torch.func.functional_call(module, tensors, (x,))
    except Exception:  # what it needs is not known
        return True
    return isinstance(y, Tensor) and y.shape == (2, module.out_features)


def is_unquantized(tensor: Tensor) -> bool:
    """Return whether a tensor holds its values themselves: floats of 16 bits or more.

    A quantized weight does not: it holds codes, in an integer dtype, in 8 bits with a scale elsewhere, or in a subclass
    of Tensor that shows the dtype it is computed in.
    """
    return type(tensor) in PLAIN_TENSOR_TYPES and tensor.is_floating_point() and tensor.dtype.itemsize > 1


def is_quantized_linear(module: nn.Module) -> bool:
    """Return whether a module is a quantized linear layer that is no nn.Linear, as those for GPTQ, AWQ and HQQ are.

    It has `in_features` and `out_features`, holds something other than floats, and its forward maps (..., in) to
    (..., out): LoRA weights beside it need no more.
    """
    if not all(isinstance(module.__dict__.get(name), int) for name in ("in_features", "out_features")):
        return False
    own = (*module._parameters.values(), *module._buffers.values())
    return any(tensor is not None and not is_unquantized(tensor) for tensor in own)


def is_quantized(module: nn.Module) -> bool:
    """Return whether a module, or something in it, holds quantized weights."""
    if any(is_quantized_linear(part) for part in module.modules()):
        return True
    return not all(is_unquantized(parameter) for parameter in module.parameters())


def is_stored_transposed(module: nn.Module) -> bool:
    """Return whether a layer keeps its weight as (in, out): transformers' Conv1D, and an embedding."""
    module = unwrap_module(module)
    return type(module).__name__ == "Conv1D" or isinstance(module, nn.Embedding)


def features_of(module: nn.Module) -> tuple[int, int]:
    """Return (in, out) of a layer that can have LoRA weights.

    For an embedding these are its entries and its dimension, for a convolution its channels.
    """
    module = unwrap_module(module)
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return module.in_channels, module.out_channels
    if type(module).__name__ == "Conv1D":  # transformers' Conv1D keeps its weight as (in, out)
        return int(module.nx), int(module.nf)  # type: ignore[arg-type]
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def pause_packing(model: nn.Module) -> list[nn.Module]:
    """Keep bitsandbytes from packing 4-bit weights; return the layers that it would have packed.

    At the first inference on some CPUs it packs them in place, into a form that passes no gradient on. The base would
    change under its adapters, and training after an evaluation would go wrong without a message.
    """
    layers = [module for module in model.modules() if getattr(module, _PACKING_FLAG, False) and not is_packed(module)]
    for layer in layers:
        setattr(layer, _PACKING_FLAG, False)
    return layers


def resume_packing(layers: Iterable[nn.Module]) -> None:
    """Undo `pause_packing`."""
    for layer in layers:
        setattr(layer, _PACKING_FLAG, True)


def is_packed(module: nn.Module) -> bool:
    """Return whether bitsandbytes has packed a 4-bit weight for inference on this CPU."""
    state = getattr(module._parameters.get("weight"), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))
