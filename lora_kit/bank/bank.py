"""AdapterBank: the adapters of one model, beside it as an optimizer is. It knows names and slots; layers do not."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_kit.adapter import PREFIX, Adapter, check_allowances, magnitude_key, pair_keys
from lora_kit.bank.places import WrappedLayers
from lora_kit.bank.reference import Reference
from lora_kit.bank.residents import Resident, Residents
from lora_kit.cache import AdapterCache, Offer
from lora_kit.config import ALL_LINEAR, LoraConfig
from lora_kit.errors import AdapterError, BankError, ConfigError, UnknownAdapterError
from lora_kit.fingerprint import fingerprint
from lora_kit.fit import fitted
from lora_kit.fold import Retention, check_foldable, folded, weight_of
from lora_kit.layers import (
    BASE,
    MAGNITUDE,
    A,
    B,
    LoraLinear,
    Routing,
    SavedModule,
    SlotLayer,
    initialise,
    is_packed,
    kind_of,
    pause_packing,
    resume_packing,
)
from lora_kit.ops import dora_scale
from lora_kit.targets import Coverage, Target, find, suffixes, survey


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
        max_rank: the largest rank there is room for, fixed likewise; None: it grows.
        dtype: of the slabs. fp32 where a config is given, since trainable adapters are fp32; else the model's own.
        cache_bytes: host memory for offered adapters that had to leave their slots, the least recently used ones first
            to go.

    Raises:
        BankError: the model has a bank already.
        TargetError: the config does not fit the model; the model is as it was.
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


class AdapterBank:
    """Named adapters in the slots of a model's layers. Made by `attach`.

    Attributes:
        cache: the host memory behind the slots.
    """

    def __init__(
        self, model: nn.Module, *, slots: int | None, max_rank: int | None, dtype: torch.dtype, cache_bytes: int
    ) -> None:
        for label, value in (("slots", slots), ("max_rank", max_rank)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"{label} must be a whole number from 1; {value!r} was given")
        self.model = model
        self.dtype = dtype
        self.cache = AdapterCache(cache_bytes)
        self._max_rank = max_rank
        self._routing = Routing()
        self._returning: list[tuple[int, ...]] = []  # slots that blocks now open go back to
        self._layers = WrappedLayers(model, self._routing, max_rank=max_rank, dtype=dtype)
        self._residents = Residents(self._layers, slots=slots, max_rank=max_rank, cache=self.cache)
        self._offers: dict[str, Offer] = {}
        self._frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self._paused = pause_packing(model)
        model.__dict__["_lora_kit_bank"] = True

    # What is here

    @property
    def names(self) -> tuple[str, ...]:
        """Adapters that have a slot."""
        return tuple(self._residents)

    @property
    def offered(self) -> tuple[str, ...]:
        """Adapters that are brought into a slot when they are needed, those that have one among them."""
        return tuple(self._offers)

    @property
    def active(self) -> str | tuple[str | None, ...] | None:
        """The adapter in use: a name, one name per row inside `rows`, or None for the base."""
        names = {self._residents[name].slot: name for name in self._residents}
        if self._routing.mixed:
            return tuple(names.get(slot) for slot in self._routing.rows)
        return names.get(self._routing.slot)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The leaf parameters of a trainable adapter, fp32: the only tensors of the model that require grad.

        Raises:
            BankError: the adapter was loaded, not added.
        """
        leaves = self._resident(name).leaves
        if not leaves:
            raise BankError(f"{name!r} was loaded and is not trainable", hint="add one, then restore this into it")
        return leaves

    def coverage(self, name: str) -> Coverage:
        """Which layers an adapter covers."""
        return self._resident(name).coverage

    def fingerprint(self) -> dict[str, Any]:
        """What tells this base from others; see `lora_kit.fingerprint`."""
        return fingerprint(self.model, name=_model_name(self.model))

    def _resident(self, name: str) -> Resident:
        """The adapter of that name in its slot; what is offered is brought in."""
        if name not in self._residents:
            self._bring_in([name], beside=())
        return self._residents[name]

    # Coming and going

    def add(self, name: str, config: Any) -> Coverage:
        """Start a trainable adapter: fresh leaf parameters, `B A` zero. It is used once `use` says so.

        Raises:
            TargetError: the config does not fit the model. BankError: the name is taken, or there is no room.
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
        self._check_name(name)
        coverage = find(self.model, config)
        resident = Resident(config, coverage)
        with self._residents.admitted({name: resident}, keep=self._slots_in_use()):
            for target in coverage.targets:
                device = self._layers[target.path].device
                a = torch.empty(target.shapes[0], device=device)
                b = torch.empty(target.shapes[1], device=device)
                initialise(a, b, kind=target.kind, init=config.init_lora_weights)
                self._residents.put(resident, target.path, {A: a, B: b} | self._lengths(target, a, b), target.scaling)
            for path in coverage.saved:
                self._residents.put(resident, path, self._layers[path].base_layer.state_dict(), 1.0)
            for path in resident.layers:
                resident.leaves += self._layers[path].make_trainable(resident.slot, config.lora_dropout)
        return coverage

    def load(self, name: str, source: str | Path | Adapter, *, allow: Collection[str] = ()) -> Adapter:
        """Put an adapter into a slot, where `use` and `rows` find it by name.

        Args:
            source: an adapter folder, or an Adapter.
            allow: of `other-base`, `extra-keys`, `changed-files`, `unmatched-targets`: what may pass instead of being
                refused.

        Raises:
            AdapterError: listing every way in which it does not fit the model; the bank is as it was.
            BaseMismatchError: it was made for another base. BankError: the name is taken, or there is no room.
        """
        check_allowances(allow)
        self._check_name(name)
        adapter = source if isinstance(source, Adapter) else Adapter.load(source, allow=allow)
        coverage = fitted(name, adapter, self.model, dtype=self.dtype, allow=allow)
        resident = Resident(adapter.config, coverage, adapter)
        with self._residents.admitted({name: resident}, keep=self._slots_in_use()):
            self._residents.fill(resident)
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
        self._check_name(name)
        offer = Offer(source, allow=allow)
        if self._max_rank is not None and offer.config.largest_rank > self._max_rank:
            self._residents.check_rank(name, survey(self.model, offer.config))
        self._offers[name] = offer

    def unload(self, name: str) -> None:
        """Take an adapter out and free its slot. One that was offered is so no longer.

        Raises:
            BankError: it is in use.
        """
        if name in self._residents:
            if self._residents[name].slot in self._slots_in_use():
                raise BankError(f"{name!r} is in use", hint="use(None) or another adapter first")
            self._residents.remove(name)
        elif name not in self._offers:
            raise self._unknown(name)
        self._offers.pop(name, None)

    def restore(self, name: str, adapter: Adapter) -> None:
        """Copy an adapter's values into the trainable adapter of that name, leaf by leaf.

        Raises:
            AdapterError: the two do not hold the same tensors; nothing is copied.
            BankError: the adapter of that name was loaded, not added.
        """
        self.parameters(name)  # only a trainable one has values to overwrite
        leaves = self._tensors(name)
        told = [f"{key} is missing" for key in leaves.keys() - adapter.tensors.keys()]
        told += [f"{key} is not expected" for key in adapter.tensors.keys() - leaves.keys()]
        common = leaves.keys() & adapter.tensors.keys()
        told += [
            f"{key} is {tuple(adapter.tensors[key].shape)}, {tuple(leaves[key].shape)} is expected"
            for key in common
            if adapter.tensors[key].shape != leaves[key].shape
        ]
        if told:
            raise AdapterError(f"this adapter does not fit {name!r}:\n  " + "\n  ".join(sorted(told)))
        with torch.no_grad():
            for key, leaf in leaves.items():
                leaf.copy_(adapter.tensors[key])

    def detach(self) -> None:
        """Give the model back as it was: its own layers, keys, bits and `requires_grad`."""
        if self.model.__dict__.pop("_lora_kit_bank", None) is None:
            raise BankError("this bank was detached already")
        self._layers.unwrap()
        resume_packing(self._paused)
        for held in (self._residents, self._offers, self.cache):
            held.clear()
        self._routing.to_slot(BASE)
        for parameter in self._frozen:
            parameter.requires_grad_(True)

    # Using

    def use(self, name: str | None) -> None:
        """Route every row to one adapter, or to the base with None. One assignment, whatever is loaded.

        What is offered and has no slot is brought in first, here as in `using` and `rows`; if that fails, everything is
        as it was.
        """
        if name is not None and name not in self._residents:
            self._bring_in([name], beside=())
        self._routing.to_slot(BASE if name is None else self._residents.slot_of(name))

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """`use` for the length of a block."""
        with self._routed([name]):
            yield

    @contextlib.contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Route row i of the batch to the adapter names[i], or to the base with None, for the length of a block.

        Beams and several returned sequences belong to the row they come from.
        """
        if isinstance(names, str) or not names:
            raise ConfigError(f"a list with one name (or None) per row was expected; {names!r} was given")
        with self._routed(names):
            yield

    def reference(self) -> Reference:
        """The base as a model of its own, for trainers that want a reference model beside the one they train.

        Raises:
            BankError: an adapter covers the head, which such trainers use without its adapter.
        """
        return Reference(self)

    @contextlib.contextmanager
    def _routed(self, names: Sequence[str | None]) -> Iterator[None]:
        slots = self._slots_of(names)
        self._returning.append(self._routing.held)
        self._routing.to_rows(slots)
        try:
            yield
        finally:
            self._routing.to_rows(self._returning.pop())

    # Values

    def snapshot(self, name: str) -> Adapter:
        """The adapter as a value: what it was loaded from, or a copy of a trainable one as it stands."""
        if name in self._offers and name not in self._residents:
            return self._offers[name].value(self.cache)
        resident = self._resident(name)
        if resident.adapter is not None:
            return resident.adapter
        config = self._resolved(resident)
        tensors = {key: leaf.detach().to("cpu", copy=True).contiguous() for key, leaf in self._tensors(name).items()}
        return Adapter(config, tensors, record={"base": self.fingerprint()})

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
        """
        adapter = self.snapshot(name)
        adapter.save(folder, record=record, files=files, replace=replace)
        return adapter

    def merge(self, name: str) -> list[Retention]:
        """Fold an adapter into the in-memory weights of the base, and unload it. This cannot be undone.

        Accumulated in fp32 and rounded once to the weight's dtype.

        Raises:
            MergeError: a covered weight is quantised or shared with another module, or the result is not finite; the
                model is as it was.
        """
        resident = self._resident(name)
        if self._returning:
            raise BankError(
                "a merge inside using() or rows() would change the base under them", hint="leave the block first"
            )
        check_foldable(self.model, ((path, self._layers[path]) for path in resident.layers))
        # Everything is computed before anything is written: a failure must leave the base whole, and keeping copies of
        # all weights would double the memory. Largest first, so that what does not fit in memory is found at once.
        pairs = [path for path in resident.layers if not isinstance(self._layers[path], SavedModule)]
        pairs.sort(key=lambda path: -weight_of(self._layers[path]).numel())
        retentions = {path: folded(path, self._layers[path], resident.slot)[1] for path in pairs}
        with torch.no_grad():
            for path in pairs:
                weight_of(self._layers[path]).copy_(folded(path, self._layers[path], resident.slot)[0])
            for path in set(resident.layers) - set(pairs):
                self._layers[path].base_layer.load_state_dict(self._entry(resident, path))
        if resident.slot == self._routing.slot:
            self._routing.to_slot(BASE)
        changed = tuple(resident.layers)
        self._residents.remove(name)
        self._offers.pop(name, None)
        for path in changed:
            self._layers[path].base_changed()
        return [retentions[path] for path in changed if path in retentions]

    # Inside

    def _check_name(self, name: Any) -> None:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"an adapter's name is a string; {name!r} was given")
        if name in self._residents or name in self._offers:
            state = "loaded" if name in self._residents else "offered"
            raise BankError(f"{name!r} is {state} already", hint="unload it first")

    def _slots_of(self, names: Sequence[str | None]) -> list[int]:
        """The slot of each name, used just now; what is offered and has none is brought in, all of it or nothing."""
        absent = [name for name in names if name is not None and name not in self._residents]
        if absent:
            self._bring_in(dict.fromkeys(absent), beside=names)
        return [BASE if name is None else self._residents.slot_of(name) for name in names]

    def _bring_in(self, names: Collection[str], *, beside: Collection[str | None]) -> None:
        """Put offered adapters into slots, all of them or none; those beside them keep theirs."""
        for name in names:
            if name not in self._offers:
                raise self._unknown(name)
        beside = [name for name in beside if name in self._residents]
        keep = self._slots_in_use() | {self._residents[name].slot for name in beside if name is not None}
        self._residents.leaving(names, keep=keep)  # that there is no room is said before anything is read
        arriving = {name: self._arrival(name, self._offers[name]) for name in names}
        with self._residents.admitted(arriving, keep=keep):
            for resident in arriving.values():
                self._residents.fill(resident)

    def _arrival(self, name: str, offer: Offer) -> Resident:
        """An offered adapter, found to fit the model."""
        adapter = offer.value(self.cache)
        coverage = fitted(name, adapter, self.model, dtype=self.dtype, allow=offer.allow)
        return Resident(adapter.config, coverage, adapter, offer)

    def _unknown(self, name: object) -> UnknownAdapterError:
        return UnknownAdapterError(str(name), dict.fromkeys([*self._residents, *self._offers]))

    def _slots_in_use(self) -> set[int]:
        return {*self._routing.held, *chain.from_iterable(self._returning)}

    def _lengths(self, target: Target, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        """The magnitude a DoRA starts from, which leaves the weight as it is."""
        if not target.dora:
            return {}
        layer = self._layers[target.path]
        assert isinstance(layer, LoraLinear)
        ones = torch.ones(target.out_features, device=layer.device)
        return {MAGNITUDE: 1 / dora_scale(layer.weight_matrix(), a, b, target.scaling, ones)}

    def _put(self, resident: Resident, path: str, tensors: Mapping[str, Tensor], scaling: float) -> None:
        resident.layers.append(path)
        self._layers[path].put(resident.slot, tensors, scaling)

    def _entry(self, resident: Resident, path: str) -> Mapping[str, Tensor]:
        entry = self._layers[path].entries[resident.slot]
        assert entry is not None
        return entry.tensors

    def _tensors(self, name: str) -> dict[str, Tensor]:
        """An adapter's live tensors by PEFT's keys."""
        resident = self._resident(name)
        tensors: dict[str, Tensor] = {}
        keys = {target.path: target.key for target in resident.coverage.targets}
        for path in resident.layers:
            layer, held = self._layers[path], self._entry(resident, path)
            if isinstance(layer, SavedModule):
                tensors |= {f"{PREFIX}{path}.{key}": tensor for key, tensor in held.items()}
            else:
                key_a, key_b = pair_keys(keys[path], kind_of(layer) or "linear")
                tensors[key_a], tensors[key_b] = held[A], held[B]
                if MAGNITUDE in held:
                    tensors[magnitude_key(path)] = held[MAGNITUDE]
        return tensors

    def _resolved(self, resident: Resident) -> LoraConfig:
        """The config as it is saved: names instead of `all-linear`, and the base it belongs to."""
        config = resident.config
        targets = (
            suffixes(self.model, resident.coverage) if config.target_modules == ALL_LINEAR else config.target_modules
        )
        conv1d = any(type(self._layers[path].base_layer).__name__ == "Conv1D" for path in resident.layers)
        return dataclasses.replace(
            config,
            target_modules=targets,
            fan_in_fan_out=config.fan_in_fan_out or conv1d,
            base_model_name_or_path=config.base_model_name_or_path or _model_name(self.model),
            inference_mode=True,
        )


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _model_name(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None
