"""Adapters that are known by name and come into a slot when they are needed."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import nn

from lora_kit.adapter.adapter import Adapter
from lora_kit.bank.adapter_cache import AdapterCache, LazyAdapter
from lora_kit.bank.residents import LoadedAdapter, LoadedAdapters
from lora_kit.errors import UnknownAdapterError
from lora_kit.targets.compatibility import match_adapter
from lora_kit.targets.coverage import survey_coverage
from lora_kit.targets.legacy_names import convert_to_model_names


class LazyAdapters:
    """What is offered, by name.

    Args:
        residents: among whom they come in.
        dtype: of the slabs.
        max_rank: the largest rank there is room for; None: it grows.
        cache: keeps those that had to leave.
    """

    def __init__(
        self,
        residents: LoadedAdapters,
        model: nn.Module,
        *,
        dtype: torch.dtype,
        max_rank: int | None,
        cache: AdapterCache,
    ) -> None:
        self._loaded_adapters = residents
        self._model = model
        self._dtype = dtype
        self._max_rank = max_rank
        self._cache = cache
        self._by_name: dict[str, LazyAdapter] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def add(self, name: str, source: str | Path | Adapter, *, allow: Collection[str]) -> None:
        """Read what an adapter is, and remember where it comes from."""
        offer = LazyAdapter(source, allow=allow)
        if self._max_rank is not None and offer.config.largest_rank > self._max_rank:
            self._loaded_adapters.check_rank(name, survey_coverage(self._model, offer.config))
        self._by_name[name] = offer

    def remove(self, name: str) -> None:
        """Forget an offer, where there is one."""
        self._by_name.pop(name, None)

    def clear(self) -> None:
        self._by_name.clear()

    def value(self, name: str) -> Adapter:
        """The adapter itself, read where it has to be."""
        return self._by_name[name].value(self._cache)

    def bring_in(self, names: Collection[str], *, beside: Collection[str | None], in_use: Collection[int]) -> None:
        """Put offered adapters into slots, all of them or none.

        Args:
            beside: names of those that keep theirs. in_use: slots that nobody may leave, either.
        """
        for name in names:
            if name not in self._by_name:
                raise self.make_unknown_error(name)
        beside = [name for name in beside if name in self._loaded_adapters]
        keep = {*in_use, *(self._loaded_adapters[name].slot for name in beside if name is not None)}
        self._loaded_adapters.select_evictions(
            names, keep=keep
        )  # that there is no room is said before anything is read
        arriving = {name: self._load_lazy(name) for name in names}
        with self._loaded_adapters.admit_adapters(arriving, keep=keep):
            for resident in arriving.values():
                self._loaded_adapters.fill(resident)

    def _load_lazy(self, name: str) -> LoadedAdapter:
        """An offered adapter, found to fit the model."""
        offer = self._by_name[name]
        adapter = convert_to_model_names(name, offer.value(self._cache), self._model)
        coverage = match_adapter(name, adapter, self._model, dtype=self._dtype, allow=offer.allow)
        return LoadedAdapter(adapter.config, coverage, adapter, offer)

    def make_unknown_error(self, name: object) -> UnknownAdapterError:
        """What is raised for a name that nobody has."""
        return UnknownAdapterError(str(name), dict.fromkeys([*self._loaded_adapters, *self]))
