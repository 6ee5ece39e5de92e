"""Pairs that start from their layer's weight: trained as in PEFT, on a base that stays, and saved as plain LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_kit as lk
from benchmarks import initialization as benchmark
from lora_kit.errors import AdapterError, BankError, ConfigError, LoraKitError, TargetError
from lora_kit.layers.initialization import decompose_weight
from lora_kit.training.recipe.load import load_recipe
from lora_kit.training.train import train
from tests.support import tiny
from tests.support.interrupted import die_at, killed, long_recipe, results, unbroken
from tests.support.operations import operations
from tests.support.training import base_of

INITS = ("pissa", "pissa_niter_8", "olora")
every_init = pytest.mark.parametrize("init", INITS)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "pissa": ("llama", {}),
    "olora": ("llama", {"init_lora_weights": "olora", "lora_alpha": 4}),  # PEFT's scaling of OLoRA is 1 in the paper
    "rslora": ("llama", {"use_rslora": True}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 6},
                           "alpha_pattern": {"up_proj": 16}}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "dropout": ("llama", {"lora_dropout": 0.3}),
    "head": ("bert", {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"]}),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES)
SHARED: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": "pissa"}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def steps(model: Any, count: int = 6, *, rate: float = 5e-3) -> list[float]:
    """Losses of a few steps of Adam in training mode."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    losses = []
    for step in range(count):
        inputs = tiny.batch(seed=step)
        labels = inputs["input_ids"]
        if model.config.model_type == "bert":
            labels = labels[:, 0] % 3
        torch.manual_seed(step)  # of the dropout
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def trained(fields: dict[str, Any], kind: str = "llama", **how: Any) -> tuple[Any, lk.AdapterBank]:
    """A model with an adapter "a" that was trained for a few steps."""
    model = tiny.MODELS[kind](**how)
    bank = lk.attach(model, lk.LoraConfig(**{**SHARED, **fields}), name="a")
    steps(model)
    return model, bank


# The start is the base


@every_init
@pytest.mark.parametrize("kind", tiny.MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attach_leaves_outputs_and_base_bitwise_as_they_were(kind: str, dtype: torch.dtype, init: str) -> None:
    model = tiny.MODELS[kind](dtype=dtype)
    before, values = tiny.logits(model, tiny.batch()), state(model)
    bank = lk.attach(model, lk.LoraConfig(**{**SHARED, "init_lora_weights": init}), name="a")
    bank.add("b", lk.LoraConfig(r=2, lora_alpha=-3, init_lora_weights=init))
    assert torch.equal(tiny.logits(model, tiny.batch()), before)
    with bank.rows(["a", None, "b"]):
        assert torch.equal(tiny.logits(model, tiny.batch()), before)
    bank.detach()
    assert same(state(model), values)


def test_the_start_is_what_its_paper_says() -> None:
    weight = torch.randn(12, 20)
    u, values, vt = torch.linalg.svd(weight, full_matrices=False)
    best = (u[:, :3] * values[:3]) @ vt[:3]
    for scaling in (2.0, -0.5):
        a, b = decompose_weight(weight, "pissa", rank=3, scaling=scaling)
        torch.testing.assert_close(scaling * b @ a, best)
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))  # the singular value is shared by halves
    q, r = torch.linalg.qr(weight)
    a, b = decompose_weight(weight, "olora", rank=3, scaling=2.0)
    torch.testing.assert_close((a, b), (r[:3], q[:, :3]))
    assert not a.tril(-1).any()


def test_a_few_iterations_find_what_the_whole_decomposition_does() -> None:
    """On a random matrix, of which no direction stands out: where singular values fall off, they find it sooner."""
    weight = torch.randn(160, 128)
    a, b = decompose_weight(weight, "pissa", rank=8, scaling=1.0)
    found = [decompose_weight(weight, f"pissa_niter_{count}", rank=8, scaling=1.0) for count in (2, 16)]
    few, many = ((b2 @ a2).norm().square() / (b @ a).norm().square() for a2, b2 in found)
    assert few < many
    assert many > 0.99


def test_long_work_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("lora_kit.layers.initialization._LOG_INTERVAL", -1.0)
    with caplog.at_level("INFO", logger="lora_kit.layers.initialization"):
        lk.attach(tiny.llama(), SHARED)
    assert caplog.messages[-1].startswith("pissa: 14 of 14 layers are initialized; pissa_niter_16")


# As in PEFT


@every_case
@pytest.mark.filterwarnings("ignore:.* changes the base weights")
def test_training_follows_peft_and_what_is_saved_is_what_it_converts_to(case: str, tmp_path: Path) -> None:
    kind, more = CASES[case]
    fields = {**SHARED, **more}
    model = tiny.MODELS[kind]()
    values = state(model)
    torch.manual_seed(3)
    bank = lk.attach(model, lk.LoraConfig(**fields), name="a")
    torch.manual_seed(3)
    other = peft.get_peft_model(tiny.MODELS[kind](), peft.LoraConfig(**fields))
    other.save_pretrained(str(tmp_path / "start"))
    ours, theirs = steps(model), steps(other)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-5)
    assert abs(ours[-1] - ours[0]) > 1e-3

    logits = tiny.logits(model, tiny.batch())
    torch.testing.assert_close(logits, tiny.logits(other, tiny.batch()), rtol=0, atol=2e-4)
    assert (logits - tiny.logits(tiny.MODELS[kind](), tiny.batch())).abs().max() > 1e-2
    bank.save("a", tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(tiny.MODELS[kind](), tmp_path / "ours")
    torch.testing.assert_close(tiny.logits(read, tiny.batch()), logits, rtol=0, atol=1e-5)
    if case != "head":  # which PEFT's own conversion cannot read again
        start_of, converted = str(tmp_path / "start"), str(tmp_path / "theirs")
        other.save_pretrained(converted, path_initial_model_for_weight_conversion=start_of)
        read = peft.PeftModel.from_pretrained(tiny.MODELS[kind](), converted)
        torch.testing.assert_close(tiny.logits(read, tiny.batch()), logits, rtol=0, atol=3e-4)
    bank.detach()
    assert same(state(model), values)


# What is saved


@every_init
def test_what_is_saved_is_a_plain_adapter_that_says_how_it_began(tmp_path: Path, init: str) -> None:
    model, bank = trained({"init_lora_weights": init, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}})
    logits = tiny.logits(model, tiny.batch())
    assert sum(p.numel() for p in bank.parameters("a")) == bank.coverage("a").parameters
    written = bank.save("a", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 16, True)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"q_proj": 4}, {"q_proj": 6})
    record = json.loads((tmp_path / "a" / "lora_kit.json").read_text())
    assert record["start"] == {"init_lora_weights": init, "r": 4, "lora_alpha": 8}
    again = tiny.llama()
    other = lk.attach(again, slots=1)
    assert other.load("a", tmp_path / "a") == written
    other.use("a")
    torch.testing.assert_close(tiny.logits(again, tiny.batch()), logits, rtol=0, atol=1e-5)


def test_the_scaling_of_what_is_saved_is_the_same_with_rslora() -> None:
    _, bank = trained({"use_rslora": True, "alpha_pattern": {"q_proj": 3}})
    config = bank.snapshot("a").config
    assert config.use_rslora
    assert config.scaling_of("k_proj") == pytest.approx(8 / 2, rel=1e-12)
    assert config.scaling_of("q_proj") == pytest.approx(3 / 2, rel=1e-12)


def test_no_large_terms_cancel_in_16_bits() -> None:
    """As [B, -B0] [A; A0] it would be off by a part of the weight, not by a part of what was learned."""
    model, bank = trained({})
    adapter = bank.snapshot("a")
    for path, pair in adapter.pairs().items():
        exact = pair.b @ pair.a
        rounded = pair.b.bfloat16().float() @ pair.a.bfloat16().float()
        weight = model.get_submodule(path).base_layer.weight
        assert exact.norm() < 0.5 * weight.norm()
        assert (rounded - exact).norm() < 0.01 * exact.norm(), path


def test_a_merge_in_memory_gives_what_was_trained() -> None:
    model, bank = trained({"target_modules": ["q_proj", "down_proj"]})
    logits = tiny.logits(model, tiny.batch())
    assert [each.retained for each in bank.merge("a")] == pytest.approx([1.0] * 4, abs=1e-3)
    bank.detach()
    torch.testing.assert_close(tiny.logits(model, tiny.batch()), logits, rtol=0, atol=1e-5)


# Going back and going on


@every_init
def test_a_snapshot_is_restored_bit_for_bit(init: str) -> None:
    model, bank = trained({"init_lora_weights": init})
    kept, logits = bank.snapshot("a"), tiny.logits(model, tiny.batch())
    leaves = [leaf.detach().clone() for leaf in bank.parameters("a")]
    steps(model)
    assert bank.snapshot("a") != kept
    bank.restore("a", kept)
    assert all(torch.equal(leaf, was) for leaf, was in zip(bank.parameters("a"), leaves, strict=True))
    assert bank.snapshot("a") == kept
    assert torch.equal(tiny.logits(model, tiny.batch()), logits)


def test_what_began_elsewhere_is_not_restored_and_nothing_is_changed() -> None:
    model, bank = trained({})
    kept = bank.snapshot("a")
    plain = {**SHARED, "init_lora_weights": False}
    bank.add("same rank", lk.LoraConfig(**plain))
    bank.add("twice the rank", lk.LoraConfig(**{**plain, "r": 8}))
    for name in ("same rank", "twice the rank"):
        with pytest.raises(AdapterError, match="were trained from another initialization"):
            bank.restore("a", bank.snapshot(name))
    other = bank.snapshot("a")
    assert other == kept
    # It goes on as the plain adapter that it was saved as.
    bank.add("on", kept.config)
    bank.restore("on", kept)
    bank.use("on")
    assert bank.snapshot("on") == kept
    assert steps(model, 2)[0] > 0


@pytest.mark.slow
def test_killed_and_started_again_a_training_ends_with_the_same_bytes(tmp_path: Path) -> None:
    init = "pissa_niter_4"  # which is random
    recipe = long_recipe(tmp_path, lora={"r": 2, "init_lora_weights": init, "lora_dropout": 0.2})
    expected = unbroken(recipe)
    killed(recipe, die_at(4))
    report = train(recipe, base=base_of())
    assert report.resumed >= 2
    assert results(report.out) == expected
    assert load_file(report.out / "adapter_model.safetensors")[
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    ].shape == (4, 32)
    adapter = lk.Adapter.load(report.out)
    assert adapter.record["recipe"]["lora"]["init_lora_weights"] == adapter.record["start"]["init_lora_weights"] == init


# Rows


def gradients(bank: lk.AdapterBank, name: str) -> list[Tensor]:
    found = [leaf.grad.clone() for leaf in bank.parameters(name) if leaf.grad is not None]
    for leaf in bank.parameters(name):
        leaf.grad = None
    return found


def test_trained_jointly_by_rows_it_is_trained_as_alone() -> None:
    model, bank = trained({})
    bank.add("plain", lk.LoraConfig(r=6, init_lora_weights=False))
    bank.add("other", lk.LoraConfig(r=3, init_lora_weights="olora"))
    inputs = tiny.batch()
    with bank.rows(["a", "plain", "other"]):
        together = model(**inputs).logits
    together.square().sum().backward()
    rows = {name: gradients(bank, name) for name in ("a", "plain", "other")}
    for row, name in enumerate(rows):
        with bank.using(name):
            alone = model(**{key: value[row : row + 1] for key, value in inputs.items()}).logits
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-5)
        alone.square().sum().backward()
        torch.testing.assert_close(rows[name], gradients(bank, name), rtol=1e-3, atol=1e-4)
        assert all(gradient.any() for gradient in rows[name])


def test_dropout_of_a_row_is_of_the_trained_pair_and_not_of_its_start() -> None:
    layer: Any = nn.Sequential(nn.Linear(6, 5, bias=False)).train()
    fields: dict[str, Any] = {"r": 2, "lora_alpha": 2, "target_modules": ["0"], "init_lora_weights": "pissa"}
    bank = lk.attach(layer, lk.LoraConfig(lora_dropout=0.5, **fields), name="a")
    bank.add("b", lk.LoraConfig(**fields))
    weight = layer[0].base_layer.weight
    a, b = decompose_weight(weight, "pissa", rank=2, scaling=1.0)
    x = torch.randn(2, 6)
    for routed in (["a", "b"], ["a", "a"]):
        with bank.rows(routed):
            torch.manual_seed(7)
            y = layer(x)
        difference = y - x @ weight.mT
        assert difference[0].any()
        # What is left is s B0 A0 (drop(x) - x) for a dropped x with elements 0 or 2 x.
        combinations = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 6)
        candidates = (combinations * x[0]) @ a.mT @ b.mT
        assert (candidates - difference[0]).abs().amax(1).min() < 1e-5
        if routed == ["a", "b"]:
            torch.testing.assert_close(difference[1], torch.zeros(5), rtol=0, atol=1e-6)


# Quantized bases


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_on_a_quantized_base_it_starts_from_what_the_weight_stands_for(kind: str) -> None:
    import bitsandbytes as bnb

    plain = nn.Linear(64, 64, bias=False)
    made: Any
    if kind == "nf4":
        made = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    else:
        made = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    made.load_state_dict(plain.state_dict())
    model = nn.Sequential(made.to("cpu"))
    x = torch.randn(4, 64)
    stands_for = model(torch.eye(64)).detach().mT if kind == "nf4" else None
    before, packed = model(x).detach(), made.weight.detach().clone()
    bank = lk.attach(
        model, lk.LoraConfig(r=4, lora_alpha=4, target_modules=("0",), init_lora_weights="pissa"), name="a"
    )
    assert torch.equal(model(x), before)
    held = bank._layers["0"].entries[1].tensors  # type: ignore[union-attr]
    product = held["start of lora_B"] @ held["start of lora_A"]
    u, values, vt = torch.linalg.svd(plain.weight.detach() if stands_for is None else stands_for)
    best = (u[:, :4] * values[:4]) @ vt[:4]
    assert (product - best).norm() < (0.1 if stands_for is None else 1e-4) * best.norm()
    optimizer = torch.optim.Adam(bank.parameters("a"), lr=1e-2)
    model(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model(x), before)
    assert torch.equal(made.weight, packed)


# Costs and refusals


def test_a_start_costs_a_sum_and_two_copies_of_small_factors_and_what_is_kept_is_small() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    lk.attach(model, lk.LoraConfig(r=4, target_modules=("0",), init_lora_weights="olora"))
    names = operations(lambda: model(torch.randn(4, 64)))[1:]  # randn is one
    assert sorted(names) == sorted(["addmm", "add", "cat", "cat", "mm", "addmm_"])


def test_a_bank_of_fixed_rank_has_room_for_what_is_saved() -> None:
    model = tiny.llama()
    bank = lk.attach(model, slots=3, max_rank=8, dtype=torch.float32)
    with pytest.raises(BankError, match="has rank 16; the capacity is 8"):
        bank.add("wide", lk.LoraConfig(r=8, init_lora_weights="pissa"))
    assert bank.names == ()
    bank.add("a", lk.LoraConfig(r=4, init_lora_weights="pissa"))
    bank.load("b", bank.snapshot("a"))


REFUSED: dict[str, tuple[dict[str, Any], type[LoraKitError], str]] = {
    "dora": ({"use_dora": True}, ConfigError, "use_dora with init_lora_weights"),
    "parameters": ({"target_parameters": ["experts.up_proj"]}, ConfigError, "target_parameters with init_lora"),
    "embedding": ({"target_modules": ["embed_tokens"]}, TargetError, "embed_tokens: init_lora_weights=pissa is for"),
    "rank": ({"r": 33}, TargetError, r"q_proj: .* needs a rank of at most 32 for a weight of 32 × 32; 33 was given"),
    "endless": ({"init_lora_weights": "pissa_niter_1000000"}, ConfigError, "N from 1 to 99"),
    "none": ({"init_lora_weights": "pissa_niter_0"}, ConfigError, "N from 1 to 99"),
    "unknown": ({"init_lora_weights": "pisa"}, ConfigError, "'olora'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_start_so_is_refused_by_name_and_the_model_is_as_it_was(case: str) -> None:
    fields, error, told = REFUSED[case]
    model = tiny.llama()
    values, kinds = state(model), [type(module) for module in model.modules()]
    with pytest.raises(error, match=told):
        lk.attach(model, {**SHARED, **fields})
    assert same(state(model), values)
    assert [type(module) for module in model.modules()] == kinds


def test_an_adapter_that_needs_a_changed_base_is_still_refused(tmp_path: Path) -> None:
    peft.get_peft_model(tiny.llama(), peft.LoraConfig(**SHARED)).save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match="starts from a changed base"):
        lk.Adapter.load(tmp_path)
    with pytest.raises(AdapterError, match="yet to be trained"):
        lk.Adapter(lk.LoraConfig(**SHARED), {})


@pytest.mark.parametrize("value", ["pissa", "pissa_niter_16", "olora", "true", "gaussian"])
def test_a_recipe_says_it_in_a_word(tmp_path: Path, value: str) -> None:
    fields = {"base": "kit-base", "data": "rows.jsonl", "out": str(tmp_path / "out"), "lora": {"r": 4}}
    recipe = load_recipe(fields, overrides={"lora.init_lora_weights": value})  # as a flag, or a point of a sweep
    assert recipe.lora.init_lora_weights == (value == "true" or value)
    assert load_recipe(recipe.to_dict()) == recipe


def test_a_config_of_peft_is_taken_too() -> None:
    model = tiny.llama()
    bank = lk.attach(model, peft.LoraConfig(**SHARED), name="a")
    assert bank.snapshot("a").config.r == 8


# Whether it pays


def test_the_benchmark_has_a_result_for_each_of_its_methods() -> None:
    result = json.loads(benchmark.RESULT.read_text("utf-8"))
    assert list(result["methods"]) == list(benchmark.METHODS)


def test_further_rates_are_tried_while_the_best_is_at_an_end() -> None:
    assert benchmark.further({1.0: 3.0, 3.0: 2.0, 9.0: 4.0}) == []
    assert benchmark.further({1.0: 1.0, 3.0: 2.0, 9.0: 4.0}) == [1.0 / 3]
    assert benchmark.further({1.0: 4.0, 3.0: 2.0, 9.0: 1.0}) == [27.0]
    assert benchmark.further({float(rate): -rate for rate in range(benchmark.MOST_RATES)}) == []
