"""AdapterBank: the adapters of one model, beside it as an optimizer is. It knows names and slots; layers do not."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.folder import check_allowances
from lora_kit.bank.adapter_cache import AdapterCache
from lora_kit.bank.initialize import initialize_adapter, make_plain_config
from lora_kit.bank.lazy import LazyAdapters
from lora_kit.bank.merge_in_memory import fold_into_model
from lora_kit.bank.model_layers import WrappedLayers
from lora_kit.bank.reference_model import ReferenceModel
from lora_kit.bank.residents import LoadedAdapter, LoadedAdapters
from lora_kit.bank.row_check import check_batch_rows
from lora_kit.bank.snapshot import fingerprint_model, restore_adapter, snapshot_adapter
from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import BankError, ConfigError
from lora_kit.layers.fold import Retention
from lora_kit.layers.introspect import is_packed, pause_packing, resume_packing
from lora_kit.layers.routing import BASE_SLOT, Routing
from lora_kit.layers.slot_layer import SlotLayer
from lora_kit.targets.compatibility import match_adapter
from lora_kit.targets.coverage import Coverage, find_coverage
from lora_kit.targets.legacy_names import convert_to_model_names


class AdapterBank:
    """Named adapters in the slots of a model's layers. Made by `attach`.

    Attributes:
        cache: the host memory behind the slots.
    """

    def __init__(
        self, model: nn.Module, *, slots: int | None, max_rank: int | None, dtype: torch.dtype, cache_bytes: int
    ) -> None:
        for label, value in (("slots", slots), ("max_rank", max_rank)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{label} must be a whole number from 1; {value!r} was given")
        self.model = model
        self.dtype = dtype
        self.cache = AdapterCache(cache_bytes)
        self._routing = Routing()
        self._outer_routes: list[tuple[int, ...]] = []  # slots that blocks now open go back to
        self._change_lock = threading.RLock()  # one thread at a time changes who is here, or who is used
        self._layers = WrappedLayers(model, self._routing, max_rank=max_rank, dtype=dtype)
        self._loaded_adapters = LoadedAdapters(self._layers, slots=slots, max_rank=max_rank, cache=self.cache)
        self._lazy_adapters = LazyAdapters(
            self._loaded_adapters, model, dtype=dtype, max_rank=max_rank, cache=self.cache
        )
        self._frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self._paused_layers = pause_packing(model)
        model.__dict__["_lora_kit_bank"] = True

    # What is here

    @property
    def names(self) -> tuple[str, ...]:
        """Adapters that have a slot."""
        return tuple(self._loaded_adapters)

    @property
    def offered(self) -> tuple[str, ...]:
        """Adapters that are brought into a slot when they are needed, those that have one among them."""
        return tuple(self._lazy_adapters)

    @property
    def active(self) -> str | tuple[str | None, ...] | None:
        """The adapter in use: a name, one name per row inside `rows`, or None for the base."""
        names = {self._loaded_adapters[name].slot: name for name in self._loaded_adapters}
        if self._routing.mixed:
            return tuple(names.get(slot) for slot in self._routing.rows)
        return names.get(self._routing.slot)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The leaf parameters of a trainable adapter, fp32: the only tensors of the model that require grad.

        Raises:
            BankError: the adapter was loaded, not added.
            UnknownAdapterError: no adapter of that name.
        """
        leaves = self._get_loaded(name).leaves
        if not leaves:
            raise BankError(f"{name!r} was loaded and is not trainable", hint="add one, then restore this into it")
        return leaves

    def coverage(self, name: str) -> Coverage:
        """Which layers an adapter covers.

        Raises:
            UnknownAdapterError: no adapter of that name.
        """
        return self._get_loaded(name).coverage

    def fingerprint(self) -> dict[str, Any]:
        """What tells this base from others; see `lora_kit.targets.fingerprint`."""
        return fingerprint_model(self.model)

    def _get_loaded(self, name: str) -> LoadedAdapter:
        """The adapter of that name in its slot; what is offered is brought in."""
        if name not in self._loaded_adapters:
            self._bring_in([name], beside=())
        return self._loaded_adapters[name]

    # Coming and going

    def add(self, name: str, config: Any) -> Coverage:
        """Start a trainable adapter: fresh leaf parameters, `B A` zero. It is used once `use` says so.

        Raises:
            TargetError: the config does not fit the model.
            BankError: the name is taken, there is no room, or slots are not fp32.
            ConfigError: the config or the name is none.
        """
        config = LoraConfig.of(config)
        if self.dtype != torch.float32:
            raise BankError(
                f"this bank holds {self.dtype} slots; trainable adapters are fp32",
                hint="attach with dtype=torch.float32",
            )
        if any(is_packed(module) for module in self.model.modules()):
            raise BankError(
                "bitsandbytes packed this base for inference on this CPU, and no gradient passes it now",
                hint="load it anew, and attach before its first inference",
            )
        with self._change_lock:
            self._check_name(name)
            resident = LoadedAdapter(config, find_coverage(self.model, config))
            make_plain_config(config)  # what could not be saved is not trained
            with self._loaded_adapters.admit_adapters({name: resident}, keep=self._slots_in_use()):
                initialize_adapter(resident, self._loaded_adapters, self._layers)
        return resident.coverage

    def load(self, name: str, source: str | Path | Adapter, *, allow: Collection[str] = ()) -> Adapter:
        """Put an adapter into a slot, where `use` and `rows` find it by name.

        Args:
            source: a folder, a name in the store or an id of the hub, as in `Adapter.load`; or an Adapter.
            allow: of `other-base`, `extra-keys`, `changed-files`, `unmatched-targets`: what may pass instead of being
                refused.

        Raises:
            AdapterError: it cannot be read, or does not fit the model, every way being listed; the bank is as it was.
            BaseMismatchError: it was made for another base.
            BankError: the name is taken, or there is no room.
            ConfigError: its config, the name or `allow` is none.
        """
        check_allowances(allow)
        self._check_name(name)
        adapter = source if isinstance(source, Adapter) else Adapter.load(source, allow=allow)
        with self._change_lock:
            self._check_name(name)  # another thread may have taken it meanwhile
            fitting = convert_to_model_names(name, adapter, self.model)
            coverage = match_adapter(name, fitting, self.model, dtype=self.dtype, allow=allow)
            resident = LoadedAdapter(fitting.config, coverage, fitting)
            with self._loaded_adapters.admit_adapters({name: resident}, keep=self._slots_in_use()):
                self._loaded_adapters.fill(resident)
        return adapter

    def offer(self, name: str, source: str | Path | Adapter, *, allow: Collection[str] = ()) -> None:
        """Make an adapter known by name; its weights are read when something needs it, and again after it had to leave.

        It comes into a slot when it is first used. When slots run out, the offered adapter that was not used for the
        longest time leaves its own: never one in use, never one that was loaded or added.

        Args:
            source, allow: as in `load`.

        Raises:
            AdapterError, ConfigError: there is no adapter folder, or its config is wrong. Weights that cannot be read
                or do not fit are refused at the first use.
            BankError: the name is taken, or the rank is larger than there is room for.
        """
        with self._change_lock:
            self._check_name(name)
            self._lazy_adapters.add(name, source, allow=allow)

    def unload(self, name: str) -> None:
        """Take an adapter out and free its slot. One that was offered is so no longer.

        Raises:
            BankError: it is in use.
            UnknownAdapterError: no adapter of that name.
        """
        with self._change_lock:
            if name in self._loaded_adapters:
                if self._loaded_adapters[name].slot in self._slots_in_use():
                    raise BankError(f"{name!r} is in use", hint="use(None) or another adapter first")
                self._loaded_adapters.remove(name)
            elif name not in self._lazy_adapters:
                raise self._lazy_adapters.make_unknown_error(name)
            self._lazy_adapters.remove(name)

    def restore(self, name: str, adapter: Adapter) -> None:
        """Copy an adapter's values into the trainable adapter of that name, leaf by leaf.

        Raises:
            AdapterError: the two do not hold the same tensors; nothing is copied.
            BankError: the adapter of that name was loaded, not added.
            UnknownAdapterError: no adapter of that name.
        """
        self.parameters(name)  # only a trainable one has values to overwrite
        restore_adapter(name, self._get_loaded(name), self._layers, adapter)

    def detach(self) -> None:
        """Give the model back as it was: its own layers, keys, bits and `requires_grad`.

        Raises:
            BankError: it was detached already, or a block of `using` or `rows` is open.
        """
        if self._outer_routes:
            raise BankError(
                "a detach inside using() or rows() would leave nothing to go back to", hint="leave it first"
            )
        if self.model.__dict__.pop("_lora_kit_bank", None) is None:
            raise BankError("this bank was detached already")
        self._layers.unwrap()
        resume_packing(self._paused_layers)
        for held in (self._loaded_adapters, self._lazy_adapters, self.cache):
            held.clear()
        self._routing.route_to_slot(BASE_SLOT)
        for parameter in self._frozen:
            parameter.requires_grad_(True)

    # Using

    def use(self, name: str | None) -> None:
        """Route every row to one adapter, or to the base with None. One assignment, whatever is loaded.

        What is offered and has no slot is brought in first, here as in `using` and `rows`; if that fails, everything is
        as it was.

        Raises:
            UnknownAdapterError: no adapter of that name. For one that is offered also what `load` raises.
        """
        with self._change_lock:
            if name is not None and name not in self._loaded_adapters:
                self._bring_in([name], beside=())
            self._routing.route_to_slot(BASE_SLOT if name is None else self._loaded_adapters.slot_of(name))

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """`use` for the length of a block.

        Raises:
            UnknownAdapterError: as `use`.
        """
        with self._route_rows([name]):
            yield

    @contextlib.contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Route row i of the batch to the adapter names[i], or to the base with None, for the length of a block.

        Beams and several returned sequences belong to the row they come from.

        Raises:
            UnknownAdapterError: as `use`.
            ConfigError: what was given is no list of names.
            RoutingError: in the forward: the batch has another number of rows.

        Example:
            with bank.rows(["sql", None]):
                model.generate(**tokenizer(["all names:"] * 2, return_tensors="pt"), max_new_tokens=2)
        """
        names = [] if names is None or isinstance(names, str) else list(names)
        if not names:
            raise ConfigError("a list with one name (or None) per row was expected")
        with self._route_rows(names), check_batch_rows(self.model, len(names), routed=self._get_route):
            yield

    def reference(self) -> ReferenceModel:
        """The base as a model of its own, for trainers that want a reference model beside the one they train.

        Raises:
            BankError: an adapter covers the head, which such trainers use without its adapter.
        """
        return ReferenceModel(self)

    def _get_route(self) -> tuple[int, tuple[int, ...]]:
        """How deep in blocks this is, and the slots in use."""
        return len(self._outer_routes), self._routing.held

    @contextlib.contextmanager
    def _route_rows(self, names: Sequence[str | None]) -> Iterator[None]:
        with self._change_lock:
            slots = self._slots_of(names)
            self._outer_routes.append(self._routing.held)
            self._routing.route_to_rows(slots)
        try:
            yield
        finally:
            self._routing.route_to_rows(self._outer_routes.pop())

    # Values

    def snapshot(self, name: str) -> Adapter:
        """The adapter as a value: what it was loaded from, or a copy of a trainable one as it stands.

        Raises:
            UnknownAdapterError: no adapter of that name.
        """
        if name in self._lazy_adapters and name not in self._loaded_adapters:
            return self._lazy_adapters.value(name)
        resident = self._get_loaded(name)
        if resident.adapter is not None:
            return resident.adapter
        return snapshot_adapter(resident, self._layers, self.model)

    def save(
        self,
        name: str,
        folder: str | Path,
        *,
        record: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
        replace: bool = False,
    ) -> Adapter:
        """Write an adapter as a folder that PEFT reads, all or nothing; returns what was written.

        Args:
            record, files, replace: as in `Adapter.save`.

        Raises:
            UnknownAdapterError: no adapter of that name.
            StorageError: the folder exists, or the disk refuses; what was there is as it was.
            ConfigError: as in `Adapter.save`.
        """
        adapter = self.snapshot(name)
        adapter.save(folder, record=record, files=files, replace=replace)
        return adapter

    def merge(self, name: str) -> list[Retention]:
        """Fold an adapter into the in-memory weights of the base, and unload it. This cannot be undone.

        Accumulated in fp32 and rounded once to the weight's dtype. Rows of new tokens take the places of the base's,
        for all that share the weight.

        Raises:
            MergeError: a covered weight is quantised or shared with another module, or the result is not finite; the
                model is as it was.
            BankError: inside `using` or `rows`.
            UnknownAdapterError: no adapter of that name.
        """
        resident = self._get_loaded(name)
        if self._outer_routes:
            raise BankError(
                "a merge inside using() or rows() would change the base under them", hint="leave the block first"
            )
        retained = fold_into_model(resident, self._layers, self.model)
        if resident.slot == self._routing.slot:
            self._routing.route_to_slot(BASE_SLOT)
        changed = {*resident.layers, *resident.coverage.replaced}
        self._loaded_adapters.remove(name)
        self._lazy_adapters.remove(name)
        self._layers.refresh_from_base(changed)
        return retained

    # Inside

    def _check_name(self, name: Any) -> None:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"an adapter's name is a string; {name!r} was given")
        if name in self._loaded_adapters or name in self._lazy_adapters:
            state = "loaded" if name in self._loaded_adapters else "offered"
            raise BankError(f"{name!r} is {state} already", hint="unload it first")

    def _slots_of(self, names: Sequence[str | None]) -> list[int]:
        """The slot of each name, used just now; what is offered and has none is brought in, all of it or nothing."""
        absent = [name for name in names if name is not None and name not in self._loaded_adapters]
        if absent:
            self._bring_in(absent, beside=names)
        return [BASE_SLOT if name is None else self._loaded_adapters.slot_of(name) for name in names]

    def _bring_in(self, names: Collection[str], *, beside: Collection[str | None]) -> None:
        for name in names:
            if not isinstance(name, str):
                raise self._lazy_adapters.make_unknown_error(name)
        self._lazy_adapters.bring_in(dict.fromkeys(names), beside=beside, in_use=self._slots_in_use())

    def _slots_in_use(self) -> set[int]:
        return {*self._routing.held, *chain.from_iterable(self._outer_routes)}

    def _entry(self, resident: LoadedAdapter, path: str) -> Mapping[str, Tensor]:
        return self._layers.entry(path, resident.slot).tensors


def attach(
    model: nn.Module,
    config: Any = None,
    *,
    name: str = "default",
    slots: int | None = None,
    max_rank: int | None = None,
    dtype: torch.dtype | None = None,
    cache_bytes: int = 2**30,
) -> AdapterBank:
    """Put a bank beside a model. Outputs stay bitwise what they were; `bank.detach()` takes everything away again.

    Args:
        model: the base; its parameters are frozen until `detach`.
        config: a LoraConfig (or PEFT's) to start a trainable adapter with, which becomes the active one.
        name: of that adapter.
        slots: adapters there is room for. The room is fixed, so that compiled and captured models stay valid. None: it
            grows when it must.
        max_rank: the largest rank there is room for, fixed likewise; None: it grows. (Room for rows of new tokens grows
            when it must.)
        dtype: of the slabs. fp32 where a config is given, since trainable adapters are fp32; else the model's own.
        cache_bytes: host memory for offered adapters that had to leave their slots, the least recently used ones first
            to go.

    Raises:
        BankError: the model has a bank already.
        TargetError: the config does not fit the model; the model is as it was.
        ConfigError: the config, `slots` or `max_rank` is none.

    Example:
        bank = lk.attach(model, lk.LoraConfig(r=8, lora_alpha=16), name="sql")
        optimizer = torch.optim.AdamW(bank.parameters("sql"), lr=1e-3)
    """
    if any(isinstance(module, SlotLayer) for module in model.modules()) or "_lora_kit_bank" in model.__dict__:
        raise BankError("this model has a bank already", hint="add adapters to that one, or detach it first")
    if config is not None:
        dtype = dtype or torch.float32
    dtype = dtype or _dtype_of(model)
    bank = AdapterBank(model, slots=slots, max_rank=max_rank, dtype=dtype, cache_bytes=cache_bytes)
    if config is not None:
        try:
            bank.add(name, config)
        except BaseException:
            bank.detach()
            raise
        bank.use(name)
    return bank


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
