"""Layers whose weight the module around them reads: an adapter there would do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_kit as lk
from lora_kit.errors import RoutingError, TargetError
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
    assert find_read_names(ReadsAll()) == {"read"}
    assert find_read_names(CallsIt()) == set()
    assert find_read_names(CallsItAndItsBase()) == {"read"}


def test_a_class_without_source_has_nothing_to_read() -> None:
    names: dict[str, Any] = {}
    exec("def forward(self, x):\n    return x @ self.read.weight", names)
    assert find_read_names(type("Made", (nn.Module,), {"forward": names["forward"]})()) == set()


class Decides(nn.Module):
    """Layers that are called or only read, as the module's mode, its attributes or its inputs say."""

    def __init__(self, limit: float | None = 1.0) -> None:
        super().__init__()
        self.by_mode, self.by_attribute, self.by_input, self.by_return = (nn.Linear(4, 4) for _ in range(4))
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.limit is not None:
            x = x @ self.by_mode.weight.clamp(-self.limit, self.limit).T
        else:
            x = self.by_mode(x)
        x = self.by_attribute(x) if not self.limit else x @ self.by_attribute.weight.T
        x = x @ self.by_input.weight.T if x.ndim > 2 and self.limit else self.by_input(x)
        if self.limit == 1.0:
            return x @ self.by_return.weight.T
        return self.by_return(x)


def test_what_a_module_decides_by_its_mode_and_its_attributes_is_known_beforehand() -> None:
    assert find_read_names(Decides()) == {"by_mode", "by_attribute", "by_return"}
    assert find_read_names(Decides(), training=False) == {"by_attribute", "by_return"}
    assert find_read_names(Decides(None)) == set()
    assert find_read_names(Decides(0.5)) == {"by_mode", "by_attribute"}


def gemma3n() -> nn.Module:
    config = transformers.Gemma3nTextConfig(
        **SIZES, vocab_size=32, vocab_size_per_layer_input=32, hidden_size_per_layer_input=8, num_key_value_heads=1,
        head_dim=8, layer_types=["full_attention"], num_kv_shared_layers=0, laurel_rank=4,
        activation_sparsity_pattern=[0.0],
    )  # fmt: skip
    return transformers.Gemma3nForCausalLM(config)


def test_a_layer_that_only_training_reads_is_not_trained_but_an_adapter_for_it_serves() -> None:
    model, name = gemma3n(), "correction_coefs"
    coverage = survey_coverage(model, lk.LoraConfig(target_modules="all-linear"))
    assert {path.rpartition(".")[2] for path, reason in coverage.skipped if "reads its weight" in reason} == {name}
    with pytest.raises(TargetError, match="AltUp reads its weight directly"):
        lk.attach(model, lk.LoraConfig(target_modules=[name]))
    path = f"base_model.model.model.layers.0.altup.{name}"
    tensors = {f"{path}.lora_A.weight": torch.ones(2, 4), f"{path}.lora_B.weight": torch.ones(4, 2)}
    model.eval()
    ids = torch.arange(6)[None]
    with torch.no_grad():
        base = model(ids).logits
        bank = lk.attach(model)
        bank.load("a", lk.Adapter(lk.LoraConfig(r=2, target_modules=[name]), tensors))
        bank.use("a")
        assert not torch.allclose(model(ids).logits, base)


def bloom(**more: Any) -> nn.Module:
    return transformers.BloomModel(transformers.BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2, **more))


def test_layers_that_a_setting_of_the_model_has_computed_in_slices_are_left_alone() -> None:
    for more, names in (({}, set()), ({"pretraining_tp": 2, "slow_but_exact": True}, {"dense", "dense_4h_to_h"})):
        coverage = survey_coverage(bloom(**more), lk.LoraConfig(target_modules="all-linear"))
        assert {path.rpartition(".")[2] for path, reason in coverage.skipped} == names


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


class ReadsOrCalls(nn.Module):
    """Layers that are called, or whose weight is read by name, by place or in a loop, as an input says."""

    def __init__(self) -> None:
        super().__init__()
        self.named, self.listed = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4), Conv1D(4, 4)])
        self.table, self.other = nn.Embedding(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, read: bool) -> Tensor:
        ids = torch.arange(3)
        if not read:
            return self.listed[1](self.listed[0](self.named(x))) + self.table(ids)
        x = x @ self.named.weight.T + self.named.bias
        x = x @ self.listed[0].weight.T + self.listed[0].bias
        for layer in list(self.listed)[1:]:
            x = x @ layer.weight + layer.bias
        return x + self.table.weight[ids]


@pytest.mark.parametrize(
    "config",
    [
        lk.LoraConfig(r=2, target_modules=["named", "0", "1", "table"], init_lora_weights=False),
        lk.LoraConfig(r=2, target_modules=["named", "0", "1"], init_lora_weights=False, use_dora=True),
        lk.LoraConfig(
            r=2, target_modules=["named", "0"], modules_to_save=["1"], trainable_token_indices={"table": [1]}
        ),
    ],
    ids=["plain", "dora", "whole modules and tokens"],
)
def test_a_weight_that_is_read_where_the_layer_may_also_be_called_has_the_update_of_its_adapter(
    config: lk.LoraConfig,
) -> None:
    torch.manual_seed(0)
    model, x = ReadsOrCalls().eval(), torch.randn(3, 4)
    bank = lk.attach(model, config, name="a")
    own = bank.parameters("a")
    with torch.no_grad():
        for parameter in own:
            parameter += 0.3 * torch.randn_like(parameter)
        base = model.named.weight.clone()  # nobody computes with it here: the base's
    called, read = model(x, False), model(x, True)
    torch.testing.assert_close(read, called, rtol=1e-5, atol=1e-5)
    for one, other in zip(torch.autograd.grad(read.sum(), own), torch.autograd.grad(called.sum(), own), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    bank.use(None)
    assert not torch.allclose(model(x, True), read)
    assert torch.equal(model.named.weight, base)


def test_rows_of_different_adapters_reject_a_weight_that_is_read() -> None:
    config = lk.LoraConfig(r=2, target_modules=["named"], init_lora_weights=False)
    model = ReadsOrCalls().eval()
    bank = lk.attach(model, config, name="a")
    with bank.rows(["a", None, "a"]):
        model(torch.randn(3, 4), False)
        with pytest.raises(RoutingError, match="reads the weight of a Linear and does not call it"):
            model(torch.randn(3, 4), True)


def test_the_attention_of_deberta_reads_the_adapted_weight_where_it_is_given_queries() -> None:
    config = transformers.DebertaConfig(**SIZES, vocab_size=32)
    model = transformers.DebertaModel(config).eval()
    bank = lk.attach(model, lk.LoraConfig(r=2, target_modules=["in_proj"], init_lora_weights=False), name="a")
    weights = []
    attention = model.encoder.layer[0].attention.self
    attention.register_forward_pre_hook(lambda module, _: weights.append(module.in_proj.weight))
    model(torch.arange(6)[None])
    (merged,) = weights
    path = "base_model.model.encoder.layer.0.attention.self.in_proj"
    own = bank.state_dict()["a"]
    delta = 4 * own[f"{path}.lora_B.weight"] @ own[f"{path}.lora_A.weight"]
    torch.testing.assert_close(merged, attention.in_proj.weight + delta)


def test_layers_that_a_model_rescales_in_place_are_left_alone_while_it_does_so() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16, "intermediate_size": 32}
    for rescale, names in ((6, {"output", "value"}), (0, set())):
        config = transformers.RwkvConfig(**sizes, vocab_size=32, rescale_every=rescale)
        coverage = survey_coverage(transformers.RwkvModel(config), lk.LoraConfig(target_modules="all-linear"))
        reasons = {reason for _, reason in coverage.skipped}
        assert {path.rpartition(".")[2] for path, _ in coverage.skipped} == names
        assert all("changes its weight in place" in reason for reason in reasons)
