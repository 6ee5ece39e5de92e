"""Layers whose weight the module around them reads: an adapter there would do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lora_kit as lk
from lora_kit.errors import TargetError
from lora_kit.targets.bypassed_layers import find_read_names
from lora_kit.targets.coverage import survey_coverage

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


class ReadsAll(nn.Module):
    """Three layers of which only the first is called, in ways that modules of models have."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.inner = nn.Linear(4, 4), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))
        self.checked = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.read, nn.Linear) and self.read.weight is not None:
            x = x.to(self.called.weight.dtype)
        return self._project(self.called(x)) + nn.functional.linear(x, self.called.weight)

    def _project(self, x: Tensor) -> Tensor:
        y = self.inner(x) + self.inner.weight if hasattr(self.inner, "weight") else self.inner(x)
        return y @ self.read.weight.data.T[: self.checked.weight.shape[0]] + self.read.bias

    def unused(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.checked.weight)


class CallsIt(ReadsAll):
    def _project(self, x: Tensor) -> Tensor:
        return self.read(x)


class CallsItAndItsBase(ReadsAll):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.checked(x)


def test_a_layer_whose_weight_alone_is_read_is_found_in_the_source_of_its_class() -> None:
    assert find_read_names(ReadsAll) == {"read"}
    assert find_read_names(CallsIt) == set()
    assert find_read_names(CallsItAndItsBase) == {"read"}


def test_a_class_without_source_has_nothing_to_read() -> None:
    names: dict[str, Any] = {}
    exec("def forward(self, x):\n    return x @ self.read.weight", names)
    assert find_read_names(type("Made", (nn.Module,), {"forward": names["forward"]})) == set()


def wavlm() -> nn.Module:
    config = transformers.WavLMConfig(
        **SIZES, conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, tdnn_dim=(8, 8), tdnn_kernel=(3, 1), tdnn_dilation=(1, 1),
    )  # fmt: skip
    return transformers.WavLMForXVector(config)


def layoutlmv3() -> nn.Module:
    config = transformers.LayoutLMv3Config(
        **SIZES, vocab_size=32, coordinate_size=2, shape_size=4, input_size=16, patch_size=8, rel_pos_bins=4,
        rel_2d_pos_bins=4, max_rel_pos=8, max_rel_2d_pos=8,
    )  # fmt: skip
    return transformers.LayoutLMv3Model(config)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)


@pytest.mark.parametrize(
    ("make", "bypassed"),
    [
        (wavlm, {"q_proj", "k_proj", "v_proj", "out_proj", "kernel"}),
        (layoutlmv3, {"rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"}),
        (encoder, {"linear1", "linear2", "out_proj"}),
    ],
)
def test_what_real_models_read_past_a_wrapper_is_left_alone_and_refused_by_name(make: Any, bypassed: set[str]) -> None:
    model = make()
    coverage = survey_coverage(model, lk.LoraConfig(target_modules="all-linear"))
    assert {path.rpartition(".")[2] for path, reason in coverage.skipped if "reads its weight" in reason} == bypassed
    assert bypassed.isdisjoint(target.path.rpartition(".")[2] for target in coverage.targets)
    for name in bypassed:
        with pytest.raises(TargetError, match="reads its weight directly"):
            lk.attach(model, lk.LoraConfig(target_modules=[name]))


def test_no_module_is_replaced_whose_weight_is_read_past_a_wrapper() -> None:
    config = lk.LoraConfig(target_modules=["intermediate_dense"], modules_to_save=["q_proj"])
    with pytest.raises(TargetError, match=r"q_proj: WavLMAttention reads its weight directly"):
        lk.attach(wavlm(), config)


def test_an_adapter_for_such_layers_does_not_load() -> None:
    model, config = wavlm(), lk.LoraConfig(r=2, target_modules=["q_proj"])
    path = "wavlm.encoder.layers.0.attention.q_proj"
    keys = {f"base_model.model.{path}.lora_A.weight": (2, 16), f"base_model.model.{path}.lora_B.weight": (16, 2)}
    adapter = lk.Adapter(config, {key: torch.ones(shape) for key, shape in keys.items()})
    with pytest.raises(lk.LoraKitError, match="reads its weight directly"):
        lk.attach(model).load("a", adapter)


@pytest.fixture
def _without_fast_path() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.usefixtures("_without_fast_path")
def test_an_encoder_of_torch_without_its_fast_path_is_adapted_in_evaluation_too() -> None:
    torch.manual_seed(0)
    model, x = encoder().eval(), torch.randn(3, 2, 8)
    bank = lk.attach(model, lk.LoraConfig(r=2, target_modules="all-linear"), name="a")
    for parameter in bank.parameters("a"):
        nn.init.normal_(parameter)
    with torch.no_grad():
        adapted = model(x)
        bank.use(None)
        assert not torch.allclose(model(x), adapted)
