"""Adapters that are known by name and come into a slot when they are needed."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import nn

from lora_kit.adapter.adapter import Adapter
from lora_kit.bank.adapter_cache import AdapterCache, Offer
from lora_kit.bank.residents import Resident, Residents
from lora_kit.errors import UnknownAdapterError
from lora_kit.targets.compatibility import fitted
from lora_kit.targets.coverage import survey


class Offers:
    """What is offered, by name.

    Args:
        residents: among whom they come in.
        dtype: of the slabs.
        max_rank: the largest rank there is room for; None: it grows.
        cache: keeps those that had to leave.
    """

    def __init__(
        self, residents: Residents, model: nn.Module, *, dtype: torch.dtype, max_rank: int | None, cache: AdapterCache
    ) -> None:
        self._residents = residents
        self._model = model
        self._dtype = dtype
        self._max_rank = max_rank
        self._cache = cache
        self._named: dict[str, Offer] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._named

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def add(self, name: str, source: str | Path | Adapter, *, allow: Collection[str]) -> None:
        """Read what an adapter is, and remember where it comes from."""
        offer = Offer(source, allow=allow)
        if self._max_rank is not None and offer.config.largest_rank > self._max_rank:
            self._residents.check_rank(name, survey(self._model, offer.config))
        self._named[name] = offer

    def remove(self, name: str) -> None:
        """Forget an offer, where there is one."""
        self._named.pop(name, None)

    def clear(self) -> None:
        self._named.clear()

    def value(self, name: str) -> Adapter:
        """The adapter itself, read where it has to be."""
        return self._named[name].value(self._cache)

    def bring_in(self, names: Collection[str], *, beside: Collection[str | None], in_use: Collection[int]) -> None:
        """Put offered adapters into slots, all of them or none.

        Args:
            beside: names of those that keep theirs. in_use: slots that nobody may leave, either.
        """
        for name in names:
            if name not in self._named:
                raise self.unknown(name)
        beside = [name for name in beside if name in self._residents]
        keep = {*in_use, *(self._residents[name].slot for name in beside if name is not None)}
        self._residents.leaving(names, keep=keep)  # that there is no room is said before anything is read
        arriving = {name: self._arrival(name) for name in names}
        with self._residents.admitted(arriving, keep=keep):
            for resident in arriving.values():
                self._residents.fill(resident)

    def _arrival(self, name: str) -> Resident:
        """An offered adapter, found to fit the model."""
        offer = self._named[name]
        adapter = offer.value(self._cache)
        coverage = fitted(name, adapter, self._model, dtype=self._dtype, allow=offer.allow)
        return Resident(adapter.config, coverage, adapter, offer)

    def unknown(self, name: object) -> UnknownAdapterError:
        """What is raised for a name that nobody has."""
        return UnknownAdapterError(str(name), dict.fromkeys([*self._residents, *self]))
