"""Runs of tokens in a packed forward give what each adapter gives alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lora_kit as lk
from lora_kit.errors import BankError, ConfigError, RoutingError, UnknownAdapterError
from tests.support import operations, tiny

RUNS = [
    ("plain", 5),
    (None, 3),
    ("dora", 1),
    ("head", 1),
    ("dora", 6),
    ("table", 2),
    ("plain", 1),
    ("rows", 9),
    ("whole", 2),
]
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": "all-linear", "r": 4},
    "dora": {"target_modules": "all-linear", "r": 2, "use_dora": True},
    "head": {"target_modules": ["q_proj", "lm_head"], "r": 3},
    "table": {"target_modules": ["embed_tokens", "v_proj"], "r": 2},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [40, 41, 42]},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]},
}


def randomize(adapter: lk.Adapter, seed: int) -> lk.Adapter:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        key: tensor + 0.3 * torch.randn(tensor.shape, generator=generator) for key, tensor in adapter.tensors.items()
    }
    return lk.Adapter(adapter.config, tensors, record=adapter.record)


def make_adapters(model: nn.Module, configs: dict[str, dict[str, Any]]) -> dict[str, lk.Adapter]:
    made = {}
    for seed, (name, fields) in enumerate(configs.items()):
        bank = lk.attach(model, lk.LoraConfig.from_dict({"lora_alpha": 8, **fields}), name="made")
        made[name] = randomize(bank.snapshot("made"), seed)
        bank.detach()
    return made


@pytest.fixture(scope="module")
def model() -> transformers.LlamaForCausalLM:
    return tiny.llama()


@pytest.fixture(scope="module")
def adapters(model: nn.Module) -> dict[str, lk.Adapter]:
    return make_adapters(model, CONFIGS)


@pytest.fixture
def bank(model: nn.Module, adapters: dict[str, lk.Adapter]) -> Iterator[lk.AdapterBank]:
    bank = lk.attach(model, slots=8, max_rank=8)
    for name, adapter in adapters.items():
        bank.load(name, adapter)
    yield bank
    bank.detach()


def compute_runs(bank: lk.AdapterBank, module: nn.Module, x: Tensor, runs: Sequence[tuple[str | None, int]]) -> Tensor:
    with torch.no_grad(), bank.runs(runs):
        return module(x)


def compute_alone(bank: lk.AdapterBank, module: nn.Module, x: Tensor, runs: Sequence[tuple[str | None, int]]) -> Tensor:
    parts, start = [], 0
    for name, count in runs:
        with torch.no_grad(), bank.using(name):
            parts.append(module(x[:, start : start + count]))
        start += count
    return torch.cat(parts, 1)


def make_inputs(model: nn.Module, path: str, dtype: torch.dtype) -> Tensor:
    count, generator = sum(count for _, count in RUNS), torch.Generator().manual_seed(5)
    if path == "model.embed_tokens":
        return torch.randint(38, 45, (1, count), generator=generator)
    return torch.randn(1, count, model.config.hidden_size, generator=generator).to(dtype)  # type: ignore[union-attr]


WAYS = {
    "joined": {},
    "padded": {"joined_runs.MOST_JOINED_RANKS": 0, "token_runs.LONG_RUN": 100},
    "padded, copied": {"joined_runs.MOST_JOINED_RANKS": 0, "padded_runs._MOST_SLOTS": 0},
    "padded, in pieces": {
        "joined_runs.MOST_JOINED_RANKS": 0,
        "token_runs.LONG_RUN": 100,
        "padded_runs._LEAST_PLACES": 1,
        "padded_runs._MOST_PADDING": 1,
    },
    "one by one": {"token_runs.LONG_RUN": 1},
    "long ones by themselves": {"token_runs.LONG_RUN": 5},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "path",
    ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.embed_tokens", "model.norm", "lm_head"],
)
def test_every_kind_of_layer_gives_each_run_what_its_adapter_gives(
    path: str, dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in WAYS[way].items():
        monkeypatch.setattr(f"lora_kit.layers.{name}", value)
    model = tiny.llama(dtype=dtype)
    adapters = make_adapters(tiny.llama(), CONFIGS)
    bank = lk.attach(model, slots=8, max_rank=8)
    for name, adapter in adapters.items():
        bank.load(name, adapter)
    module, x = model.get_submodule(path), make_inputs(model, path, dtype)
    for runs in (RUNS, RUNS[::-1], RUNS):
        assert_close(compute_runs(bank, module, x, runs), compute_alone(bank, module, x, runs), dtype)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    bound = 3e-6 if dtype == torch.float32 else 2e-2
    assert (actual - expected).abs().max() <= bound * expected.abs().max()


def test_a_head_may_be_given_the_last_token_of_each_run(
    bank: lk.AdapterBank, model: transformers.LlamaForCausalLM
) -> None:
    x = torch.randn(1, len(RUNS), model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    last = [(name, 1) for name, _ in RUNS]
    assert_close(compute_runs(bank, model.lm_head, x, RUNS), compute_alone(bank, model.lm_head, x, last), torch.float32)


def test_one_adapter_for_all_tokens_is_as_using_it(bank: lk.AdapterBank, model: transformers.LlamaForCausalLM) -> None:
    ids = torch.tensor([[5, 40, 7]])
    with torch.no_grad():
        with bank.using("plain"):
            expected = model(input_ids=ids).logits
        with bank.runs([("plain", 2), ("plain", 1)]):
            assert torch.equal(model(input_ids=ids).logits, expected)
        assert bank.active is None


def test_a_load_between_two_forwards_is_seen(
    bank: lk.AdapterBank, model: transformers.LlamaForCausalLM, adapters: dict[str, lk.Adapter]
) -> None:
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    x = make_inputs(model, "", torch.float32)
    compute_runs(bank, layer, x, RUNS)
    bank.unload("plain")
    bank.load("plain", randomize(adapters["plain"], 77))
    assert_close(compute_runs(bank, layer, x, RUNS), compute_alone(bank, layer, x, RUNS), torch.float32)


def test_rows_and_runs_take_turns_without_reading_what_the_other_kept(
    bank: lk.AdapterBank, model: transformers.LlamaForCausalLM
) -> None:
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    x = make_inputs(model, "", torch.float32)
    names = ["plain", None, "dora"]
    batch = torch.randn(3, 2, model.config.hidden_size, generator=torch.Generator().manual_seed(9))
    for _ in range(3):
        with torch.no_grad(), bank.rows(names):
            rows = layer(batch)
        for row, name in enumerate(names):
            with torch.no_grad(), bank.using(name):
                assert_close(rows[row : row + 1], layer(batch[row : row + 1]), torch.float32)
        assert_close(compute_runs(bank, layer, x, RUNS), compute_alone(bank, layer, x, RUNS), torch.float32)


def test_gradients_pass_through_runs(bank: lk.AdapterBank, model: transformers.LlamaForCausalLM) -> None:
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    x = make_inputs(model, "", torch.float32).requires_grad_()
    with bank.runs(RUNS):
        y = layer(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    own = x.detach().requires_grad_()
    parts, start = [], 0
    for name, count in RUNS:
        with bank.using(name):
            parts.append(layer(own[:, start : start + count]))
        start += count
    (expected,) = torch.autograd.grad(torch.cat(parts, 1).square().sum(), own)
    assert_close(gradient, expected, torch.float32)


def test_an_update_that_overflows_reaches_its_own_tokens_alone(model: nn.Module) -> None:
    configs = {name: {"target_modules": ["q_proj"], "r": 2} for name in ("good", "bad")}
    adapters = make_adapters(model, configs)
    tensors = {key: torch.full_like(tensor, 1e38) for key, tensor in adapters["bad"].tensors.items()}
    bank = lk.attach(model, slots=2, max_rank=8)
    bank.load("good", adapters["good"])
    bank.load("bad", lk.Adapter(adapters["bad"].config, tensors))
    module = model.get_submodule("model.layers.0.self_attn.q_proj")
    runs, x = [("good", 2), ("bad", 1), (None, 1)], torch.full((1, 4, 32), 10.0)
    y, alone = compute_runs(bank, module, x, runs), compute_alone(bank, module, x, runs)
    bank.detach()
    assert not y[0, 2].isfinite().any()
    torch.testing.assert_close(y[0, [0, 1, 3]], alone[0, [0, 1, 3]])


def test_joined_weights_are_read_again_after_adapters_come_and_go(bank: lk.AdapterBank, model: nn.Module) -> None:
    module, x = model.get_submodule("model.layers.1.mlp.up_proj"), torch.randn(1, 3, 32)
    for names in (
        ("plain", "dora", None),
        ("dora", "plain", "plain"),
        ("plain", "plain", "plain"),
        ("dora", None, "dora"),
    ):
        runs = [(name, 1) for name in names]
        assert_close(compute_runs(bank, module, x, runs), compute_alone(bank, module, x, runs), torch.float32)


def test_weights_are_joined_when_the_same_adapters_come_again(bank: lk.AdapterBank, model: nn.Module) -> None:
    module, x = model.get_submodule("model.layers.1.mlp.up_proj"), torch.randn(1, 3, 32)

    def is_joined(*names: str) -> bool:
        run = partial(compute_runs, bank, module, x, [(name, 1) for name in names])
        return not any("bmm" in str(each) for each in operations.operations(run))

    assert [is_joined("plain", "dora", "plain"), is_joined("dora", "plain", "dora")] == [False, True]
    assert [is_joined("plain", "plain", "plain"), is_joined("dora", "dora", "plain")] == [True, True]
    bank.unload("head")
    assert [is_joined("dora", "plain", "dora"), is_joined("dora", "dora", "plain")] == [False, True]


def test_the_number_of_operations_depends_on_runs_and_not_on_adapters_loaded(
    model: nn.Module, adapters: dict[str, lk.Adapter]
) -> None:
    layer_path, runs = "model.layers.0.self_attn.q_proj", [("a0", 6), ("a1", 1), (None, 2), ("a0", 1)]
    counts = []
    for loaded in (2, 7):
        bank = lk.attach(model, slots=8, max_rank=8)
        for number in range(loaded):
            bank.load(f"a{number}", randomize(adapters["plain"], number))
        layer, x = model.get_submodule(layer_path), torch.randn(1, 10, 32)
        compute_runs(bank, layer, x, runs)
        counts.append(len(operations.operations(lambda layer=layer, x=x: compute_runs(bank, layer, x, runs))))  # noqa: B023
        bank.detach()
    assert counts[0] == counts[1]


def test_experts_in_rank_space_serve_runs() -> None:
    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()
    fields = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    adapters = make_adapters(model, {"a": {**fields, "r": 2}, "b": {**fields, "r": 3}})
    bank = lk.attach(model, slots=4, max_rank=4)
    for name, adapter in adapters.items():
        bank.load(name, adapter)
        assert bank.reason_no_runs(name) is None
    runs = [("a", 3), (None, 2), ("b", 4)]
    module, x = model.model.layers[0].mlp, torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(1))

    def run(x: Tensor) -> Tensor:
        out = module(x)
        return out[0] if isinstance(out, tuple) else out

    with torch.no_grad(), bank.runs(runs):
        actual = run(x)
    parts, start = [], 0
    for name, count in runs:
        with torch.no_grad(), bank.using(name):
            parts.append(run(x[:, start : start + count]))
        start += count
    assert_close(actual, torch.cat(parts, 1), torch.float32)


def test_what_cannot_tell_tokens_apart_is_named(adapters: dict[str, lk.Adapter]) -> None:
    model = tiny.llama()
    fields = {"target_modules": ["q_proj"], "modules_to_save": ["model.layers.0.mlp"], "r": 2}
    block = make_adapters(model, {"block": fields})["block"]
    bank = lk.attach(model, slots=3, max_rank=8)
    bank.load("block", block)
    bank.load("head", adapters["head"])
    assert "model.layers.0.mlp" in str(bank.reason_no_runs("block"))
    assert bank.reason_no_runs("head") is None
    with pytest.raises(RoutingError, match="may mix its tokens"), torch.no_grad(), bank.runs([("block", 2), (None, 1)]):
        model(input_ids=torch.tensor([[5, 6, 7]]))


@pytest.mark.parametrize(
    "runs", [[], "plain", [("plain",)], [("plain", 0)], [("plain", 1.0)], [("plain", True)], [(3, 1)], {"plain": 1}, 7]
)
def test_runs_that_are_none_are_config_errors(bank: lk.AdapterBank, runs: Any) -> None:
    with pytest.raises(ConfigError), bank.runs(runs):
        pass


def test_another_number_of_tokens_and_unknown_names_are_errors(bank: lk.AdapterBank, model: nn.Module) -> None:
    with pytest.raises(RoutingError, match="runs of 4 tokens"), torch.no_grad(), bank.runs([("plain", 3), (None, 1)]):
        model(input_ids=torch.tensor([[5, 6, 7]]))
    with pytest.raises(UnknownAdapterError), bank.runs([("nothing", 3)]):
        pass
    assert bank.active is None


def test_a_lease_routes_its_slot_after_its_name_is_free(
    bank: lk.AdapterBank, model: nn.Module, adapters: dict[str, lk.Adapter]
) -> None:
    layer, x = model.get_submodule("model.layers.0.self_attn.q_proj"), torch.randn(1, 6, 32)
    expected = compute_alone(bank, layer, x, [("plain", 4), (None, 2)])
    lease = bank.lease("plain")
    bank.unload("plain")
    bank.load("plain", adapters["head"])  # another content under the name
    with torch.no_grad(), bank.runs([(lease, 4), (None, 2)]):
        assert_close(layer(x), expected, torch.float32)
    lease.release()
    with pytest.raises(BankError, match="released"), bank.runs([(lease, 4), (None, 2)]):
        pass


def test_a_lease_of_another_bank_is_an_error(bank: lk.AdapterBank, adapters: dict[str, lk.Adapter]) -> None:
    other = lk.attach(tiny.llama(), slots=2, max_rank=8)
    other.load("plain", adapters["plain"])
    with other.lease("plain") as lease, pytest.raises(BankError, match="another bank"), bank.runs([(lease, 1)]):
        pass
