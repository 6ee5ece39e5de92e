"""Routing where models are really used: generation, checkpointing, compilation, joint training, other dtypes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_kit as lk
from lora_kit.errors import BankError, TargetError
from lora_kit.layers.linear import LoraLinear
from tests.support import tiny

CONFIGS: dict[str, dict[str, Any]] = {
    "a": {"r": 4},
    "b": {"r": 2, "target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "c": {"r": 6, "target_modules": ["down_proj"]},
}


def trainable(**more: Any) -> tuple[nn.Module, lk.AdapterBank]:
    model = tiny.llama()
    bank = lk.attach(model, dtype=torch.float32)
    for name, fields in CONFIGS.items():
        bank.add(name, lk.LoraConfig(**fields, **more, init_lora_weights=False))
    return model, bank


def resident() -> tuple[nn.Module, lk.AdapterBank]:
    """The same adapters in a bank of fixed room."""
    _, source = trainable()
    model = tiny.llama()
    bank = lk.attach(model, slots=4, max_rank=8)
    for name in CONFIGS:
        bank.load(name, source.snapshot(name))
    return model, bank


def one(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {key: value[row : row + 1] for key, value in inputs.items()}


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 1, "num_return_sequences": 3},
    ],
)
def test_generation_with_rows_equals_generation_one_by_one(how: dict[str, Any]) -> None:
    model, bank = resident()
    inputs, names = tiny.batch(), ["a", None, "c"]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, **how}
    alone = []
    for row, name in enumerate(names):
        bank.use(name)
        alone.append(model.generate(**one(inputs, row), **options))
    with bank.rows(names):
        assert torch.equal(model.generate(**inputs, **options), torch.cat(alone))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_the_same_under_checkpointing(reentrant: bool) -> None:
    def gradients() -> list[Tensor]:
        for parameter in bank.parameters("a"):
            parameter.grad = None
        model(**tiny.batch()).logits.square().mean().backward()
        return [parameter.grad for parameter in bank.parameters("a")]

    model, bank = trainable()
    bank.use("a")
    plain = gradients()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    for expected, found in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(found, expected)


def test_training_rows_of_different_adapters_gives_each_its_own_gradient() -> None:
    model, bank = trainable()
    names, inputs = list(CONFIGS), tiny.batch()
    with bank.rows(names):
        model(**inputs).logits.square().sum().backward()
    joint = {name: [p.grad.clone() for p in bank.parameters(name)] for name in names}
    for row, name in enumerate(names):
        for parameter in bank.parameters(name):
            parameter.grad = None
        bank.use(name)
        model(**one(inputs, row)).logits.square().sum().backward()
        for parameter, expected in zip(bank.parameters(name), joint[name], strict=True):
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-4)


def test_neighboring_rows_of_an_adapter_give_the_bits_of_its_own_batch() -> None:
    model = tiny.llama()
    bank = lk.attach(model, lk.LoraConfig(r=2, init_lora_weights=False), name="narrow")
    bank.add("wide", lk.LoraConfig(r=7, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    names, inputs = list(bank.names), tiny.batch(4)
    with bank.rows([name for name in names for _ in range(2)]):
        model(**inputs).logits.square().sum().backward()
    joint = {name: [p.grad.clone() for p in bank.parameters(name)] for name in names}
    for number, name in enumerate(names):
        for parameter in bank.parameters(name):
            parameter.grad = None
        bank.use(name)
        own = {key: value[2 * number : 2 * number + 2] for key, value in inputs.items()}
        model(**own).logits.square().sum().backward()
        for parameter, expected in zip(bank.parameters(name), joint[name], strict=True):
            assert torch.equal(parameter.grad, expected)


def test_a_swap_recompiles_nothing() -> None:
    model, bank = resident()
    inputs, plain = tiny.batch(), {}
    for name in (*CONFIGS, None):
        bank.use(name)
        plain[name] = tiny.logits(model, inputs)
    compiled = torch.compile(model, backend="eager")
    bank.use("a")
    tiny.logits(compiled, inputs)
    with bank.rows(["a", None, "b"]):
        tiny.logits(compiled, inputs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in ("b", None, "c", "a"):
            bank.use(name)
            torch.testing.assert_close(tiny.logits(compiled, inputs), plain[name])
        with bank.rows(["c", "b", None]):
            rows = tiny.logits(compiled, inputs)
    for row, name in enumerate(["c", "b", None]):
        torch.testing.assert_close(rows[row], plain[name][row])


def test_compiled_training_gives_the_same_gradients() -> None:
    model, bank = trainable()
    bank.use("a")
    compiled = torch.compile(model, backend="eager")
    gradients = []
    for each in (model, compiled):
        each(**tiny.batch()).logits.square().mean().backward()
        gradients.append([p.grad.clone() for p in bank.parameters("a")])
        for parameter in bank.parameters("a"):
            parameter.grad = None
    for plain, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)


def test_dropout_acts_in_training_on_the_adapter_alone() -> None:
    model, bank = trainable(lora_dropout=0.5)
    inputs = tiny.batch()
    bank.use(None)
    base = tiny.logits(model, inputs)
    bank.use("a")
    still = tiny.logits(model, inputs)
    model.train()
    assert not torch.equal(tiny.logits(model, inputs), still)
    with bank.rows(["a", None, "b"]):
        mixed = tiny.logits(model, inputs)
    assert not torch.allclose(mixed[0], still[0])
    torch.testing.assert_close(mixed[1], base[1])
    model.eval()
    assert torch.equal(tiny.logits(model, inputs), still)


def test_dropout_is_of_the_stated_probability() -> None:
    layer = nn.Sequential(nn.Linear(4000, 1, bias=False))
    bank = lk.attach(
        layer, lk.LoraConfig(r=1, lora_alpha=1, lora_dropout=0.25, target_modules=["0"], init_lora_weights=False)
    )
    with torch.no_grad():
        layer[0].base_layer.weight.zero_()
        for parameter in bank.parameters("default"):
            parameter.fill_(1)
    layer.train()
    seen = torch.stack([layer(torch.ones(1, 4000)) for _ in range(50)])
    assert abs(seen.mean().item() / 4000 - 1) < 0.01


def test_fp32_masters_survive_a_change_of_the_models_dtype_and_follow_the_optimizer() -> None:
    model, bank = trainable()
    kept = [p.detach().clone() for p in bank.parameters("a")]
    model.to(torch.bfloat16)
    assert all(torch.equal(p, k) and p.dtype == torch.float32 for p, k in zip(bank.parameters("a"), kept, strict=True))
    bank.use("a")
    uniform = tiny.logits(model, tiny.batch())
    assert uniform.dtype == torch.bfloat16
    with torch.no_grad():
        for parameter in bank.parameters("a"):
            parameter.mul_(2)
    with bank.rows(["a", None, "a"]):
        rows = tiny.logits(model, tiny.batch())
    bank.use("a")
    changed = tiny.logits(model, tiny.batch())
    assert not torch.equal(changed, uniform)
    torch.testing.assert_close(rows[0], changed[0], rtol=5e-2, atol=5e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_bank_moves_with_its_model() -> None:
    model, bank = trainable()
    bank.use("a")
    leaves, plain = bank.parameters("a"), tiny.logits(model, tiny.batch())
    model.to("cuda")
    assert [id(p) for p in bank.parameters("a")] == [id(p) for p in leaves]
    assert all(p.is_cuda for p in leaves)
    inputs = {key: value.cuda() for key, value in tiny.batch().items()}
    torch.testing.assert_close(tiny.logits(model, inputs).cpu(), plain, rtol=1e-4, atol=1e-4)
    with bank.rows(["a", "b", None]):
        torch.testing.assert_close(tiny.logits(model, inputs).cpu()[0], plain[0], rtol=1e-4, atol=1e-4)


def test_a_growing_bank_keeps_its_leaf_parameters() -> None:
    model, bank = trainable()
    bank.use("a")
    plain, leaves = tiny.logits(model, tiny.batch()), bank.parameters("a")
    for number in range(5):
        bank.add(f"more{number}", lk.LoraConfig(r=16, init_lora_weights=False))
    assert torch.equal(tiny.logits(model, tiny.batch()), plain)
    with torch.no_grad():
        leaves[0].mul_(3)
    with bank.rows(["a", None, "a"]):
        rows = tiny.logits(model, tiny.batch())
    torch.testing.assert_close(rows[0], tiny.logits(model, tiny.batch())[0])
    assert not torch.equal(rows[0], plain[0])


def test_a_fixed_bank_says_when_it_is_full() -> None:
    _, source = trainable()
    bank = lk.attach(tiny.llama(), slots=2, max_rank=4)
    bank.load("a", source.snapshot("a"))
    with pytest.raises(BankError, match="rank 6"):
        bank.load("c", source.snapshot("c"))
    bank.load("b", source.snapshot("b"))
    with pytest.raises(BankError, match="all 2 are taken by a, b"):
        bank.load("d", source.snapshot("b"))
    bank.unload("a")
    bank.load("d", source.snapshot("a"))
    assert bank.names == ("b", "d")


def test_a_bank_filled_in_inference_mode_is_of_use_outside_it() -> None:
    _, source = trainable()
    model = tiny.llama()
    with torch.inference_mode():
        bank = lk.attach(model)
        bank.load("a", source.snapshot("a"))
        bank.use("a")
        inside = model(**tiny.batch()).logits
    bank.load("c", source.snapshot("c"))
    bank.use("c")
    bank.use("a")
    bank.unload("c")
    assert torch.equal(tiny.logits(model, tiny.batch()), inside)


def test_an_unloaded_slot_leaves_nothing_behind() -> None:
    model, bank = resident()
    base = tiny.logits(model, tiny.batch())
    bank.unload("a")
    bank.load("a", trainable()[1].snapshot("c"))
    with bank.rows(["a", None, "a"]):
        rows = tiny.logits(model, tiny.batch())
    torch.testing.assert_close(rows[1], base[1])
    bank.use("a")
    torch.testing.assert_close(rows[0], tiny.logits(model, tiny.batch())[0])


def test_an_adapter_that_an_open_block_returns_to_is_not_unloaded() -> None:
    _, bank = resident()
    bank.use("a")
    with bank.using("b"):
        with pytest.raises(BankError, match="in use"):
            bank.unload("a")
        with pytest.raises(BankError, match="leave the block"):
            bank.merge("c")
        bank.unload("c")
    assert bank.active == "a"


def test_a_merge_is_seen_by_the_adapters_that_stay() -> None:
    model = tiny.llama()
    bank = lk.attach(model, lk.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), name="merged")
    bank.add("dora", lk.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, init_lora_weights=False))
    bank.add("head", lk.LoraConfig(target_modules=[], modules_to_save=["lm_head"]))
    dora, head = bank.snapshot("dora"), bank.snapshot("head")
    bank.merge("merged")
    bank.merge("head")
    fresh = tiny.llama()
    fresh.load_state_dict(model.state_dict())
    other = lk.attach(fresh, slots=2, max_rank=2)
    other.load("dora", dora, allow=["other-base"])
    other.load("head", head, allow=["other-base"])
    with bank.rows(["dora", None, "dora"]), other.rows(["dora", None, "dora"]):
        torch.testing.assert_close(tiny.logits(model, tiny.batch()), tiny.logits(fresh, tiny.batch()))


def test_one_adapter_may_not_save_what_another_puts_pairs_into() -> None:
    _, bank = resident()
    with pytest.raises(TargetError, match="replaces the module as a whole"):
        bank.load(
            "head",
            lk.attach(tiny.llama(), lk.LoraConfig(target_modules=[], modules_to_save=["lm_head"])).snapshot("default"),
        )
    assert bank.names == tuple(CONFIGS)
    assert bank.active is None


def test_a_model_that_uses_one_layer_under_two_names_is_wrapped_under_both() -> None:
    model = nn.Module()
    model.first = model.second = nn.Linear(3, 3)
    bank = lk.attach(model, lk.LoraConfig(target_modules=["first"], init_lora_weights=False))
    assert model.first is model.second
    bank.detach()
    assert type(model.second) is nn.Linear


def test_restore_copies_values_and_refuses_what_does_not_fit() -> None:
    _, bank = trainable()
    kept = bank.snapshot("a")
    with torch.no_grad():
        for parameter in bank.parameters("a"):
            parameter.zero_()
    with pytest.raises(lk.LoraKitError, match="missing"):
        bank.restore("a", bank.snapshot("c"))
    bank.restore("a", kept)
    assert bank.snapshot("a") == kept


def test_a_model_with_a_bank_can_be_copied() -> None:
    model, bank = trainable()
    bank.use("a")
    other = copy.deepcopy(model)
    plain = tiny.logits(model, tiny.batch())
    assert torch.equal(tiny.logits(other, tiny.batch()), plain)
    bank.use(None)
    assert torch.equal(tiny.logits(other, tiny.batch()), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_right_after_any_other_rows(dtype: torch.dtype) -> None:
    # Rows are served from memory that the rows before them used, in this mode or another, in this dtype or another.
    model, bank = resident()
    model = model.to(dtype)
    inputs = tiny.batch()
    ids = {key: value[:1] for key, value in inputs.items()}

    def logits(rows: list[str | None], mode: Any) -> Tensor:
        batch = {key: value.repeat(len(rows), 1) for key, value in ids.items()}
        with mode(), bank.rows(rows):
            return model(**batch).logits.float().clone()

    expected = {}
    for name in ["a", "b", "c", None]:
        with torch.no_grad(), bank.using(name):
            expected[name] = model(**ids).logits.float()[0]
    batches: list[list[str | None]] = [
        ["c", "a", "b"],
        ["b", "c", None, "a"],
        ["a", "b"],
        ["b", "c", "a", "c", None, "b", "a", "b", "c"],
        ["b", "a", "c"],
    ]
    for number, rows in enumerate([*batches, *batches]):
        found = logits(rows, torch.inference_mode if number % 2 else torch.no_grad)
        for row, name in enumerate(rows):
            torch.testing.assert_close(found[row], expected[name], rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)


def test_memory_for_the_pairs_of_rows_is_taken_once() -> None:
    model, bank = resident()
    inputs = tiny.batch()
    layer = next(module for module in model.modules() if isinstance(module, LoraLinear))
    places = set()
    for rows in (["c", "b", "a"], ["b", "a", "c"], ["b", "c", "a"]):
        with torch.no_grad(), bank.rows(rows):
            model(**inputs)
            _, (group, *_) = bank._routing.get_row_cache(bank._routing.get_route()).groups[layer]
            places.add(group.a.data_ptr())
    assert len(places) == 1


def test_rows_that_come_again_see_what_was_loaded_meanwhile() -> None:
    model, bank = resident()
    inputs, rows = tiny.batch(), ["b", "a", None]

    def logits() -> Tensor:
        with torch.no_grad(), bank.rows(rows):
            return model(**inputs).logits.clone()

    first = logits()
    torch.testing.assert_close(logits(), first, rtol=0, atol=0)
    other = bank.snapshot("a")
    bank.unload("a")
    bank.load("a", lk.Adapter(other.config, {key: -2 * tensor for key, tensor in other.tensors.items()}))
    changed = logits()
    assert not torch.equal(changed[1], first[1])
    with torch.no_grad(), bank.using("a"):
        torch.testing.assert_close(changed[1], model(**inputs).logits[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(changed[[0, 2]], first[[0, 2]], rtol=0, atol=1e-6)
