"""Frozen layers are left out where a model is the same without them, bit for bit: in every family but two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lora_kit.errors import VerificationError
from lora_kit.models.frozen_prefix import (
    FrozenPrefix,
    PrefixStates,
    estimate_saved_share,
    find_frozen_prefix,
    reason_not_replaceable,
)
from lora_kit.training.loop.frozen_modules import find_modules_without_gradient
from tests.support import tiny
from tests.support.families import FAMILIES, Family

NO_LAYERS = {"ALBERT": "one layer is used again and again", "CLIP": "it reads the mask that its layers are given"}
"""Families of which nothing can be left out, and why."""
TOKEN_FAMILIES = [family for family in FAMILIES if "input_ids" in family.inputs()]


def batch_of(family: Family) -> dict[str, Tensor]:
    """Inputs of rows of unlike length."""
    inputs = {name: tensor for name, tensor in family.inputs().items() if name != "labels"}
    ids = inputs["input_ids"]
    mask = torch.ones_like(ids)
    mask[1:, -2:] = 0
    batch = {**inputs, "attention_mask": mask}
    if family.make().config.is_encoder_decoder:
        batch["decoder_input_ids"] = family.inputs()["labels"].clamp(min=0)
    return batch


def train_upper_part(model: Any) -> None:
    """Train the last layer alone, or the layers of a decoder."""
    model.requires_grad_(False)
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len({*map(type, part)}) == 1]
    layers = max(lists, key=lambda part: sum(weight.numel() for weight in part.parameters()))
    if model.config.is_encoder_decoder:
        decoder = model.get_decoder()
        layers = next(part for part in decoder.children() if isinstance(part, nn.ModuleList))
        layers.requires_grad_(True)
    else:
        layers[-1].requires_grad_(True)


def find_in(model: nn.Module, batch: dict[str, Tensor]) -> FrozenPrefix | None:
    return find_frozen_prefix(model, find_modules_without_gradient(model, batch))


@pytest.mark.parametrize("family", TOKEN_FAMILIES, ids=lambda family: family.name)
def test_the_frozen_layers_of_a_family_are_left_out_bit_for_bit(family: Family) -> None:
    model, batch = family.make(), batch_of(family)
    train_upper_part(model)
    prefix = find_in(model, batch)
    if family.name in NO_LAYERS:
        assert prefix is None or reason_not_replaceable(model, prefix, batch) is not None
        return
    assert prefix is not None
    assert prefix.path.startswith(("encoder", "model.encoder")) or len(prefix.layers) == prefix.total - 1
    assert reason_not_replaceable(model, prefix, batch) is None
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_whose_upper_layers_read_more_of_the_lower_ones_is_rejected() -> None:
    config = transformers.Gemma3nTextConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=8,
        layer_types=["full_attention"] * 6,
        activation_sparsity_pattern=[0.0] * 6,
        laurel_rank=4,
    )
    model = transformers.Gemma3nForCausalLM(config).eval()
    layers = model.model.layers
    model.requires_grad_(False)
    layers[5].requires_grad_(True)
    batch = {"input_ids": torch.arange(3, 13).view(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    prefix = FrozenPrefix("model.layers", tuple(layers[:5]), 6)
    assert reason_not_replaceable(model, prefix, batch) is not None


def test_a_model_that_mixes_what_its_layers_give_is_rejected() -> None:
    """The upper part reads an earlier layer, too: with the last states alone the logits would be others."""
    model, batch = tiny.llama(), {**tiny.batch(), "attention_mask": torch.ones_like(tiny.batch()["input_ids"])}
    layers = model.model.layers
    noted: list[Tensor] = []
    layers[0].register_forward_hook(lambda module, args, output: noted.append(output))
    model.model.norm.register_forward_hook(lambda module, args, output: output + noted[-1].sum())
    prefix = FrozenPrefix("model.layers", tuple(layers[:2]), 2)
    zero_first = layers[0].register_forward_hook(lambda module, args, output: output * 1.0)
    reason = reason_not_replaceable(model, prefix, batch)
    zero_first.remove()
    assert reason == "with the states of model.layers alone the model gives other logits"


def test_the_states_of_samples_are_handed_on_with_padding() -> None:
    model = tiny.bert()
    rows = [torch.tensor([5, 6, 7, 8]), torch.tensor([9, 10])]
    prefix = FrozenPrefix("bert.encoder.layer", tuple(model.bert.encoder.layer[:1]), 2)
    with torch.no_grad():
        states = torch.cat([prefix.compute_output(model, {"input_ids": row[None]}).states[0] for row in rows])
        kept = PrefixStates(prefix, states, torch.tensor([0, 4, 6]), 0)
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": (ids > 0).long()}
        whole = model(**inputs).logits
        with kept.replace_layers([0, 1], torch.device("cpu")):
            torch.testing.assert_close(model(**inputs).logits, whole)
        with kept.replace_layers([1, 1], torch.device("cpu")):
            short = model(input_ids=ids[:, :2]).logits
        torch.testing.assert_close(short[1], whole[1])
        assert not torch.allclose(short[0], whole[0])  # the states decide, not the tokens


def test_the_model_is_as_before_where_computing_the_states_fails() -> None:
    model = tiny.llama()
    prefix = FrozenPrefix("model.layers", (nn.Identity(),), 2)
    with pytest.raises(VerificationError, match="does not compute"):
        prefix.compute_output(model, tiny.batch())
    assert not any(module._forward_hooks for module in prefix.layers)


def test_a_step_is_cheaper_by_the_share_of_the_frozen_layers() -> None:
    model = tiny.bert()
    layers = tuple(model.bert.encoder.layer)
    shares = [estimate_saved_share(model, FrozenPrefix("", layers[:count], 2)) for count in (1, 2)]
    assert 0 < shares[0] < 1 / 3 < shares[1] < 1
