"""The state dict of a model with a bank is the base's, and the bank has one of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lora_kit as lk
from lora_kit.errors import AdapterError
from tests.support import tiny
from tests.support.families import FAMILIES

_MIXTRAL = next(family for family in FAMILIES if family.name == "Mixtral with experts")


class Convolved(nn.Module):
    """A convolution, a normalization with buffers, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.score = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.score(self.norm(self.conv(x)).mean(-1))
        return scores


def _tied() -> nn.Module:
    return tiny.llama(tie=True)


CASES: dict[str, tuple[Callable[[], nn.Module], list[dict[str, Any]]]] = {
    "linear": (tiny.llama, [{"target_modules": "all-linear"}]),
    "DoRA": (tiny.llama, [{"target_modules": ["q_proj"], "use_dora": True}]),
    "Conv1D": (tiny.gpt2, [{"target_modules": "all-linear"}]),
    "embedding, tied": (_tied, [{"target_modules": ["embed_tokens", "q_proj"]}]),
    "saved module": (tiny.bert, [{"target_modules": ["query"], "modules_to_save": ["classifier"]}]),
    "tokens of tied weights": (_tied, [{"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}]),
    "two around one embedding": (
        _tied,
        [{"target_modules": ["embed_tokens"]}, {"target_modules": [], "trainable_token_indices": [5]}],
    ),
    "initialized from weights": (tiny.llama, [{"target_modules": ["q_proj"], "init_lora_weights": "pissa"}]),
    "experts": (_MIXTRAL.make, [{"target_modules": "all-linear", **_MIXTRAL.more}]),
    "convolution": (Convolved, [{"target_modules": ["conv"], "modules_to_save": ["norm", "score"]}]),
}
every_case = pytest.mark.parametrize("case", CASES)


def attached(case: str) -> tuple[nn.Module, nn.Module, lk.AdapterBank]:
    """A base, a copy of it with a bank whose adapters are not zero, and the bank."""
    make, configs = CASES[case]
    base = make()
    model = copy.deepcopy(base)
    bank = lk.attach(model, dtype=torch.float32)
    for number, fields in enumerate(configs):
        bank.add(f"a{number}", lk.LoraConfig(r=2, **fields))
        with torch.no_grad():
            for leaf in bank.parameters(f"a{number}"):
                leaf.add_(0.1)
    bank.use("a0")
    return base, model, bank


def assert_same(one: Any, other: Any) -> None:
    assert list(one) == list(other)
    assert all(torch.equal(one[key], other[key]) for key in one)


@every_case
def test_it_is_the_bases_key_by_key_in_the_same_memory(case: str) -> None:
    base, model, _ = attached(case)
    expected, state = base.state_dict(), model.state_dict()
    assert_same(state, expected)
    assert state._metadata == expected._metadata  # type: ignore[attr-defined]
    own = {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    assert {tensor.data_ptr() for tensor in state.values()} <= own
    kept = model.state_dict(prefix="model.", keep_vars=True)
    assert list(kept) == [f"model.{key}" for key in expected]


@every_case
def test_it_loads_as_the_base_and_nothing_of_the_bank_changes(case: str) -> None:
    base, model, bank = attached(case)
    adapters = copy.deepcopy(bank.state_dict())
    changed = {key: tensor + 1 for key, tensor in base.state_dict().items()}
    result = model.load_state_dict(changed)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same(model.state_dict(), changed)
    for name, tensors in bank.state_dict().items():
        assert_same(tensors, adapters[name])
    bank.detach()
    assert_same(model.state_dict(), changed)


# What an adapter was initialized from belongs to the base that it was made for.
@pytest.mark.parametrize("case", [case for case in CASES if case != "initialized from weights"])
def test_outputs_follow_the_weights_that_were_loaded(case: str) -> None:
    base, model, bank = attached(case)
    x = {"x": torch.randn(2, 4, 6)} if case == "convolution" else tiny.batch()
    changed = {key: tensor * 1.25 for key, tensor in base.state_dict().items()}
    base.load_state_dict(changed)
    fresh = lk.attach(base, dtype=torch.float32)
    for number, fields in enumerate(CASES[case][1]):
        fresh.add(f"a{number}", lk.LoraConfig(r=2, **fields))
    fresh.load_state_dict(bank.state_dict())
    model.load_state_dict(changed)
    model.eval()
    base.eval()
    with torch.no_grad():
        for name in (None, *bank.names):
            bank.use(name)
            fresh.use(name)
            one, other = model(**x), base(**x)
            assert torch.equal(
                one if case == "convolution" else one.logits, other if case == "convolution" else other.logits
            )


def test_what_does_not_match_is_named_by_the_bases_names() -> None:
    base, model, _ = attached("linear")
    state = dict(base.state_dict())
    key = "model.layers.0.self_attn.q_proj.weight"
    state["model.layers.0.self_attn.q_proj.bias"] = state.pop(key)
    result = model.load_state_dict(state, strict=False)
    assert result.missing_keys == [key]
    assert result.unexpected_keys == ["model.layers.0.self_attn.q_proj.bias"]
    state[key] = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match=f"size mismatch for {key}"):
        model.load_state_dict(state, strict=False)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(
            {**base.state_dict(), "model.layers.0.self_attn.q_proj.base_layer.weight": torch.zeros(1)}
        )


@pytest.mark.parametrize("case", ["linear", "Conv1D", "saved module", "tokens of tied weights", "experts"])
def test_a_saved_model_reloads_as_the_base_bit_for_bit(case: str, tmp_path: Path) -> None:
    base, model, _ = attached(case)
    model.save_pretrained(tmp_path / "pretrained")  # type: ignore[operator]
    reloaded = type(base).from_pretrained(tmp_path / "pretrained")  # type: ignore[attr-defined]
    assert_same(reloaded.state_dict(), base.state_dict())
    torch.save(model.state_dict(), tmp_path / "state.pt")
    fresh = CASES[case][0]()
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same(fresh.state_dict(), base.state_dict())


def test_a_checkpoint_of_transformers_trainer_reloads_as_the_base(tmp_path: Path) -> None:
    base, model, bank = attached("linear")
    rows = [{key: tensor[0] for key, tensor in tiny.batch(1).items()} for _ in range(4)]
    for row in rows:
        row["labels"] = row["input_ids"]
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=1, report_to=[], use_cpu=True, learning_rate=0.1
    )
    before = copy.deepcopy(bank.state_dict())
    trainer = transformers.Trainer(model, args, train_dataset=rows)
    trainer.train()
    assert any(not torch.equal(tensor, before["a0"][key]) for key, tensor in bank.state_dict()["a0"].items())
    reloaded = type(base).from_pretrained(tmp_path / "checkpoint-2")  # type: ignore[attr-defined]
    assert_same(reloaded.state_dict(), base.state_dict())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_keeps_its_keys_and_codes(bits: int) -> None:
    import bitsandbytes as bnb

    torch.manual_seed(0)
    layer = (
        bnb.nn.Linear4bit(64, 64, quant_type="nf4")
        if bits == 4
        else bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    )
    model = nn.Sequential(layer, nn.Linear(64, 4)).to("cpu")
    expected = {key: value.clone() if isinstance(value, Tensor) else value for key, value in model.state_dict().items()}
    lk.attach(model, lk.LoraConfig(r=2, target_modules=["0", "1"]))
    state = model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(value, expected[key]) for key, value in state.items() if isinstance(value, Tensor))


# The bank's own


@every_case
def test_a_banks_state_is_what_is_trained_and_loads_bit_for_bit(case: str, tmp_path: Path) -> None:
    _, _, bank = attached(case)
    assert sum(len(tensors) for tensors in bank.state_dict().values()) == sum(
        1 for name in bank.names for _ in bank.parameters(name)
    ) + sum(key.endswith("num_batches_tracked") for key in bank.state_dict()["a0"])
    torch.save(bank.state_dict(), tmp_path / "bank.pt")
    saved = torch.load(tmp_path / "bank.pt", weights_only=True)
    with torch.no_grad():
        for name in bank.names:
            for leaf in bank.parameters(name):
                leaf.zero_()
    bank.load_state_dict(saved)
    for name, tensors in bank.state_dict().items():
        assert_same(tensors, saved[name])
    assert all(leaf.requires_grad for leaf in bank.parameters("a0"))


@pytest.mark.parametrize("damage", ["adapter", "extra adapter", "key", "extra key", "shape", "no mapping"])
def test_a_state_that_does_not_match_is_refused_and_changes_nothing(damage: str) -> None:
    _, _, bank = attached("linear")
    before = copy.deepcopy(bank.state_dict())
    state: Any = {name: {key: tensor + 1 for key, tensor in tensors.items()} for name, tensors in before.items()}
    last = list(state["a0"])[-1]
    if damage == "adapter":
        state = {}
    elif damage == "extra adapter":
        state["b"] = state["a0"]
    elif damage == "key":
        del state["a0"][last]
    elif damage == "extra key":
        state["a0"]["more"] = torch.zeros(1)
    elif damage == "shape":
        state["a0"][last] = torch.zeros(1)
    else:
        state = {"a0": 5}
    with pytest.raises(AdapterError):
        bank.load_state_dict(state)
    assert_same(bank.state_dict()["a0"], before["a0"])


def test_an_adapter_that_is_not_trained_is_no_part_of_it(tmp_path: Path) -> None:
    _, _, bank = attached("linear")
    bank.load("loaded", bank.snapshot("a0"))
    assert list(bank.state_dict()) == ["a0"]
