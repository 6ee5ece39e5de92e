"""AdapterBank: the adapters of one model, beside it as an optimizer is. It knows names and slots; layers do not."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_kit.adapter import PREFIX, Adapter, check_allowances, magnitude_key, pair_keys
from lora_kit.config import ALL_LINEAR, LoraConfig
from lora_kit.errors import (
    AdapterError,
    BankError,
    BaseMismatchError,
    ConfigError,
    TargetError,
    UnknownAdapterError,
    listed,
)
from lora_kit.fingerprint import differences, fingerprint
from lora_kit.fit import below, misfits
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
    kind_of,
    wrap,
)
from lora_kit.ops import dora_scale
from lora_kit.targets import Coverage, Target, find, suffixes, survey

logger = logging.getLogger(__name__)


@dataclass
class _Resident:
    """An adapter in the bank.

    Attributes:
        adapter: the value it was loaded from; None for a trainable one, whose values live in its leaf parameters.
        layers: paths of the layers that hold something of it.
        leaves: its leaf parameters, empty unless it is trainable.
    """

    slot: int
    config: LoraConfig
    coverage: Coverage
    adapter: Adapter | None = None
    layers: list[str] = field(default_factory=list)
    leaves: list[nn.Parameter] = field(default_factory=list)


def attach(
    model: nn.Module,
    config: Any = None,
    *,
    name: str = "default",
    slots: int | None = None,
    max_rank: int | None = None,
    dtype: torch.dtype | None = None,
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

    Raises:
        BankError: the model has a bank already.
        TargetError: the config does not fit the model; the model is as it was.
    """
    if any(isinstance(module, SlotLayer) for module in model.modules()) or "_lora_kit_bank" in model.__dict__:
        raise BankError("this model has a bank already", hint="add adapters to that one, or detach it first")
    if config is not None:
        dtype = dtype or torch.float32
    bank = AdapterBank(model, slots=slots, max_rank=max_rank, dtype=dtype or _dtype_of(model))
    if config is not None:
        try:
            bank.add(name, config)
        except BaseException:
            bank.detach()
            raise
        bank.use(name)
    return bank


class AdapterBank:
    """Named adapters in the slots of a model's layers. Made by `attach`."""

    def __init__(self, model: nn.Module, *, slots: int | None, max_rank: int | None, dtype: torch.dtype) -> None:
        for label, value in (("slots", slots), ("max_rank", max_rank)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"{label} must be a whole number from 1; {value!r} was given")
        self.model = model
        self.dtype = dtype
        self._slots = slots
        self._max_rank = max_rank
        self._routing = Routing()
        self._returning: list[tuple[int, ...]] = []  # slots that blocks now open go back to
        self._residents: dict[str, _Resident] = {}
        self._layers: dict[str, SlotLayer] = {}
        self._frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        model.__dict__["_lora_kit_bank"] = True

    # What is here

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._residents)

    @property
    def active(self) -> str | tuple[str | None, ...] | None:
        """The adapter in use: a name, one name per row inside `rows`, or None for the base."""
        names = {resident.slot: name for name, resident in self._residents.items()}
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

    def _resident(self, name: str) -> _Resident:
        if name not in self._residents:
            raise UnknownAdapterError(str(name), self._residents)
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
        coverage = find(self.model, config)
        with self._admitted(name, config, coverage) as resident:
            for target in coverage.targets:
                device = self._layers[target.path].device
                a = torch.empty(target.rank, target.in_features, device=device)
                b = torch.empty(target.out_features, target.rank, device=device)
                initialise(a, b, kind=target.kind, init=config.init_lora_weights)
                self._put(resident, target.path, {A: a, B: b} | self._lengths(target, a, b), target.scaling)
            for path in coverage.saved:
                self._put(resident, path, self._layers[path].base_layer.state_dict(), 1.0)
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
        coverage = self._fit(name, adapter, allow)
        with self._admitted(name, adapter.config, coverage, adapter) as resident:
            for target in coverage.targets:
                pair = adapter.pairs()[target.path]
                tensors = {A: pair.a, B: pair.b, MAGNITUDE: pair.magnitude}
                present = {key: tensor for key, tensor in tensors.items() if tensor is not None}
                self._put(resident, target.path, present, target.scaling)
            for path in coverage.saved:
                self._put(resident, path, below(adapter.saved(), path), 1.0)
        return adapter

    def unload(self, name: str) -> None:
        """Take an adapter out and free its slot.

        Raises:
            BankError: it is in use.
        """
        slot = self._resident(name).slot
        if any(slot in held for held in (self._routing.held, *self._returning)):
            raise BankError(f"{name!r} is in use", hint="use(None) or another adapter first")
        self._remove(name)

    def _remove(self, name: str) -> None:
        resident = self._residents.pop(name)
        for path in resident.layers:
            self._layers[path].clear(resident.slot)

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
        self._replace({layer: layer.base_layer for layer in self._layers.values()})
        self._layers.clear()
        self._residents.clear()
        self._routing.to_slot(BASE)
        for parameter in self._frozen:
            parameter.requires_grad_(True)

    # Using

    def use(self, name: str | None) -> None:
        """Route every row to one adapter, or to the base with None. One assignment, whatever is loaded."""
        self._routing.to_slot(BASE if name is None else self._resident(name).slot)

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

    @contextlib.contextmanager
    def _routed(self, names: Sequence[str | None]) -> Iterator[None]:
        slots = [BASE if name is None else self._resident(name).slot for name in names]
        self._returning.append(self._routing.held)
        self._routing.to_rows(slots)
        try:
            yield
        finally:
            self._routing.to_rows(self._returning.pop())

    # Values

    def snapshot(self, name: str) -> Adapter:
        """The adapter as a value: what it was loaded from, or a copy of a trainable one as it stands."""
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
        self._remove(name)
        for path in resident.layers:
            self._layers[path].base_changed()
        return [retentions[path] for path in resident.layers if path in retentions]

    # Inside

    def _check_name(self, name: Any) -> None:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"an adapter's name is a string; {name!r} was given")
        if name in self._residents:
            raise BankError(f"{name!r} is loaded already", hint="unload it first")

    @contextlib.contextmanager
    def _admitted(
        self, name: str, config: LoraConfig, coverage: Coverage, adapter: Adapter | None = None
    ) -> Iterator[_Resident]:
        """A new resident with a slot and wrappers to put things in; taken out again when the block fails.

        Wrappers and room made for it then stay: without an entry they do nothing.
        """
        self._check_name(name)
        self._check_room(name, coverage)
        taken = {resident.slot for resident in self._residents.values()}
        slot = next(number for number in range(1, len(taken) + 2) if number not in taken)
        self._residents[name] = resident = _Resident(slot, config, coverage, adapter)
        try:
            # Tensors made in inference mode could not be written to outside it, by the next swap or load.
            with torch.inference_mode(False):
                self._reserve(coverage)
                yield resident
        except BaseException:
            self._remove(name)
            raise

    def _check_room(self, name: str, coverage: Coverage) -> None:
        rank = max((target.rank for target in coverage.targets), default=0)
        if self._max_rank is not None and rank > self._max_rank:
            raise BankError(
                f"{name!r} has rank {rank}; there is room for {self._max_rank}", hint="attach with a larger max_rank"
            )
        if self._slots is not None and len(self._residents) >= self._slots:
            raise BankError(
                f"{name!r} needs a slot, and all {self._slots} are taken by {listed(self.names)}",
                hint="unload one, or attach with more slots",
            )

    @property
    def _room(self) -> int:
        """Slots every layer must have, slot 0 included; doubling as it grows."""
        if self._slots is not None:
            return self._slots + 1
        highest = max((resident.slot for resident in self._residents.values()), default=1)
        return 1 + (1 << (highest - 1).bit_length())

    def _reserve(self, coverage: Coverage) -> None:
        """Wrap every covered layer, and make room for every resident in every wrapper."""
        ranks = {target.path: self._max_rank or target.rank for target in coverage.targets}
        wrapped: dict[nn.Module, nn.Module] = {}
        for path in [*ranks, *coverage.saved]:
            if path not in self._layers or isinstance(self._layers[path], SavedModule) == (path in ranks):
                self._check_nesting(path, saved=path in coverage.saved)
            if path not in self._layers:
                module = self.model.get_submodule(path)
                layer = wrap(module, self._routing) if path in ranks else SavedModule(module, self._routing)
                layer.reserve(self._room, ranks.get(path, 0), self.dtype)
                self._layers[path] = layer
                wrapped[module] = layer
        self._replace(wrapped)
        for path, layer in self._layers.items():
            layer.reserve(self._room, ranks.get(path, 0), self.dtype)

    def _check_nesting(self, path: str, *, saved: bool) -> None:
        """A layer carries pairs or is saved whole, for all adapters of a bank alike."""
        for other, layer in self._layers.items():
            whole = isinstance(layer, SavedModule)
            if (
                (path == other and whole != saved)
                or path.startswith(other + ".")
                or (saved and other.startswith(path + "."))
            ):
                raise TargetError(
                    f"{path} and {other}: one adapter saves the module whole and another puts pairs into it",
                    hint="use a bank for each",
                )

    def _lengths(self, target: Target, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        """The magnitude a DoRA starts from, which leaves the weight as it is."""
        if not target.dora:
            return {}
        layer = self._layers[target.path]
        assert isinstance(layer, LoraLinear)
        ones = torch.ones(target.out_features, device=layer.device)
        return {MAGNITUDE: 1 / dora_scale(layer.weight_matrix(), a, b, target.scaling, ones)}

    def _put(self, resident: _Resident, path: str, tensors: Mapping[str, Tensor], scaling: float) -> None:
        resident.layers.append(path)
        self._layers[path].put(resident.slot, tensors, scaling)

    def _replace(self, new: Mapping[nn.Module, nn.Module]) -> None:
        """Put modules in the places of others, under every name the model knows those by."""
        for parent in list(self.model.modules()):
            if not isinstance(parent, SlotLayer):
                for key, child in parent._modules.items():
                    if child is not None and child in new:
                        parent._modules[key] = new[child]

    def _entry(self, resident: _Resident, path: str) -> Mapping[str, Tensor]:
        entry = self._layers[path].entries[resident.slot]
        assert entry is not None
        return entry.tensors

    def _tensors(self, name: str) -> dict[str, Tensor]:
        """An adapter's live tensors by PEFT's keys."""
        resident = self._resident(name)
        tensors: dict[str, Tensor] = {}
        for path in resident.layers:
            layer, held = self._layers[path], self._entry(resident, path)
            if isinstance(layer, SavedModule):
                tensors |= {f"{PREFIX}{path}.{key}": tensor for key, tensor in held.items()}
            else:
                key_a, key_b = pair_keys(path, kind_of(layer) or "linear")
                tensors[key_a], tensors[key_b] = held[A], held[B]
                if MAGNITUDE in held:
                    tensors[magnitude_key(path)] = held[MAGNITUDE]
        return tensors

    def _resolved(self, resident: _Resident) -> LoraConfig:
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

    def _fit(self, name: str, adapter: Adapter, allow: Collection[str]) -> Coverage:
        """What an adapter covers in this model; AdapterError with every misfit."""
        coverage = survey(self.model, adapter.config)
        told = misfits(adapter, self.model, coverage, self.dtype)
        if "unmatched-targets" not in allow:
            told += [f"nothing in the model matches {entry}" for entry in coverage.unmatched]
        if told:
            fitting = sum(target.path in adapter.pairs() for target in coverage.targets)
            head = f"{name!r} does not fit this model: {fitting} of {len(coverage.targets)} covered layers have a pair"
            only_unmatched = len(told) == len(coverage.unmatched)
            hint = (
                "allow 'unmatched-targets' if its list of names is meant for several models" if only_unmatched else ""
            )
            raise AdapterError("\n  ".join([head, *told]), hint=hint)
        self._check_base(name, adapter, coverage, allow)
        return coverage

    def _check_base(self, name: str, adapter: Adapter, coverage: Coverage, allow: Collection[str]) -> None:
        if adapter.base is None:
            logger.info("%s: it does not say which base it was made for", name)
            return
        told = differences(adapter.base, self.model, ignore=coverage.saved)
        if told and "other-base" not in allow:
            made_for = adapter.base.get("name") or "another base"
            raise BaseMismatchError(
                f"{name!r} was made for {made_for}, and this is another base: {'; '.join(told)}",
                hint="load it on its own base, or allow 'other-base'",
            )
        if told:
            logger.warning("%s: another base than it was made for: %s", name, "; ".join(told))


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _model_name(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None
