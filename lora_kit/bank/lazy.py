"""Offered adapters: registered by name, and loaded when they are first used."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import nn

from lora_kit.adapter.adapter import Adapter
from lora_kit.bank.host_cache import AdapterCache, LazyAdapter
from lora_kit.bank.slots import LoadedAdapter, LoadedAdapters
from lora_kit.errors import UnknownAdapterError
from lora_kit.targets.compatibility import match_adapter
from lora_kit.targets.coverage import survey_coverage
from lora_kit.targets.legacy_names import convert_to_model_names
from lora_kit.targets.match import named_layers


class LazyAdapters:
    """Offered adapters by name.

    Args:
        loaded_adapters: among which they are loaded.
        model: the base.
        dtype: of the stacked weights.
        max_rank: the largest rank that layers have capacity for; None: it grows.
        cache: keeps those that were evicted.
    """

    def __init__(
        self,
        loaded_adapters: LoadedAdapters,
        model: nn.Module,
        *,
        dtype: torch.dtype,
        max_rank: int | None,
        cache: AdapterCache,
    ) -> None:
        self._loaded_adapters = loaded_adapters
        self._model = model
        self._dtype = dtype
        self._max_rank = max_rank
        self._cache = cache
        self._by_name: dict[str, LazyAdapter] = {}

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._by_name

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def add(self, name: str, source: str | Path | Adapter, *, allow: Collection[str]) -> None:
        """Read an adapter's config, and remember where its weights are."""
        offer = LazyAdapter(source, allow=allow)
        if self._max_rank is not None and offer.config.largest_rank > self._max_rank:
            self._loaded_adapters.check_rank(name, survey_coverage(self._model, offer.config))
        self._by_name[name] = offer

    def remove(self, name: str) -> None:
        """Withdraw an offer, if there is one of that name."""
        self._by_name.pop(name, None)

    def clear(self) -> None:
        self._by_name.clear()

    def read(self, name: str) -> Adapter:
        """Return the adapter itself, from the cache or from its folder."""
        return self._by_name[name].read(self._cache)

    def load(self, names: Collection[str], *, keep: Collection[str | None], slots_in_use: Collection[int]) -> None:
        """Load offered adapters, all of them or none.

        Args:
            keep: names of adapters that are not evicted.
            slots_in_use: slots whose adapters are not evicted, either.

        Raises:
            UnknownAdapterError: no such offer. Besides, what `AdapterBank.load` raises.
        """
        for name in names:
            if name not in self._by_name:
                raise self.make_unknown_error(name)
        loaded = [name for name in keep if name is not None and name in self._loaded_adapters]
        kept_slots = {*slots_in_use, *(self._loaded_adapters[name].slot for name in loaded)}
        if (
            not self._loaded_adapters.has_draining
        ):  # one of these may take a draining slot, which is seen when it is read
            self._loaded_adapters.select_evictions(names, keep=kept_slots)  # raises before anything is read
        arriving = {name: self._match(name) for name in names}
        with self._loaded_adapters.admit_adapters(arriving, keep=kept_slots):
            for adapter in arriving.values():
                self._loaded_adapters.fill(adapter)

    def _match(self, name: str) -> LoadedAdapter:
        """Read an offered adapter, and match it with the model."""
        offer = self._by_name[name]
        adapter = offer.read(self._cache)
        with self._loaded_adapters.routing.module_lock:
            modules = list(named_layers(self._model))
            adapter = convert_to_model_names(name, adapter, self._model, modules)
            coverage = match_adapter(name, adapter, self._model, dtype=self._dtype, allow=offer.allow, modules=modules)
        return LoadedAdapter(adapter.config, coverage, adapter, offer)

    def make_unknown_error(self, name: object) -> UnknownAdapterError:
        """Return the error for a name that no adapter has."""
        return UnknownAdapterError(str(name), dict.fromkeys([*self._loaded_adapters, *self]))
