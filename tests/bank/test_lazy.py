"""Thousands of adapters known by name, a few in slots, some more in host memory: always the right one, or a refusal."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_kit as lk
from lora_kit.adapter.folder import CONFIG, WEIGHTS
from lora_kit.bank.host_cache import AdapterCache
from lora_kit.errors import AdapterError, BankError, BaseMismatchError, ConfigError, LoraKitError, UnknownAdapterError
from lora_kit.layers.linear import LoraLinear
from lora_kit.layers.slot_layer import SlotLayer
from lora_kit.targets.fingerprint import fingerprint
from tests.support import folders, tiny

SIZE = folders.adapter().nbytes
INPUTS = tiny.batch(rows=4)


def kept(cache: AdapterCache, *adapters: lk.Adapter) -> list[bool]:
    """Whether a cache has these, without using them."""
    return [adapter.digest in cache._adapters for adapter in adapters]


# The cache


def test_a_cache_keeps_what_was_used_last_and_no_more_bytes_than_it_may() -> None:
    cache = AdapterCache(3 * SIZE + 1)
    a, b, c, d, e = (folders.adapter(seed=seed) for seed in range(5))
    for adapter in (a, b, c):
        cache.put(adapter)
    assert cache.get(a.digest) is a
    cache.put(b)  # used again, not twice there
    assert (len(cache), cache.bytes) == (3, 3 * SIZE)
    cache.put(d)
    assert kept(cache, a, b, c, d) == [True, True, False, True]
    cache.put(e)
    assert kept(cache, a, b, c, d, e) == [False, True, False, True, True]
    assert cache.get(c.digest) is None
    assert (cache.hits, cache.misses, cache.evictions, cache.bytes) == (1, 1, 2, 3 * SIZE)
    cache.clear()
    assert (len(cache), cache.bytes) == (0, 0)


def test_what_is_larger_than_a_cache_is_not_adapters_and_drives_nobody_out() -> None:
    cache, small = AdapterCache(SIZE), folders.adapter()
    large = lk.Adapter(folders.config(r=8), folders.tensors(rank=8))
    cache.put(small)
    cache.put(large)
    assert kept(cache, small, large) == [True, False]
    AdapterCache(0).put(small)


@pytest.mark.parametrize("limit", [-1, 1.5, "4GB", None])
def test_a_cache_of_no_size_is_refused(limit: Any) -> None:
    with pytest.raises(ConfigError, match="whole number of bytes"):
        lk.attach(tiny.llama(), slots=1, cache_bytes=limit)


def test_threads_may_share_a_cache() -> None:
    cache, adapters = AdapterCache(3 * SIZE), [folders.adapter(seed=seed) for seed in range(8)]
    wrong: list[lk.Adapter] = []

    def work(seed: int) -> None:
        for adapter in random.Random(seed).choices(adapters, k=2_000):
            found = cache.get(adapter.digest)
            if found not in (None, adapter):
                wrong.append(adapter)
            cache.put(adapter)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cache.bytes == sum(adapter.nbytes for adapter in cache._adapters.values()) == 3 * SIZE
    assert cache.hits + cache.misses == 8_000


# Bringing in


@pytest.fixture
def store(tmp_path: Path) -> dict[str, Path]:
    """Six adapters, as their folders."""
    return {name: folders.adapter(seed=seed).save(tmp_path / name) for seed, name in enumerate("abcdef")}


def offering(store: dict[str, Path], **how: Any) -> tuple[torch.nn.Module, lk.AdapterBank]:
    model = tiny.llama()
    bank = lk.attach(model, max_rank=4, **how)
    for name, folder in store.items():
        bank.offer(name, folder)
    return model, bank


def alone(source: Path | lk.Adapter) -> Tensor:
    """The logits of the inputs with one adapter and nothing else."""
    model = tiny.llama()
    bank = lk.attach(model, slots=1)
    bank.load("x", source)
    bank.use("x")
    return tiny.logits(model, INPUTS)


@pytest.mark.slow
def test_a_thousand_names_in_four_slots_give_what_each_gives_alone(tmp_path: Path) -> None:
    seeds = {f"n{seed}": seed for seed in range(1_000)}
    paths = {name: folders.foreign(tmp_path / name, folders.tensors(seed=seed)) for name, seed in seeds.items()}
    model, bank = offering(paths, slots=4, cache_bytes=10 * SIZE)
    assert (len(bank.offered), bank.names) == (1_000, ())
    draw = random.Random(0)
    often = draw.sample(list(seeds), 15)
    for _ in range(60):
        names: list[str | None] = [draw.choice(often if draw.random() < 0.8 else list(seeds)) for _ in range(3)]
        with bank.rows([*names, None]):
            together = tiny.logits(model, INPUTS)
        bank.use(names[0])
        assert torch.equal(tiny.logits(model, INPUTS), alone(folders.adapter(seed=seeds[str(names[0])])))
        bank.use(None)
        for row, name in enumerate(names):
            expected = alone(folders.adapter(seed=seeds[str(name)]))[row]
            torch.testing.assert_close(together[row], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(together[3], tiny.logits(model, INPUTS)[3], rtol=1e-5, atol=1e-6)
        assert len(bank.names) <= 4
        assert bank.cache.bytes <= 10 * SIZE
    assert bank.cache.hits
    assert bank.cache.evictions
    assert len(bank.offered) == 1_000


def test_who_was_not_used_for_the_longest_time_leaves(store: dict[str, Path]) -> None:
    _, bank = offering(store, slots=3)
    for name, resident in (("a", "a"), ("b", "ab"), ("c", "abc"), ("a", "abc"), ("d", "acd"), ("e", "ade")):
        bank.use(name)
        assert "".join(sorted(bank.names)) == resident
    with bank.rows(["d", "a", None]):
        assert bank.active == ("d", "a", None)
    bank.use("f")  # e was not used for longer than d, but is in use
    assert set(bank.names) == {"a", "e", "f"}


def test_a_bank_that_grows_lets_nobody_go(store: dict[str, Path]) -> None:
    _, bank = offering(store)
    for name in store:
        bank.use(name)
    assert bank.names == tuple(store)
    assert (len(bank.cache), bank.cache.misses) == (0, 0)


def test_what_left_comes_back_from_memory_without_its_folder(store: dict[str, Path]) -> None:
    model, bank = offering(store, slots=1)
    expected = alone(store["a"])
    bank.use("a")
    bank.use(None)
    bank.use("b")
    shutil.rmtree(store["a"])
    bank.use(None)
    bank.use("a")
    assert torch.equal(tiny.logits(model, INPUTS), expected)
    assert (bank.cache.hits, bank.cache.misses) == (1, 0)


def test_one_content_under_two_names_is_adapters_once(store: dict[str, Path]) -> None:
    _, bank = offering(store, slots=1)
    bank.offer("a again", store["a"])
    for name in ("a", None, "b", None, "a again", None, "b", None):
        bank.use(name)
    assert len(bank.cache) == 2


def test_an_offered_value_is_used_as_it_is(store: dict[str, Path]) -> None:
    model, bank = offering(store, slots=1)
    value = folders.adapter(seed=9)
    bank.offer("value", value)
    for name in ("value", None, "a", None, "value"):
        bank.use(name)
    assert torch.equal(tiny.logits(model, INPUTS), alone(value))
    assert bank.snapshot("value") is value
    assert kept(bank.cache, value, lk.Adapter.load(store["a"])) == [False, True]  # it is held by the offer


# Room


def test_loaded_and_trainable_adapters_never_leave_and_the_error_names_them(store: dict[str, Path]) -> None:
    model = tiny.llama()
    bank = lk.attach(model, folders.config(), name="mine", slots=3, max_rank=4)
    bank.load("loaded", store["a"])
    for name in ("b", "c"):
        bank.offer(name, store[name])
    for name in ("b", "c", "b"):
        bank.use("mine")
        bank.use(name)
    assert set(bank.names) == {"mine", "loaded", "b"}
    for taken in (["c"], ["b", "c"]):
        with pytest.raises(BankError, match="'c' needs a slot, and all 3 are taken by mine, loaded, b"):
            bank.rows(taken).__enter__()
        assert bank.active == "b"
        assert set(bank.names) == {"mine", "loaded", "b"}


def test_who_is_in_use_does_not_leave(store: dict[str, Path]) -> None:
    model, bank = offering(store, slots=2)
    bank.use("a")
    before = tiny.logits(model, INPUTS)
    with bank.using("b"):
        with pytest.raises(BankError, match="'c' needs a slot, and all 2 are taken by a, b"):
            bank.use("c")
        assert bank.active == "b"
        with pytest.raises(BankError, match="in use"):
            bank.unload("a")
    assert bank.active == "a"
    assert torch.equal(tiny.logits(model, INPUTS), before)
    bank.use("c")
    assert set(bank.names) == {"a", "c"}
    assert bank.active == "c"


def test_rows_for_more_adapters_than_slots_are_refused_before_anything_is_read(store: dict[str, Path]) -> None:
    _, bank = offering(store, slots=3)
    bank.use("a")
    shutil.rmtree(store["b"])  # would be another error
    with pytest.raises(BankError, match="'b', 'c', 'd' need 3 slots, and all but 2 are taken by a"):
        bank.rows(["b", "c", "d"]).__enter__()
    assert (bank.names, bank.active) == (("a",), "a")


def test_loading_takes_the_slot_of_an_offered_adapter(store: dict[str, Path]) -> None:
    _, bank = offering(store, slots=2)
    for name in ("a", "b", None):
        bank.use(name)
    bank.load("loaded", folders.adapter(seed=9))
    assert set(bank.names) == {"b", "loaded"}
    bank.use("a")
    assert set(bank.names) == {"a", "loaded"}
    assert bank.cache.hits == 1


# Failing


def torn(folder: Path) -> None:
    other = folders.adapter(seed=77).save(folder.with_name("other"))
    shutil.copy(other / WEIGHTS, folder / WEIGHTS)


def for_another_base(folder: Path) -> None:
    shutil.rmtree(folder)
    made_for = {"base": fingerprint(tiny.llama(seed=5), name="another")}
    lk.Adapter(folders.config(), folders.tensors(), record=made_for).save(folder)


def for_a_larger_base(folder: Path) -> None:
    shutil.rmtree(folder)
    lk.Adapter(folders.config(), folders.tensors(size=64)).save(folder)


def of_nan(folder: Path) -> None:
    shutil.rmtree(folder)
    folders.foreign(folder, folders.tensors() | {folders.A0: torch.full((4, 32), float("nan"))})


def replaced(folder: Path) -> None:
    folders.adapter(seed=50).save(folder, replace=True)


FAULTS: dict[str, tuple[Callable[[Path], None], bool, type[LoraKitError], str]] = {
    "vanished": (shutil.rmtree, False, AdapterError, "is not a folder"),
    "weights vanished": (lambda folder: (folder / WEIGHTS).unlink(), False, AdapterError, "has neither"),
    "torn": (torn, False, AdapterError, "changed since it was saved"),
    "cut short": (lambda folder: (folder / WEIGHTS).write_bytes(b"short"), False, AdapterError, "5 bytes"),
    "a damaged config": (lambda folder: (folder / CONFIG).write_text("{"), False, ConfigError, "line 1 column 2"),
    "replaced by another": (replaced, False, AdapterError, "changed since it was offered"),
    "for another base": (for_another_base, True, BaseMismatchError, "made for another"),
    "for a larger base": (for_a_larger_base, True, AdapterError, "32 inputs and 32 outputs"),
    "NaN": (of_nan, True, AdapterError, "NaN or infinity"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_that_fails_when_it_is_needed_changes_nothing(store: dict[str, Path], fault: str) -> None:
    damage, first, kind, told = FAULTS[fault]
    if first:
        damage(store["d"])
    model, bank = offering(store, slots=3)
    with bank.rows(["a", "b"]):
        pass
    bank.use("c")
    before, names = tiny.logits(model, INPUTS), bank.names
    if not first:
        damage(store["d"])
    calls: list[Callable[[], Any]] = [lambda: bank.use("d"), bank.using("d").__enter__, bank.rows(["e", "d"]).__enter__]
    for call in calls:
        with pytest.raises(kind, match=told) as caught:
            call()
        assert caught.value.exit_code == 2
        assert (bank.names, bank.active) == (names, "c")
        assert torch.equal(tiny.logits(model, INPUTS), before)
    with bank.rows(["a", "b", "c", None]):  # none of them left, and each is what it was
        rows = tiny.logits(model, INPUTS)
    torch.testing.assert_close(rows[0], alone(store["a"])[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows[2], before[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("foreign", [False, True])
def test_a_folder_that_changes_after_it_was_read_is_refused_when_it_is_read_again(
    store: dict[str, Path], *, foreign: bool
) -> None:
    if foreign:
        shutil.rmtree(store["a"])
        folders.foreign(store["a"], folders.tensors(seed=0))
    model, bank = offering(store, slots=1, cache_bytes=0)
    for name in ("a", None, "b", None):
        bank.use(name)
    replaced(store["a"])
    with pytest.raises(AdapterError, match=r"changed since it was offered.*offer it again"):
        bank.use("a")
    assert (bank.names, bank.active) == (("b",), None)
    bank.unload("a")
    bank.offer("a", store["a"])
    bank.use("a")
    assert torch.equal(tiny.logits(model, INPUTS), alone(folders.adapter(seed=50)))
    assert bank.cache.misses >= 1


def test_changed_files_pass_where_that_is_allowed(store: dict[str, Path]) -> None:
    model, bank = offering({}, slots=1, cache_bytes=0)
    bank.offer("a", store["a"], allow={"changed-files"})
    bank.offer("b", store["b"])
    for change in (lambda folder: None, torn, replaced):
        change(store["a"])
        bank.use("a")
        assert torch.equal(tiny.logits(model, INPUTS), alone(lk.Adapter.load(store["a"], allow={"changed-files"})))
        for name in (None, "b", None):
            bank.use(name)


def test_a_digest_that_a_folder_only_claims_finds_nothing_in_the_cache(store: dict[str, Path]) -> None:
    """The claim is believed once the folder was read and is what it claims to be."""
    _, bank = offering(store, slots=1)
    for name in ("a", None, "b", None):
        bank.use(name)
    liar = store["a"].with_name("liar")
    shutil.copytree(store["a"], liar)
    torn(liar)
    bank.offer("liar", liar)
    with pytest.raises(AdapterError, match="changed since it was saved"):
        bank.use("liar")


@pytest.mark.parametrize("calls", range(4))
def test_when_memory_runs_out_while_values_are_copied_who_left_is_back(
    store: dict[str, Path], monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """Two come in and two leave; the copy that fails is that of the first layer, the second, …"""
    model, bank = offering(store, slots=3)
    for name in ("a", "b", "c"):
        bank.use(name)
    put, count = LoraLinear.put, iter(range(100))

    def failing(*given: Any) -> None:
        if next(count) == calls:
            raise MemoryError
        put(*given)

    with monkeypatch.context() as patch:
        patch.setattr(LoraLinear, "put", failing)
        with pytest.raises(MemoryError), bank.rows(["d", "e"]):
            pass
    assert bank.active == "c"
    assert set(bank.names) == {"a", "b", "c"}
    bank.use("f")
    assert set(bank.names) == {"b", "c", "f"}  # the order in which they leave is as it was
    for name in "bcfade":
        bank.use(name)
        assert torch.equal(tiny.logits(model, INPUTS), alone(store[name]))


# Offering


def test_an_offer_reads_no_weights(store: dict[str, Path]) -> None:
    (store["a"] / WEIGHTS).write_bytes(b"nothing of value")
    _, bank = offering(store, slots=1)
    assert "a" in bank.offered
    assert bank.names == ()


@pytest.mark.parametrize(
    ("fields", "told"), [({"r": 3_000_000}, "whole number from 1"), ({"peft_type": "IA3"}, "IA3"), ({"r": 8}, "rank 8")]
)
def test_a_config_that_cannot_be_right_is_refused_when_it_is_offered(
    tmp_path: Path, fields: dict[str, Any], told: str
) -> None:
    model, bank = offering({}, slots=1)
    folder = folders.foreign(tmp_path / "x", **fields)
    with pytest.raises(LoraKitError, match=told):
        bank.offer("x", folder)
    with pytest.raises(AdapterError, match="is not a folder"):
        bank.offer("x", tmp_path / "absent")
    with pytest.raises(ConfigError, match="allow="):
        bank.offer("x", folder, allow={"anything"})
    assert bank.offered == ()
    assert not any(isinstance(module, SlotLayer) for module in model.modules())


def test_a_large_rank_that_no_layer_has_is_no_reason_to_refuse(tmp_path: Path) -> None:
    _, bank = offering({}, slots=1)
    bank.offer("x", folders.foreign(tmp_path / "x", r=64, rank_pattern={"q_proj": 4}))
    bank.use("x")


def test_a_name_is_of_one_adapter(store: dict[str, Path]) -> None:
    _, bank = offering(store, slots=2)
    bank.use("a")
    bank.load("loaded", folders.adapter(seed=9))
    with pytest.raises(BankError, match="'a' is loaded already"):
        bank.offer("a", store["b"])
    with pytest.raises(BankError, match="'b' is offered already"):
        bank.offer("b", store["b"])
    with pytest.raises(BankError, match="'b' is offered already"):
        bank.load("b", store["b"])
    with pytest.raises(BankError, match="'loaded' is loaded already"):
        bank.offer("loaded", store["b"])
    for name in ("", None, 5):
        with pytest.raises(ConfigError, match="name is a string"):
            bank.offer(name, store["b"])  # type: ignore[arg-type]


def test_unloading_ends_an_offer(store: dict[str, Path]) -> None:
    _, bank = offering(store, slots=2)
    bank.use("a")
    bank.use(None)
    for name in ("a", "b"):
        bank.unload(name)
        with pytest.raises(UnknownAdapterError, match="no adapter is called"):
            bank.use(name)
        with pytest.raises(UnknownAdapterError):
            bank.unload(name)
    assert bank.offered == tuple("cdef")
    assert bank.names == ()


def test_an_unknown_name_is_refused_before_others_are_brought_in(store: dict[str, Path]) -> None:
    _, bank = offering({"sonnets": store["a"], "b": store["b"]}, slots=2)
    with pytest.raises(UnknownAdapterError, match="did you mean 'sonnets'"):
        bank.rows(["b", "sonets"]).__enter__()
    assert bank.names == ()


def test_everything_that_takes_a_name_takes_an_offered_one(store: dict[str, Path], tmp_path: Path) -> None:
    model, bank = offering(store, slots=1)
    assert bank.snapshot("a") == folders.adapter(seed=0)
    assert bank.save("b", tmp_path / "copy") == folders.adapter(seed=1)
    assert bank.names == ()  # a value needs no slot
    assert len(bank.coverage("c").targets) == 2
    with pytest.raises(BankError, match="not trainable"):
        bank.parameters("c")
    expected = alone(store["d"])
    bank.merge("d")
    torch.testing.assert_close(tiny.logits(model, INPUTS), expected, rtol=1e-4, atol=1e-5)
    assert "d" not in bank.offered  # merging it again would count it twice


def test_detaching_forgets_offers_and_memory(store: dict[str, Path]) -> None:
    model, bank = offering(store, slots=1)
    before = {name: tensor.clone() for name, tensor in tiny.llama().state_dict().items()}
    for name in ("a", None, "b"):
        bank.use(name)
    bank.detach()
    assert (len(bank.cache), bank.cache.bytes) == (0, 0)
    assert lk.attach(model).offered == ()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
