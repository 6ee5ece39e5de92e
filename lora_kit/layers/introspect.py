"""What a base layer is, and how a pair for it begins."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from torch import Tensor, nn

from lora_kit.layers.slot_layer import SlotLayer

_PACKING_FLAG: Final = "support_avx512bf16_for_cpu"


def unwrap_module(module: nn.Module) -> nn.Module:
    """The model's own module inside a wrapper, or inside several."""
    while isinstance(module, SlotLayer):
        module = module.base_layer
    return module


def kind_of(module: nn.Module) -> str | None:
    """`linear`, `embedding`, `convolution`, or None for a module that cannot carry a low-rank pair."""
    module = unwrap_module(module)
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D" or is_quantized_linear(module):
        return "linear"
    return "convolution" if isinstance(module, (nn.Conv1d, nn.Conv2d)) else None


def is_unquantized(tensor: Tensor) -> bool:
    """Whether a tensor is what it shows: floats of 16 bits or more.

    A quantised weight is not: it holds codes, in an integer dtype, in 8 bits with a scale elsewhere, or in a subclass
    of Tensor that shows the dtype it is computed in.
    """
    return type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point() and tensor.dtype.itemsize > 1


def is_quantized_linear(module: nn.Module) -> bool:
    """Whether a module is a quantised linear layer of another make than nn.Linear, as those for GPTQ, AWQ and HQQ are.

    It says how wide it is, holds something other than floats, and its forward maps (..., in) to (..., out): all that a
    pair beside it needs.
    """
    if not all(isinstance(module.__dict__.get(name), int) for name in ("in_features", "out_features")):
        return False
    own = (*module._parameters.values(), *module._buffers.values())
    return any(tensor is not None and not is_unquantized(tensor) for tensor in own)


def is_quantized(module: nn.Module) -> bool:
    """Whether a module, or something in it, holds codes instead of weights."""
    if any(is_quantized_linear(part) for part in module.modules()):
        return True
    return not all(is_unquantized(parameter) for parameter in module.parameters())


def is_stored_transposed(module: nn.Module) -> bool:
    """Whether a layer keeps its weight as (in, out): transformers' Conv1D, and the table of an embedding."""
    module = unwrap_module(module)
    return type(module).__name__ == "Conv1D" or isinstance(module, nn.Embedding)


def features_of(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a layer that carries pairs; for an embedding (entries, dim), for a convolution its channels."""
    module = unwrap_module(module)
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return module.in_channels, module.out_channels
    if type(module).__name__ == "Conv1D":  # transformers' Conv1D keeps its weight as (in, out)
        return int(module.nx), int(module.nf)  # type: ignore[arg-type]
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def pause_packing(model: nn.Module) -> list[nn.Module]:
    """Keep bitsandbytes from packing 4-bit weights; returns the layers that it would have packed.

    At the first inference on some CPUs it packs them in place, into a form that passes no gradient on: the base would
    change under its adapters, and training after an evaluation would go wrong unseen.
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
    """Whether bitsandbytes has packed a 4-bit weight for inference on this CPU."""
    state = getattr(module._parameters.get("weight"), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))
