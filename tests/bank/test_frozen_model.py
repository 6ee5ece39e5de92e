"""What other code does to a model that has a bank: ties and replaces weights, resizes embeddings, calls it by name."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import lora_kit as lk
from lora_kit.errors import BankError
from tests.support import tiny

COVERED: dict[str, tuple[dict[str, Any], str]] = {
    "head": ({"target_modules": ["lm_head"]}, "output"),
    "embedding": ({"target_modules": ["embed_tokens"]}, "input"),
    "saved head": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "output"),
    "tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": [3]}, "input"),
}
every_covered = pytest.mark.parametrize("case", COVERED)


def attached(*, tie: bool = False, **fields: Any) -> tuple[Any, lk.AdapterBank]:
    """A model with a bank whose adapter is not zero."""
    model = tiny.llama(tie=tie)
    bank = lk.attach(model, lk.LoraConfig(r=2, **fields), name="a")
    with torch.no_grad():
        for leaf in bank.parameters("a"):
            leaf.add_(0.1)
    return model, bank


@pytest.mark.parametrize("tie", [False, True])
@every_covered
def test_tied_weights_are_tied_again_in_the_layers_own_modules(case: str, tie: bool) -> None:
    model, bank = attached(tie=tie, **COVERED[case][0])
    expected = tiny.logits(model, tiny.batch())
    names = list(model.state_dict())
    model.tie_weights()
    assert torch.equal(tiny.logits(model, tiny.batch()), expected)
    assert list(model.state_dict()) == names
    bank.detach()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie


def test_a_weight_that_is_put_into_a_wrapper_is_the_base_layers() -> None:
    model, bank = attached(target_modules=["q_proj"], use_dora=True)
    layer = model.model.layers[0].self_attn.q_proj
    changed = nn.Parameter(layer.weight.detach() * 2, requires_grad=False)
    layer.weight = changed
    assert layer.base_layer.weight is changed
    adapted = tiny.logits(model, tiny.batch())
    fresh = tiny.llama()
    fresh.model.layers[0].self_attn.q_proj.weight = changed
    other = lk.attach(fresh)
    other.load("a", bank.snapshot("a"), allow=["other-base"])
    other.use("a")
    torch.testing.assert_close(tiny.logits(fresh, tiny.batch()), adapted)
    bank.detach()
    assert model.model.layers[0].self_attn.q_proj.weight is changed


@every_covered
def test_a_functional_call_takes_the_bases_state_dict_and_leaves_the_model_as_it_was(case: str) -> None:
    model, _ = attached(tie=case == "tokens", **COVERED[case][0])
    expected, state = tiny.logits(model, tiny.batch()), model.state_dict()
    call = torch.func.functional_call(model, state, (), tiny.batch()).logits
    torch.testing.assert_close(call, expected)
    # A head that is saved as a whole is the adapter's own: all its other inputs are zero then.
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    assert not torch.func.functional_call(model, zeros, (), tiny.batch()).logits.any()
    assert torch.equal(tiny.logits(model, tiny.batch()), expected)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())


@every_covered
def test_embeddings_are_not_resized_under_adapters_that_cover_them(case: str) -> None:
    fields, which = COVERED[case]
    model, bank = attached(**fields)
    expected, size = tiny.logits(model, tiny.batch()), model.config.vocab_size
    for call in (
        lambda: model.resize_token_embeddings(size + 8),
        lambda: model.resize_token_embeddings(pad_to_multiple_of=64),
        lambda: getattr(model, f"set_{which}_embeddings")(nn.Embedding(size, model.config.hidden_size)),
    ):
        with pytest.raises(BankError, match=f"get_{which}_embeddings returns, which adapters cover"):
            call()
    assert torch.equal(tiny.logits(model, tiny.batch()), expected)
    assert model.resize_token_embeddings(size) is model.get_input_embeddings()  # nothing changes
    assert all(leaf.requires_grad for leaf in bank.parameters("a"))
    bank.detach()
    assert not {"resize_token_embeddings", "set_input_embeddings", "set_output_embeddings"} & vars(model).keys()
    assert model.resize_token_embeddings(size + 8).num_embeddings == size + 8


def test_embeddings_are_resized_under_adapters_of_other_layers() -> None:
    model, bank = attached(target_modules=["q_proj"])
    expected, size = tiny.logits(model, tiny.batch()), model.config.vocab_size
    model.resize_token_embeddings(size + 8)
    resized = tiny.logits(model, tiny.batch())
    assert torch.equal(resized[..., :size], expected)
    bank.use(None)
    assert not torch.equal(tiny.logits(model, tiny.batch()), resized)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_has_guards_of_its_own(way: str) -> None:
    model, bank = attached(target_modules=["embed_tokens"])
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(tiny.logits(twin, tiny.batch()), tiny.logits(model, tiny.batch()))
    bank.detach()
    with pytest.raises(BankError, match="adapters cover"):
        twin.resize_token_embeddings(200)
    model.resize_token_embeddings(200)
    assert twin.get_input_embeddings().num_embeddings == twin.config.vocab_size
