"""Adapters made of adapters: sums that are exact, truncations that are optimal, full fine-tunes taken apart."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lora_kit as lk
from lora_kit.adapter.peft_keys import PREFIX, lora_weight_keys
from lora_kit.algebra.assemble import apply_ranks
from lora_kit.algebra.combine import METHODS
from lora_kit.algebra.compare import compare
from lora_kit.algebra.dense_svd import approximate_low_rank
from lora_kit.algebra.low_rank import LowRankUpdate, compute_distance, sum_updates
from lora_kit.algebra.sources import SourceAdapter
from lora_kit.errors import BaseMismatchError, ConfigError, MergeError, UnknownAdapterError
from tests.support import tiny
from tests.support.folders import adapter, contents, foreign

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
Deltas = dict[str, Tensor]


def made(
    pairs: Mapping[str, tuple[int, int, int]], *, seed: int = 0, kind: str = "linear", **fields: Any
) -> lk.Adapter:
    """An adapter of random pairs: (out, in, rank) by path."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, (out, into, rank) in pairs.items():
        key_a, key_b = lora_weight_keys(path, kind)
        tensors[key_a] = torch.randn(rank, into, generator=generator)
        tensors[key_b] = torch.randn(out, rank, generator=generator)
    own = {"r": next(iter(pairs.values()))[2], "lora_alpha": 8, "target_modules": sorted(pairs)}
    return lk.Adapter(lk.LoraConfig.from_dict(own | fields), tensors)


def deltas(of: lk.Adapter) -> Deltas:
    """`scaling · B A` in double precision, formed densely."""
    return {path: of.config.scaling_of(path) * (p.b.double() @ p.a.double()) for path, p in of.pairs().items()}


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def head(seed: int) -> dict[str, Tensor]:
    return {f"{PREFIX}score.weight": torch.randn(3, 16, generator=torch.Generator().manual_seed(seed))}


def with_head(seed: int) -> lk.Adapter:
    pairs = made({Q: (16, 16, 2)}, seed=seed)
    config = lk.LoraConfig.from_dict({**pairs.config.to_dict(), "modules_to_save": ["score"]})
    return lk.Adapter(config, {**pairs.tensors, **head(seed)})


# Combining


def test_cat_is_the_exact_sum_whatever_ranks_scalings_targets_and_signs() -> None:
    one = made({Q: (24, 16, 3), V: (8, 16, 3)}, seed=1, use_rslora=True)
    two = made({Q: (24, 16, 5)}, seed=2, lora_alpha=3, alpha_pattern={"q_proj": 7.0})
    three = made({Q: (24, 16, 2), "model.layers.1.mlp.up_proj": (32, 16, 6)}, seed=3, rank_pattern={"up_proj": 6})
    sum_ = lk.combine([(one, 0.7), (two, -0.3), (three, 2.0)])
    d1, d2, d3, found = map(deltas, (one, two, three, sum_))
    assert off(found[Q], 0.7 * d1[Q] - 0.3 * d2[Q] + 2 * d3[Q]) <= 1e-6
    assert off(found[V], 0.7 * d1[V]) <= 1e-6
    assert {path: pair.a.shape[0] for path, pair in sum_.pairs().items()} == {
        Q: 10,
        V: 3,
        "model.layers.1.mlp.up_proj": 6,
    }
    assert all(sum_.config.scaling_of(path) == 1 for path in found)
    assert sum_.record["made"]["error"]["share"] <= 1e-6


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    weights=st.lists(st.floats(-4, 4).filter(lambda w: abs(w) > 0.05), min_size=4, max_size=4),
    out=st.integers(1, 9),
    into=st.integers(1, 9),
    rslora=st.booleans(),
)
def test_any_sum_is_exact_also_where_ranks_exceed_the_layer(
    ranks: list[int], weights: list[float], out: int, into: int, rslora: bool
) -> None:
    parts = [made({Q: (out, into, rank)}, seed=seed, use_rslora=rslora) for seed, rank in enumerate(ranks)]
    parents = list(zip(parts, weights, strict=False))
    found = lk.combine(parents)
    meant = sum((weight * deltas(part)[Q] for part, weight in parents), torch.zeros(out, into, dtype=torch.float64))
    whole = sum(abs(weight) * float(deltas(part)[Q].norm()) for part, weight in parents)
    assert float((deltas(found)[Q] - meant).norm()) <= 1e-6 * whole


def test_an_adapter_minus_itself_is_nothing() -> None:
    one = made({Q: (16, 16, 3)}, seed=1)
    found = lk.combine([(one, 1.0), (one, -1.0)])
    assert float(deltas(found)[Q].norm()) <= 1e-5 * float(deltas(one)[Q].norm())
    assert lk.combine([(one, 1.0), (one, -1.0)], method="svd").pairs()[Q].a.shape[0] == 3


def test_embeddings_combine_like_linear_layers() -> None:
    path = "model.embed_tokens"
    one, two = (made({path: (8, 40, rank)}, seed=rank, kind="embedding") for rank in (2, 3))
    found = lk.combine([(one, 1.0), (two, 0.5)])
    assert found.pairs()[path].kind == "embedding"
    assert off(deltas(found)[path], deltas(one)[path] + 0.5 * deltas(two)[path]) <= 1e-6


def test_svd_is_the_nearest_adapter_of_its_rank() -> None:
    one, two = made({Q: (48, 32, 4)}, seed=1), made({Q: (48, 32, 6)}, seed=2)
    exact = deltas(one)[Q] + 0.5 * deltas(two)[Q]
    singular = torch.linalg.svdvals(exact)
    for rank in (1, 3, 6):
        found = lk.combine([(one, 1.0), (two, 0.5)], method="svd", rank=rank)
        best = float(singular[rank:].norm() / singular.norm())
        assert abs(off(deltas(found)[Q], exact) - best) <= 1e-5
        assert math.isclose(found.record["made"]["error"]["share"], best, rel_tol=1e-5)
    assert lk.combine([(one, 1.0), (two, 0.5)], method="svd").config.r == 6  # the largest of them by default
    assert off(deltas(lk.combine([(one, 1.0), (two, 0.5)], method="svd", rank=10))[Q], exact) <= 1e-6


def peft_result(parts: list[tuple[lk.Adapter, float]], path: Path, **options: Any) -> Deltas:
    """What `add_weighted_adapter` makes of these adapters on the tiny Llama."""
    import peft

    model: Any = None
    for number, (part, _) in enumerate(parts):
        folder = part.save(path / str(number))
        name = f"a{number}"
        if model is None:
            model = peft.PeftModel.from_pretrained(tiny.llama(), folder, adapter_name=name)
        else:
            model.load_adapter(folder, adapter_name=name)
    names, weights = [f"a{number}" for number in range(len(parts))], [weight for _, weight in parts]
    model.add_weighted_adapter(names, weights, "sum", **options)
    layers = {name.removeprefix(PREFIX): module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    return {name: layer.get_delta_weight("sum").double() for name, layer in layers.items() if "sum" in layer.lora_A}


def test_linear_means_what_peft_means_and_says_how_far_off_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = [(adapter(seed=1), 0.7), (adapter(seed=2), -0.4)]
    with caplog.at_level(logging.WARNING):
        found = lk.combine(parts, method="linear")
    assert "'linear' is not the sum of the adapters" in caplog.text
    for path, expected in peft_result(parts, tmp_path, combination_type="linear").items():
        assert off(deltas(found)[path], expected) <= 1e-6
    exact = lk.combine(parts)
    told = found.record["made"]["error"]
    worst = {path: off(deltas(found)[path], deltas(exact)[path]) for path in found.pairs()}
    assert math.isclose(told["worst"], max(worst.values()), rel_tol=1e-5)
    assert told["worst_layer"] == max(worst, key=lambda path: worst[path])
    assert told["share"] > 0.1


@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "dare_linear", "dare_ties"])
def test_pruning_methods_work_on_the_deltas_as_in_peft(tmp_path: Path, method: str) -> None:
    parts = [(adapter(seed=1), 0.7), (adapter(seed=2), 0.5)]
    found = lk.combine(parts, method=method, density=0.4, rank=6)
    torch.manual_seed(0)
    expected = peft_result(parts, tmp_path, combination_type=f"{method}_svd", density=0.4, svd_rank=6)
    for path, delta in expected.items():
        if "dare" not in method:  # random masks are drawn in another order there
            assert off(deltas(found)[path], delta) <= 1e-5
        assert found.pairs()[path].a.shape[0] == 6
    again = lk.combine(parts, method=method, density=0.4, rank=6)
    assert again == found
    assert (lk.combine(parts, method=method, density=0.4, rank=6, seed=1) == found) == ("dare" not in method)
    assert 0 < found.record["made"]["error"]["share"] < 1


def test_dare_keeps_the_sum_where_nothing_is_dropped(tmp_path: Path) -> None:
    parts = [(adapter(seed=1), 0.7), (adapter(seed=2), 0.5)]
    found, exact = lk.combine(parts, method="dare_linear", density=1.0, rank=8), lk.combine(parts)
    assert all(off(deltas(found)[path], delta) <= 1e-6 for path, delta in deltas(exact).items())


def test_random_numbers_of_others_are_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    lk.combine([(adapter(seed=1), 1.0)], method="dare_linear", density=0.5)
    assert torch.equal(torch.rand(3), expected)


def test_what_is_not_exact_about_saved_modules_is_refused() -> None:
    kept = lk.combine([(with_head(1), 1.0), (made({Q: (16, 16, 2)}, seed=9), 0.5)])
    assert torch.equal(kept.saved()["score.weight"], head(1)[f"{PREFIX}score.weight"])
    assert kept.config.modules_to_save == ("score",)
    with pytest.raises(
        MergeError, match=r"replaces score\.weight \(modules_to_save\), which cannot be weighted by 0\.5"
    ):
        lk.combine([(with_head(1), 0.5), (with_head(2), 0.5)])
    with pytest.raises(MergeError, match=r"both replace score\.weight"):
        lk.combine([(with_head(1), 1.0), (with_head(2), 1.0)])
    with pytest.raises(MergeError, match="one adapter replaces what another changes: score"):
        lk.combine([(with_head(1), 1.0), (made({"score": (3, 16, 2)}), 1.0)])


def test_a_dora_is_refused_with_the_reason() -> None:
    plain = adapter(seed=1)
    lengths = {f"{PREFIX}{path}.lora_magnitude_vector": torch.ones(32) for path in plain.pairs()}
    dora = lk.Adapter(
        lk.LoraConfig.from_dict({**plain.config.to_dict(), "use_dora": True}), {**plain.tensors, **lengths}
    )
    for refused in (
        lambda: lk.combine([(dora, 1.0)]),
        lambda: lk.resize(dora, rank=2),
        lambda: compare(dora, plain),
    ):
        with pytest.raises(MergeError, match=r"is a DoRA \(use_dora\): it rescales every row"):
            refused()


def test_adapters_of_different_bases_do_not_combine(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def trained(seed: int, dtype: torch.dtype = torch.float32) -> lk.Adapter:
        config = lk.LoraConfig(r=2, target_modules=("q_proj",), init_lora_weights=False)
        return lk.attach(tiny.llama(seed=seed, dtype=dtype), config, name="a").snapshot("a")

    one, two, other = trained(0), trained(0, torch.bfloat16), trained(1)
    found = lk.combine([(one, 1.0), (two, 1.0)])
    assert found.base == one.base
    for verb in (lambda **k: lk.combine([(one, 1.0), (other, 1.0)], **k), lambda **k: compare(one, other, **k)):
        with pytest.raises(BaseMismatchError, match="sampled weights of their bases differ"):
            verb()
    assert lk.combine([(one, 1.0), (other, 1.0)], allow={"other-base"}).base is None
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        mixed = lk.combine([(one, 1.0), (foreign(tmp_path / "foreign"), 1.0)])
    assert "'foreign' does not say which base it was made for" in caplog.text
    assert mixed.base == one.base
    named = [foreign(tmp_path / name, base_model_name_or_path=name) for name in ("x", "y")]
    with pytest.raises(BaseMismatchError, match="'x' for x, 'y' for y; nothing else says whether these are one"):
        lk.combine([(folder, 1.0) for folder in named])


def test_the_record_says_how_an_adapter_was_made_and_keeps_what_is_still_true(tmp_path: Path) -> None:
    prompts = {"separator": "\n", "train": "x.jsonl", "chat_template_kwargs": {"enable_thinking": False}}
    one, two = adapter(seed=1), adapter(seed=2)
    facts = {"recipe": {"data": prompts}, "metrics": {"loss": 1.0}, "seed": 3}
    folders = [a.save(tmp_path / name, record=facts) for a, name in ((one, "one"), (two, "two"))]
    found = lk.combine([(folders[0], 0.7), (folders[1], 0.3)])
    saved = lk.Adapter.load(found.save(tmp_path / "sum"))
    assert saved == found
    kept = {"separator": "\n", "chat_template_kwargs": {"enable_thinking": False}}
    assert saved.record["recipe"] == {"data": kept}
    assert not {"metrics", "seed"} & saved.record.keys()
    told = saved.record["made"]
    assert (told["by"], told["method"]) == ("combine", "cat")
    assert told["parents"] == [
        {"digest": one.digest, "name": "one", "weight": 0.7},
        {"digest": two.digest, "name": "two", "weight": 0.3},
    ]


def test_bad_requests_are_refused_in_words(tmp_path: Path) -> None:
    one = adapter()
    for fields, told in (
        ({"method": "tis"}, "did you mean 'ties'"),
        ({"method": "ties"}, "'ties' needs a density"),
        ({"method": "cat", "density": 0.5}, "'cat' takes no density"),
        ({"method": "ties", "density": 0.0}, "above 0 up to 1"),
        ({"method": "cat", "rank": 4}, "'cat' takes no rank"),
        ({"method": "svd", "rank": 0}, "a whole number from 1"),
        ({"method": "svd", "rank": True}, "a whole number from 1"),
    ):
        with pytest.raises(ConfigError, match=told):
            lk.combine([(one, 1.0)], **fields)
    for parts in ([], [(one, math.nan)], [(one, 0.0)], [(one, "much")], [one]):
        with pytest.raises(ConfigError):
            lk.combine(parts)
    with pytest.raises(UnknownAdapterError):
        lk.combine([(tmp_path / "nowhere", 1.0)])
    with pytest.raises(MergeError, match="'linear' adds factors of one rank; 2 and 4 were given"):
        lk.combine([(made({Q: (32, 32, 2)}), 1.0), (made({Q: (32, 32, 4)}), 1.0)], method="linear")
    with pytest.raises(MergeError, match=r"layers of different shapes .*linear \(32, 32\) in .*linear \(32, 16\)"):
        lk.combine([(made({Q: (32, 32, 2)}), 1.0), (made({Q: (32, 16, 2)}), 1.0)])
    tasks = [made({Q: (16, 16, 2)}, task_type=task) for task in ("CAUSAL_LM", "SEQ_CLS")]
    with pytest.raises(MergeError, match="different tasks: causal-lm, classify"):
        lk.combine([(task, 1.0) for task in tasks])


def test_combined_adapters_load_here_and_in_peft_with_the_same_logits(tmp_path: Path) -> None:
    import peft

    first = lk.LoraConfig(
        r=3, target_modules=("q_proj", "down_proj"), layers_to_transform=(1,), init_lora_weights=False
    )
    second = lk.LoraConfig(r=2, target_modules=("q_proj", "lm_head"), use_rslora=True, init_lora_weights=False)
    model, inputs = tiny.llama(), tiny.batch()
    bank = lk.attach(model, first, name="one")
    bank.add("two", second)
    found = lk.combine([(bank.snapshot("one"), 0.8), (bank.snapshot("two"), -0.6)])
    assert len(found.pairs()) == 4
    served = lk.attach(tiny.llama(), slots=1)
    served.load("sum", found.save(tmp_path / "sum"))
    served.use("sum")
    ours = tiny.logits(served.model, inputs)
    theirs = tiny.logits(peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "sum").eval(), inputs)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, tiny.logits(tiny.llama(), inputs), atol=1e-2)


def test_ranks_are_found_where_one_path_ends_like_another() -> None:
    config = lk.LoraConfig(target_modules=("q",))
    ranks = {"q": 2, "a.q": 4, "b.a.q": 8, "c.q": 4, "d.e.q": 4, "odd+name.q": 3}
    found = apply_ranks(config, ranks)
    assert {path: found.rank_of(path) for path in ranks} == ranks
    assert {found.scaling_of(path) for path in ranks} == {1.0}


# Resizing


def test_resizing_is_as_good_as_a_dense_svd() -> None:
    whole = made({Q: (96, 64, 16)}, use_rslora=True)
    delta = deltas(whole)[Q]
    u, s, vh = torch.linalg.svd(delta)
    for rank in (1, 4, 15):
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        found = lk.resize(whole, rank=rank)
        assert off(deltas(found)[Q], best) <= 1e-5
        assert abs(off(deltas(found)[Q], delta) - float(s[rank:].norm() / s.norm())) <= 1e-5
        assert found.config.r == rank


def test_resizing_to_the_full_rank_loses_nothing() -> None:
    whole = made({Q: (24, 16, 4), V: (8, 16, 6)}, rank_pattern={"v_proj": 6}, lora_alpha=3)
    for fields in ({"rank": 6}, {"rank": 99}, {"energy": 1.0}, {"bytes": 10**6}):
        found = lk.resize(whole, **fields)
        for path, delta in deltas(whole).items():
            assert off(deltas(found)[path], delta) <= 1e-7
            assert torch.equal(found.pairs()[path].a, whole.pairs()[path].a)


def test_energy_takes_as_few_ranks_as_it_needs_at_each_layer() -> None:
    whole = made({Q: (24, 16, 8), V: (8, 16, 8)})
    for energy in (0.3, 0.9, 0.999):
        found = lk.resize(whole, energy=energy)
        for path, delta in deltas(whole).items():
            squares = torch.linalg.svdvals(delta).square()
            rank = found.pairs()[path].a.shape[0]
            assert squares[:rank].sum() >= energy * squares.sum() * (1 - 1e-9)
            assert squares[: rank - 1].sum() < energy * squares.sum()


def test_bytes_are_kept_to_and_spent_where_they_keep_most() -> None:
    whole = made({Q: (24, 16, 8), V: (8, 16, 8)})
    strong = lk.Adapter(whole.config, {k: t * (10 if "q_proj" in k else 1) for k, t in whole.tensors.items()})
    found = lk.resize(strong, bytes=2_000)
    assert found.nbytes <= 2_000
    assert found.pairs()[Q].a.shape[0] > found.pairs()[V].a.shape[0]
    assert 2_000 - found.nbytes < 4 * (24 + 16) or found.pairs()[Q].a.shape[0] == 8
    with pytest.raises(ConfigError, match="rank 1 everywhere takes 252 bytes more than were given"):
        lk.resize(whole, bytes=4)
    kept = lk.resize(with_head(1), bytes=4 * (16 + 16 + 3 * 16))
    assert torch.equal(kept.saved()["score.weight"], head(1)[f"{PREFIX}score.weight"])
    assert kept.config.r == 1


def test_an_update_of_zero_is_resized_to_zero() -> None:
    whole = made({Q: (24, 16, 4)})
    idle = lk.Adapter(whole.config, {k: torch.zeros_like(t) if "lora_B" in k else t for k, t in whole.tensors.items()})
    for fields in ({"rank": 2}, {"energy": 0.9}):
        found = lk.resize(idle, **fields)
        assert not deltas(found)[Q].any()
        assert found.record["made"]["error"]["share"] == 0


def test_resize_wants_one_thing() -> None:
    for fields in ({}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 0}, {"energy": 1.1}, {"bytes": 0.5}):
        with pytest.raises(ConfigError):
            lk.resize(adapter(), **fields)
    only_head = lk.Adapter(lk.LoraConfig(target_modules=(), modules_to_save=("score",)), head(1))
    with pytest.raises(ConfigError, match="no LoRA weights"):
        lk.resize(only_head, rank=2)


def test_bf16_adapters_are_worked_on_in_double_precision() -> None:
    whole = made({Q: (24, 16, 4)})
    half = lk.Adapter(whole.config, {key: tensor.bfloat16() for key, tensor in whole.tensors.items()})
    assert off(deltas(lk.combine([(half, 0.3)]))[Q], 0.3 * deltas(half)[Q]) <= 1e-6
    assert off(deltas(lk.resize(half, rank=4))[Q], deltas(half)[Q]) <= 1e-6


# Extracting


def changed(model: torch.nn.Module, paths: Mapping[str, int], *, size: float = 0.02) -> Deltas:
    """Adds a known update of a rank to the weights at these paths; returns the updates, (out, in)."""
    generator = torch.Generator().manual_seed(7)
    added = {}
    for path, rank in paths.items():
        layer = model.get_submodule(path)
        out, into = layer.weight.shape
        delta = size * torch.randn(out, rank, generator=generator) @ torch.randn(rank, into, generator=generator)
        layer.weight.data += delta
        added[path] = (delta.T if type(layer).__name__ == "Conv1D" else delta).double()
    return added


def test_extracting_returns_a_known_update(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    tuned = tiny.llama()
    added = changed(tuned, {Q: 8, V: 8, "lm_head": 8, "model.layers.1.mlp.down_proj": 8})
    tuned.save_pretrained(tmp_path / "tuned")
    seen: list[tuple[int, int]] = []
    found = lk.extract(tmp_path / "base", tmp_path / "tuned", rank=8, progress=lambda *now: seen.append(now))
    assert deltas(found).keys() == added.keys()
    assert all(off(deltas(found)[path], delta) <= 1e-5 for path, delta in added.items())
    assert found.record["made"]["error"]["share"] <= 1e-5
    assert seen[-1][0] == seen[-1][1] > 0
    bank = lk.attach(tiny.llama(), slots=1)
    bank.load("a", found.save(tmp_path / "adapter"))
    bank.use("a")
    assert torch.allclose(tiny.logits(bank.model, tiny.batch()), tiny.logits(tuned, tiny.batch()), atol=1e-5)
    assert lk.extract(tmp_path / "base", tmp_path / "tuned", energy=0.999999).config.r == 8


def test_extracting_knows_layers_that_keep_their_weight_the_other_way_round(tmp_path: Path) -> None:
    tiny.gpt2().save_pretrained(tmp_path / "base")
    tuned = tiny.gpt2()
    added = changed(tuned, {"transformer.h.0.attn.c_attn": 3})
    tuned.save_pretrained(tmp_path / "tuned")
    found = lk.extract(tmp_path / "base", tmp_path / "tuned", rank=3)
    assert found.pairs()["transformer.h.0.attn.c_attn"].b.shape == (96, 3)
    assert off(deltas(found)["transformer.h.0.attn.c_attn"], added["transformer.h.0.attn.c_attn"]) <= 1e-5
    assert found.config.fan_in_fan_out


@pytest.mark.parametrize("tie", [False, True])
def test_what_no_pair_can_hold_is_named_or_saved_whole(
    tmp_path: Path, tie: bool, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.llama(tie=tie).save_pretrained(tmp_path / "base")
    tuned = tiny.llama(tie=tie)
    changed(tuned, {Q: 2})
    with torch.no_grad():
        tuned.model.norm.weight += 0.1
        tuned.model.embed_tokens.weight[5] += 0.3
    tuned.save_pretrained(tmp_path / "tuned")
    others = ["model.embed_tokens.weight", *(["lm_head.weight"] if tie else []), "model.norm.weight"]
    with caplog.at_level(logging.WARNING):
        partly = lk.extract(tmp_path / "base", tmp_path / "tuned", rank=2)
    assert sorted(partly.record["made"]["left_out"]) == sorted(others)
    assert "left out" in caplog.text
    assert "model.norm.weight" in caplog.text
    assert not partly.saved()

    wholly = lk.extract(tmp_path / "base", tmp_path / "tuned", rank=2, others="save")
    assert sorted(wholly.saved()) == sorted(others)
    assert wholly.record["made"]["left_out"] == []
    bank = lk.attach(tiny.llama(tie=tie), slots=1)
    bank.load("a", wholly)
    bank.use("a")
    assert torch.allclose(tiny.logits(bank.model, tiny.batch()), tiny.logits(tuned, tiny.batch()), atol=1e-5)


def test_a_changed_bias_takes_its_whole_layer_along(tmp_path: Path) -> None:
    tiny.gpt2().save_pretrained(tmp_path / "base")
    tuned, path = tiny.gpt2(), "transformer.h.0.attn.c_attn"
    changed(tuned, {path: 8, "transformer.h.1.attn.c_attn": 3})
    tuned.get_submodule(path).bias.data += 0.1
    tuned.save_pretrained(tmp_path / "tuned")
    found = lk.extract(tmp_path / "base", tmp_path / "tuned", rank=3, others="save")
    assert list(found.pairs()) == ["transformer.h.1.attn.c_attn"]
    assert sorted(found.saved()) == [f"{path}.bias", f"{path}.weight"]
    assert found.record["made"]["error"]["worst_layer"] == "transformer.h.1.attn.c_attn"


def test_a_new_head_comes_along(tmp_path: Path) -> None:
    base = tiny.bert()
    base.bert.save_pretrained(tmp_path / "base")
    tuned = tiny.bert(labels=3)
    tuned.bert.load_state_dict(base.bert.state_dict())
    tuned.config.id2label, tuned.config.label2id = {0: "a", 1: "b", 2: "c"}, {"a": 0, "b": 1, "c": 2}
    path = "bert.encoder.layer.1.attention.self.query"
    changed(tuned, {path: 2})
    tuned.save_pretrained(tmp_path / "tuned")
    found = lk.extract(tmp_path / "base", tmp_path / "tuned", rank=2)
    assert list(found.pairs()) == [path]
    assert torch.equal(found.saved()["classifier.weight"], tuned.classifier.weight)
    assert found.config.task_type == "SEQ_CLS"
    assert found.record["labels"] == ["a", "b", "c"]
    out = lk.merge(tmp_path / "base", found, tmp_path / "merged")
    assert out.counts["added"] == 2


def test_experts_that_transformers_fuses_are_named(tmp_path: Path) -> None:
    import transformers

    config = transformers.MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        vocab_size=32,
    )
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    added = changed(model, {Q: 2})
    model.model.layers[0].mlp.experts.down_proj.data[1] += 0.1
    model.save_pretrained(tmp_path / "tuned")
    found = lk.extract(tmp_path / "base", tmp_path / "tuned", rank=2)
    assert off(deltas(found)[Q], added[Q]) <= 1e-5
    assert [name.rpartition("experts.")[2] for name in found.record["made"]["left_out"]] == ["1.w2.weight"]
    with pytest.raises(MergeError, match=r"experts\.1\.w2\.weight differ, which transformers keeps in another form"):
        lk.extract(tmp_path / "base", tmp_path / "tuned", rank=2, others="save")


def test_a_fine_tune_kept_in_a_coarser_dtype_differs_only_where_it_was_changed(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    tuned = tiny.llama()
    added = changed(tuned, {Q: 2}, size=1.0)
    tuned.bfloat16().save_pretrained(tmp_path / "tuned")
    found = lk.extract(tmp_path / "base", tmp_path / "tuned", rank=2)
    assert list(found.pairs()) == [Q]
    assert found.record["made"]["left_out"] == []
    assert off(deltas(found)[Q], added[Q]) < 0.01


def test_changes_finer_than_the_dtype_of_the_base_are_found(tmp_path: Path) -> None:
    tiny.llama().bfloat16().save_pretrained(tmp_path / "base")
    tuned = tiny.llama().bfloat16().float()
    before = tuned.get_submodule(Q).weight.detach().double()
    changed(tuned, {Q: 2}, size=1e-5)
    tuned.save_pretrained(tmp_path / "tuned")
    found = lk.extract(tmp_path / "base", tmp_path / "tuned", rank=2)
    assert list(found.pairs()) == [Q]
    assert off(deltas(found)[Q], tuned.get_submodule(Q).weight.detach().double() - before) <= 1e-3


def test_nothing_is_written_to_the_files_that_are_compared(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    tuned = tiny.llama()
    changed(tuned, {Q: 2})
    tuned.save_pretrained(tmp_path / "tuned")
    before = contents(tmp_path)
    lk.extract(tmp_path / "base", tmp_path / "tuned", rank=2)
    again = lk.extract(tmp_path / "base", tmp_path / "tuned", rank=2)
    assert again.digest == lk.extract(tmp_path / "base", tmp_path / "tuned", rank=2).digest
    assert contents(tmp_path) == before


def test_models_that_are_not_alike_are_refused(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    tiny.gpt2().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(MergeError, match="not of one architecture"):
        lk.extract(tmp_path / "base", tmp_path / "gpt2", rank=2)
    with pytest.raises(MergeError, match="the weights are the same"):
        lk.extract(tmp_path / "base", tmp_path / "base", rank=2)
    larger = tiny.llama()
    larger.resize_token_embeddings(100)
    larger.save_pretrained(tmp_path / "larger")
    with pytest.raises(MergeError, match=r"no adapter changes shapes.*\(96, 32\) and \(100, 32\)"):
        lk.extract(tmp_path / "base", tmp_path / "larger", rank=2)
    norm = tiny.llama()
    norm.model.norm.weight.data += 1
    norm.save_pretrained(tmp_path / "norm")
    with pytest.raises(MergeError, match=r"it differs in model\.norm\.weight"):
        lk.extract(tmp_path / "base", tmp_path / "norm", rank=2)
    for fields in ({}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 2.0}, {"rank": 2, "others": "drop"}):
        with pytest.raises(ConfigError):
            lk.extract(tmp_path / "base", tmp_path / "norm", **fields)


# Looking


def test_singular_values_and_comparison_are_those_of_the_dense_deltas() -> None:
    one, two = made({Q: (24, 16, 3)}, seed=1), made({Q: (24, 16, 5), V: (8, 16, 5)}, seed=2, lora_alpha=3)
    a, b = deltas(one)[Q], deltas(two)[Q]
    assert torch.allclose(SourceAdapter.of(one).updates()[Q][1].values(), torch.linalg.svdvals(a)[:3])
    found = compare(one, two)
    assert found.alone == ((), (V,))
    layer = found.layers[Q]
    assert math.isclose(layer.cosine, float((a * b).sum() / (a.norm() * b.norm())), rel_tol=1e-9)
    lengths = a.norm() * (b.norm() ** 2 + deltas(two)[V].norm() ** 2).sqrt()
    assert math.isclose(found.cosine, float((a * b).sum() / lengths), rel_tol=1e-9)
    (u1, _, v1), (u2, _, v2) = torch.linalg.svd(a), torch.linalg.svd(b)
    assert math.isclose(layer.outputs, float((u1[:, :3].T @ u2[:, :5]).square().sum()) / 3, rel_tol=1e-9)
    assert math.isclose(layer.inputs, float((v1[:3] @ v2[:5].T).square().sum()) / 3, rel_tol=1e-9)
    assert found.configs["r"] == (3, 5)
    assert "bias" not in found.configs


def test_an_adapter_is_like_itself_and_unlike_its_negative() -> None:
    one = made({Q: (24, 16, 3)}, seed=1)
    same, opposite = compare(one, one), compare(one, lk.combine([(one, -2.0)]))
    assert math.isclose(same.cosine, 1.0)
    assert math.isclose(opposite.cosine, -1.0)
    assert math.isclose(opposite.layers[Q].inputs, 1.0, rel_tol=1e-6)
    assert compare(with_head(1), with_head(1)).saved == {"score.weight": "equal"}
    assert compare(with_head(1), with_head(2)).saved == {"score.weight": "different"}
    assert compare(with_head(1), made({Q: (16, 16, 2)})).saved == {"score.weight": "only first"}


# What it is made of


@settings(max_examples=25, deadline=None)
@given(out=st.integers(1, 12), into=st.integers(1, 12), ranks=st.tuples(st.integers(1, 15), st.integers(1, 15)))
def test_rank_space_agrees_with_dense_products(out: int, into: int, ranks: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(out * 100 + into)
    one, two = (
        LowRankUpdate(
            torch.randn(out, rank, generator=generator, dtype=torch.float64),
            torch.randn(rank, into, generator=generator, dtype=torch.float64),
        )
        for rank in ranks
    )
    a, b = one.b @ one.a, two.b @ two.a
    assert math.isclose(one.norm(), float(a.norm()), rel_tol=1e-9)
    assert math.isclose(one.inner(two), float((a * b).sum()), rel_tol=1e-9, abs_tol=1e-9)
    assert math.isclose(compute_distance(one, two), float((a - b).norm()), rel_tol=1e-9)
    both = sum_updates([one, two])
    assert torch.allclose(both.b @ both.a, a + b)
    found = one.svd()
    assert torch.allclose((found.u * found.s) @ found.vh, a)
    assert torch.allclose(found.s[: min(out, into)], torch.linalg.svdvals(a)[: len(found.s)], atol=1e-9)


def test_a_distance_far_below_the_norms_is_still_right() -> None:
    one = made({Q: (24, 16, 3)}, seed=1)
    near = LowRankUpdate.of(one.pairs()[Q], 1.0)
    moved = LowRankUpdate(near.b * (1 + 1e-12), near.a)
    assert math.isclose(compute_distance(near, moved), 1e-12 * near.norm(), rel_tol=1e-2)


def test_a_large_matrix_is_taken_apart_without_a_whole_svd() -> None:
    generator = torch.Generator().manual_seed(0)
    known = torch.randn(700, 8, generator=generator) @ torch.randn(8, 600, generator=generator)
    noise = 1e-3 * torch.randn(700, 600, generator=generator)
    assert off(approximate_low_rank(known, rank=8).dense().double(), known.double()) <= 1e-5
    assert approximate_low_rank(known + noise, energy=0.999).rank == 8
    best = torch.linalg.svdvals((known + noise).double())
    for rank in (5, 8, 12):
        found = approximate_low_rank(known + noise, rank=rank)
        missed = float((known + noise - found.dense()).double().norm())
        assert missed <= float(best[rank:].norm()) * 1.002
    squares = torch.linalg.svdvals(noise.double()).square()
    assert approximate_low_rank(noise, energy=0.9).rank == int((squares.cumsum(0) < 0.9 * squares.sum()).sum()) + 1


def test_every_method_is_documented() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "combining.md").read_text("utf-8")
    assert not [method for method in METHODS if f"`{method}`" not in page]
