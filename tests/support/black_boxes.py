"""Quantized bases that are not made by bitsandbytes: by packages where they are installed, and by hand-written layers.

The layers store what GPTQ and AWQ checkpoints do, and are written from their formats: 4-bit codes, eight to an int32,
with a scale and a zero to each group of inputs.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lora_kit.models.loading import load_base
from lora_kit.models.silence import silence_libraries
from tests.support import texts, tiny
from tests.support.merging import base_folder
from tests.support.quantized import llama

GROUP = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs each four bits of AWQ's int32 are, from the lowest."""


def _packed(codes: Tensor, dim: int, order: Sequence[int]) -> Tensor:
    """Eight codes along an axis in one int32."""
    eights = codes.unflatten(dim, (-1, 8)).movedim(dim + 1, -1)
    words = sum(eights[..., own].long() << (4 * place) for place, own in enumerate(order))
    assert isinstance(words, Tensor)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _unpacked(words: Tensor, dim: int, order: Sequence[int]) -> Tensor:
    eights = [(words >> (4 * order.index(own))) & 15 for own in range(8)]
    return torch.stack(eights, dim=dim + 1).flatten(dim, dim + 1)


class _Multiplied(torch.autograd.Function):
    """x W with W made again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Codes) -> Tensor:
        ctx.layer = layer
        return x @ layer.dequantized().to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ ctx.layer.dequantized().to(dy.dtype).mT, None


class Codes(nn.Module):
    """A linear layer that holds 4-bit codes and no parameter. Subclasses say in which order."""

    packed_dim: int
    order: Sequence[int]

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float().mT  # (in, out)
        groups = weight.unflatten(0, (-1, GROUP))
        low, high = groups.amin(1), groups.amax(1)
        scales = (high - low) / 15
        zeros = (-low / scales).round().clamp(0, 15)
        codes = (groups / scales.unsqueeze(1) + zeros.unsqueeze(1)).round().clamp(0, 15).flatten(0, 1)
        self.register_buffer("qweight", _packed(codes, self.packed_dim, self.order))
        self.register_buffer("qzeros", _packed(zeros, 1, self.order))
        self.register_buffer("scales", scales.to(torch.float16))

    def dequantized(self) -> Tensor:
        """(in, out) in fp32."""
        codes = _unpacked(self.get_buffer("qweight"), self.packed_dim, self.order).unflatten(0, (-1, GROUP))
        zeros = _unpacked(self.get_buffer("qzeros"), 1, self.order)
        scales = self.get_buffer("scales").float()
        return ((codes - zeros.unsqueeze(1)) * scales.unsqueeze(1)).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = _Multiplied.apply(x, self)
        return found


class GptqLinear(Codes):
    """qweight (in / 8, out), qzeros (groups, out / 8), scales (groups, out)."""

    packed_dim, order = 0, range(8)


class AwqLinear(Codes):
    """qweight (in, out / 8), qzeros (groups, out / 8), scales (groups, out)."""

    packed_dim, order = 1, _AWQ_ORDER


@dataclass(frozen=True)
class Box:
    """A kind of quantized base.

    Attributes:
        make: the model, always with the same weights.
        plain: the same with ordinary layers of the dequantized weights, where PEFT does not know the layers.
        needs: the package that must be installed.
        stored: whether the model comes from a folder that holds it quantized, through `load_base`.
    """

    make: Callable[[], Any]
    plain: Callable[[], Any] | None = None
    needs: str = "torch"
    stored: bool = False

    @property
    def is_here(self) -> bool:
        return importlib.util.find_spec(self.needs.partition(".")[0]) is not None


def _by_hand(kind: type[Codes]) -> Any:
    model = llama().float()
    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, kind(child))
    return model


def _plain(kind: type[Codes]) -> Any:
    model = _by_hand(kind)
    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Codes):
                linear = nn.Linear(child.in_features, child.out_features, bias=False)
                linear.weight = nn.Parameter(child.dequantized().mT.contiguous())
                setattr(parent, name, linear)
    return model


def _stored(config: Callable[[], Any]) -> Any:
    """Quantized by transformers, saved, and loaded from there."""
    with tempfile.TemporaryDirectory() as name:
        original = base_folder(Path(name) / "original", llama().float())
        with silence_libraries():
            model = transformers.AutoModelForCausalLM.from_pretrained(original, quantization_config=config())
            model.save_pretrained(Path(name) / "base")
            transformers.AutoTokenizer.from_pretrained(original).save_pretrained(Path(name) / "base")
        return load_base(Path(name) / "base").model


def _torchao(kind: str, **settings: Any) -> Any:
    from torchao import quantization

    return transformers.TorchAoConfig(getattr(quantization, kind)(**settings))


def _quanto(bits: str) -> Any:
    with tempfile.TemporaryDirectory() as name, silence_libraries():
        original = base_folder(Path(name), llama().float())
        config = transformers.QuantoConfig(weights=bits)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(original, quantization_config=config)
        return model.eval()


def compressed(folder: Path) -> Tensor:
    """A checkpoint of compressed-tensors, int4 in groups; returns the logits that its weights stand for."""
    from compressed_tensors import quantization as ct
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    with tempfile.TemporaryDirectory() as name, silence_libraries():
        model: Any = load_base(base_folder(Path(name), llama().float())).model
    how = ct.QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP)
    scheme = ct.QuantizationScheme(targets=["Linear"], weights=how)
    config = ct.QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"], format="pack-quantized")
    ct.apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None and hasattr(module, "weight_scale"):
            groups = module.weight.detach().unflatten(1, (-1, GROUP))
            module.weight_scale.data.copy_(calculate_qparams(groups.amin(-1), groups.amax(-1), how)[0])
    logits = tiny.logits(model, tiny.batch())
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    texts.tokenizer().save_pretrained(folder)
    return logits


BOXES = {
    "torchao, int8 weights": Box(lambda: _stored(lambda: _torchao("Int8WeightOnlyConfig")), None, "torchao", True),
    "torchao, int8 weights and activations": Box(
        lambda: _stored(lambda: _torchao("Int8DynamicActivationInt8WeightConfig")), None, "torchao", True
    ),
    "torchao, int4 weights": Box(
        lambda: _stored(lambda: _torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4)), None, "torchao", True
    ),
    "optimum-quanto, int8": Box(lambda: _quanto("int8"), None, "optimum.quanto"),
    "optimum-quanto, int4": Box(lambda: _quanto("int4"), None, "optimum.quanto"),
    "GPTQ, layers written for the test": Box(lambda: _by_hand(GptqLinear), lambda: _plain(GptqLinear)),
    "AWQ, layers written for the test": Box(lambda: _by_hand(AwqLinear), lambda: _plain(AwqLinear)),
}
