"""AdapterBank: the adapters of one model, beside it as an optimizer is. It knows names and slots; layers know slots."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import torch
from torch import Tensor, nn

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.folder import check_allowances
from lora_kit.bank.adapter_routing import AdapterRouting
from lora_kit.bank.frozen_model import FrozenModel
from lora_kit.bank.host_cache import AdapterCache
from lora_kit.bank.initialize import check_trainable, initialize_adapter, make_plain_config
from lora_kit.bank.lazy import LazyAdapters
from lora_kit.bank.merge_in_memory import fold_into_model
from lora_kit.bank.model_layers import WrappedLayers
from lora_kit.bank.reference_model import ReferenceModel
from lora_kit.bank.routes import RouteChoices
from lora_kit.bank.slots import LoadedAdapter, LoadedAdapters, check_capacity
from lora_kit.bank.snapshot import (
    collect_tensors,
    fingerprint_model,
    load_trained_values,
    restore_adapter,
    snapshot_adapter,
)
from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import BankError
from lora_kit.layers.checkpoint_routes import install_checkpoint_routes
from lora_kit.layers.compiled_routes import install_compiled_routes
from lora_kit.layers.fold import Retention
from lora_kit.layers.routing import Routing
from lora_kit.targets.compatibility import match_adapter
from lora_kit.targets.coverage import Coverage, find_coverage
from lora_kit.targets.legacy_names import convert_to_model_names
from lora_kit.targets.match import named_layers

if TYPE_CHECKING:
    import peft


_ATTACHED_STATE: Final = ("_routing", "_choices", "_layers", "_loaded_adapters", "_lazy_adapters")
"""Attributes that a bank has until it is detached. Every method needs one of them."""


class AdapterBank(AdapterRouting):
    """Named adapters in the slots of a model's layers. Made by `attach`.

    Attributes:
        model: the base, with wrappers around the covered layers.
        dtype: of the stacked weights.
        cache: adapters in host memory that had to leave their slots.
    """

    def __init__(
        self, model: nn.Module, *, slots: int | None, max_rank: int | None, dtype: torch.dtype, cache_bytes: int
    ) -> None:
        check_capacity("slots", slots)
        check_capacity("max_rank", max_rank)
        install_checkpoint_routes()
        install_compiled_routes()
        self.model = model
        self.dtype = dtype
        self.cache = AdapterCache(cache_bytes)
        self._routing = Routing()
        self._choices = RouteChoices(self._routing)
        self._change_lock = threading.RLock()  # one thread at a time changes which adapters are here or in use
        self._layers = WrappedLayers(model, self._routing, max_rank=max_rank, dtype=dtype)
        if slots is not None:
            self._layers.check_least_memory(slots + 1)  # slot 0 is that of no adapter
        self._loaded_adapters = LoadedAdapters(
            self._layers, self._routing, slots=slots, max_rank=max_rank, cache=self.cache
        )
        self._lazy_adapters = LazyAdapters(
            self._loaded_adapters, model, dtype=dtype, max_rank=max_rank, cache=self.cache
        )
        self._frozen_model = FrozenModel(model, self._routing, self._choices)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            """Raise BankError for what `detach` took from every method."""
            if name in _ATTACHED_STATE:
                raise BankError("this bank was detached already", hint="attach a new one")
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}", name=name, obj=self)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise BankError("a bank is not copied or pickled", hint="copy the model, or the Adapter of bank.snapshot(name)")

    # Which adapters are here

    @property
    def names(self) -> tuple[str, ...]:
        """Adapters that have a slot."""
        return tuple(self._loaded_adapters)

    @property
    def offered(self) -> tuple[str, ...]:
        """Adapters that are loaded when they are first needed, those that have a slot now among them."""
        return tuple(self._lazy_adapters)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """Return the leaf parameters of a trainable adapter, fp32: the only tensors of the model that require grad.

        Raises:
            BankError: the adapter was loaded, not added.
            UnknownAdapterError: no adapter of that name.
        """
        leaves = self._get_loaded(name).leaves
        if not leaves:
            raise BankError(f"{name!r} was loaded and is not trainable", hint="add one, then restore this into it")
        return leaves

    def coverage(self, name: str) -> Coverage:
        """Return which layers an adapter covers.

        Raises:
            UnknownAdapterError: no adapter of that name.
        """
        return self._get_loaded(name).coverage

    def fingerprint(self) -> dict[str, object]:
        """Return what tells this base from others; see `lora_kit.targets.fingerprint`."""
        with self._routing.module_lock:
            return fingerprint_model(self.model)

    # Adding and removing

    def add(self, name: str, config: LoraConfig | peft.LoraConfig | Mapping[str, object]) -> Coverage:
        """Add a trainable adapter: new leaf parameters, `B A` zero. It has no effect until `use` names it.

        Raises:
            TargetError: the config does not match the model.
            BankError: the name is taken, no slot is free, or slots are not fp32.
            ConfigError: the config or the name is invalid.
        """
        config = LoraConfig.of(config)
        check_trainable(self.model, self.dtype)
        with self._change_lock:
            self._check_name(name)
            loaded = LoadedAdapter(config, find_coverage(self.model, config))
            make_plain_config(config)  # raises for a config that could not be saved
            live_slots = self._routing.find_live_slots()
            with self._loaded_adapters.admit_adapters({name: loaded}, keep=live_slots), self._routing.module_lock:
                initialize_adapter(loaded, self._loaded_adapters, self._layers)
        return loaded.coverage

    def load(self, name: str, source: str | Path | Adapter, *, allow: Collection[str] = ()) -> Adapter:
        """Put an adapter into a slot, where `use` and `rows` find it by name.

        Args:
            source: a folder, a name in the store or a hub id, as in `Adapter.load`; or an Adapter.
            allow: of `other-base`, `extra-keys`, `changed-files`: what is accepted instead of rejected; of
                `unmatched-targets`: names in the config that match nothing in the model are not warned about.

        Raises:
            AdapterError: it cannot be read, or does not match the model; lists every mismatch. The bank is as it was.
            BaseMismatchError: it was made for another base.
            BankError: the name is taken, or no slot is free.
            ConfigError: its config, the name, `source` or `allow` is invalid.
        """
        check_allowances(allow)
        self._check_name(name)
        adapter = source if isinstance(source, Adapter) else Adapter.load(source, allow=allow)
        with self._change_lock:
            self._check_name(name)  # another thread may have taken it meanwhile
            with self._routing.module_lock:
                modules = list(named_layers(self.model))
                converted = convert_to_model_names(name, adapter, self.model, modules)
                coverage = match_adapter(name, converted, self.model, dtype=self.dtype, allow=allow, modules=modules)
            loaded = LoadedAdapter(converted.config, coverage, converted)
            with self._loaded_adapters.admit_adapters({name: loaded}, keep=self._routing.find_live_slots()):
                self._loaded_adapters.fill(loaded)
        return adapter

    def offer(self, name: str, source: str | Path | Adapter, *, allow: Collection[str] = ()) -> None:
        """Register an adapter by name; its weights are read at the first use, and again after it was evicted.

        When no slot is free, the least recently used of the offered adapters is evicted: never one in use, never one
        that was loaded or added.

        Args:
            source, allow: as in `load`.

        Raises:
            AdapterError, ConfigError: there is no adapter folder, or its config is invalid. Weights that cannot be read
                or do not match are an error at the first use.
            BankError: the name is taken, or the rank is larger than `max_rank`.
        """
        with self._change_lock:
            self._check_name(name)
            self._lazy_adapters.add(name, source, allow=allow)

    def unload(self, name: str) -> None:
        """Remove an adapter: its name is free at once, and an offer of that name is withdrawn.

        Its slot is free when nothing uses it any more. Until then it drains: threads and tasks that only began with the
        adapter, a backward that has to compute a part of its forward again, and leases keep it.

        Raises:
            BankError: the caller, another thread or task, or an open block chose to use it.
            UnknownAdapterError: no adapter of that name.
        """
        with self._change_lock:
            if name in self._loaded_adapters:
                if self._loaded_adapters[name].slot in self._choices.find_chosen_slots():
                    raise BankError(f"{name!r} is in use", hint="use(None) or another adapter first")
                self._loaded_adapters.unload(name)
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
        with self._change_lock:
            if self._choices.is_block_open:
                raise BankError(
                    "detach was called inside using(), rows() or a generation", hint="leave the block first"
                )
            self._layers.unwrap()
            self.cache.clear()
            self._choices.forget()
            self._frozen_model.release()
            for name in _ATTACHED_STATE:
                delattr(self, name)

    def reference(self, name: str | None = None) -> ReferenceModel:
        """Return the base as a model of its own, for trainers that compare the trained model with a reference model.

        Args:
            name: a loaded adapter that the reference has; None for the base alone.

        Raises:
            UnknownAdapterError: no adapter of that name.
            BankError: an adapter covers the head, which such trainers use without its adapter.
        """
        self._frozen_model.check_attached()
        if name is not None:
            self._get_loaded(name)
        return ReferenceModel(self, name)

    # Values

    def snapshot(self, name: str) -> Adapter:
        """Return the adapter as a value: the one that was loaded, or a copy of a trainable one as it is now.

        Raises:
            UnknownAdapterError: no adapter of that name.
        """
        if name in self._lazy_adapters and name not in self._loaded_adapters:
            return self._lazy_adapters.read(name)
        loaded = self._get_loaded(name)
        if loaded.adapter is not None:
            return loaded.adapter
        with self._routing.module_lock:
            return snapshot_adapter(loaded, self._layers, self.model)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return the values that are trained, for checkpoints: by adapter, then by PEFT's key. The memory is shared.

        The model's own `state_dict()` is the base's and holds nothing of the bank.
        """
        loaded = {name: self._loaded_adapters[name] for name in self._loaded_adapters}
        trained = {name: collect_tensors(each, self._layers) for name, each in loaded.items() if each.leaves}
        return {name: {key: leaf.detach() for key, leaf in leaves.items()} for name, leaves in trained.items()}

    def load_state_dict(self, state_dict: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copy the values of `state_dict()` into the trainable adapters: all of them, or none after an error.

        Raises:
            AdapterError: it does not hold the same adapters, with the same tensors; lists every mismatch.
        """
        with self._change_lock:
            load_trained_values(self.state_dict(), state_dict)

    def save(
        self,
        name: str,
        folder: str | Path,
        *,
        record: Mapping[str, object] | None = None,
        files: Mapping[str, bytes] | None = None,
        replace: bool = False,
    ) -> Adapter:
        """Write an adapter as a folder that PEFT reads, all or nothing; return what was written.

        Args:
            record, files, replace: as in `Adapter.save`.

        Raises:
            UnknownAdapterError: no adapter of that name.
            StorageError: the folder exists, or cannot be written; what was there is as it was.
            ConfigError: as in `Adapter.save`.
        """
        adapter = self.snapshot(name)
        adapter.save(folder, record=record, files=files, replace=replace)
        return adapter

    def merge(self, name: str) -> list[Retention]:
        """Fold an adapter into the in-memory weights of the base, and unload it. This cannot be undone.

        Accumulated in fp32 and rounded once to the weight's dtype. Token embeddings replace the base's, for all modules
        that share the weight.

        Raises:
            MergeError: a covered weight is quantized or shared with another module, or the result is not finite; the
                model is as it was.
            BankError: inside `using` or `rows`, or another thread or task chose to use it.
            UnknownAdapterError: no adapter of that name.
        """
        with self._change_lock:
            loaded = self._get_loaded(name)
            if self._choices.is_block_open:
                raise BankError(
                    "a merge inside using(), rows() or a generation would change the base under them",
                    hint="leave the block first",
                )
            if loaded.slot in self._choices.find_chosen_slots(by_others=True):
                raise BankError(f"{name!r} is in use in another thread or task", hint="use(None) there first")
            with self._routing.module_lock:
                retained = fold_into_model(loaded, self._layers, self.model)
            self._choices.leave_slot(loaded.slot)
            changed = {*loaded.layers, *loaded.coverage.replaced}
            self._loaded_adapters.remove(name)
            self._lazy_adapters.remove(name)
            self._layers.refresh_from_base(changed)
            return retained
