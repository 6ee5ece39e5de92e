"""Which adapters have a slot: how they are loaded, all of them or none, and which are evicted for others."""

from __future__ import annotations

import contextlib
import gc
import heapq
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_kit.adapter.adapter import Adapter
from lora_kit.bank.host_cache import AdapterCache, LazyAdapter
from lora_kit.bank.model_layers import WrappedLayers
from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import BankError, ConfigError, format_list
from lora_kit.layers.initialization import MAGNITUDE, A, B
from lora_kit.layers.route import BASE_SLOT
from lora_kit.layers.routing import Routing
from lora_kit.layers.token_embedding import TOKEN_EMBEDDINGS, TOKEN_INDICES
from lora_kit.targets.compatibility import select_module_tensors
from lora_kit.targets.coverage import Coverage
from lora_kit.torch_utils import translate_out_of_memory


class SlotAllocator:
    """Which slots are free. Slot 0 is never given out: it means "no adapter".

    Args:
        limit: how many there are. None: their number doubles when needed.

    Attributes:
        limit: as given.
        capacity: slots that every layer must have, slot 0 included.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.capacity = 1 + (limit or 1)
        self._free = list(range(1, self.capacity))

    def count_missing(self, count: int) -> int:
        """Return how many of this many slots are not available, after growing where there is no limit."""
        while self.limit is None and len(self._free) < count:
            grown = 2 * self.capacity - 1
            self._free += range(self.capacity, grown)
            self.capacity = grown
        return max(0, count - len(self._free))

    def take(self) -> int:
        """Return the lowest free slot, which is free no longer."""
        return heapq.heappop(self._free)

    def give_back(self, slot: int) -> None:
        heapq.heappush(self._free, slot)


@dataclass
class LoadedAdapter:
    """An adapter in a slot.

    Attributes:
        config: of the adapter.
        coverage: the layers of the model that it covers.
        adapter: the value it was loaded from; None for a trainable one, whose values are its leaf parameters.
        offer: from which it can be loaded again, so that it may be evicted; None: it stays.
        slot: its slot in every layer.
        layers: paths of the layers that hold tensors of it.
        leaves: its leaf parameters, empty unless it is trainable.
    """

    config: LoraConfig
    coverage: Coverage
    adapter: Adapter | None = None
    offer: LazyAdapter | None = None
    slot: int = BASE_SLOT
    layers: list[str] = field(default_factory=list)
    leaves: list[nn.Parameter] = field(default_factory=list)


class LoadedAdapters:
    """Adapters by name, each with a slot of the layers it covers.

    Args:
        layers: of the model.
        routing: which the layers read.
        slots: how many there are; None: their number grows.
        max_rank: the largest rank that layers have capacity for; None: it grows.
        cache: keeps those that are evicted.

    Attributes:
        routing: as given.
    """

    def __init__(
        self,
        layers: WrappedLayers,
        routing: Routing,
        *,
        slots: int | None,
        max_rank: int | None,
        cache: AdapterCache,
    ) -> None:
        self._layers = layers
        self.routing = routing
        self._slots = SlotAllocator(slots)
        self._max_rank = max_rank
        self._cache = cache
        self._by_name: dict[str, LoadedAdapter] = {}
        self._draining: dict[int, tuple[str, LoadedAdapter]] = {}  # by slot: unloaded, but a route or a lease names it
        self._evictable: OrderedDict[str, None] = OrderedDict()  # names, the least recently used first

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._by_name

    def __getitem__(self, name: str) -> LoadedAdapter:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name.copy())  # other threads may load meanwhile

    def names_by_slot(self) -> dict[int, str]:
        """Return the name of the adapter in each slot, also of one that drains."""
        draining = {slot: name for slot, (name, _) in self._draining.copy().items()}
        return draining | {loaded.slot: name for name, loaded in self._by_name.copy().items()}

    def use_slot_of(self, name: str) -> int:
        """Return the slot of an adapter, and mark it as the most recently used."""
        loaded = self._by_name[name]
        if loaded.offer is not None:
            self._evictable.move_to_end(name)
        return loaded.slot

    def check_rank(self, name: str, coverage: Coverage) -> None:
        """Raise BankError for a rank beyond `max_rank`."""
        rank = max((target.slot_rank for target in coverage.targets), default=0)
        if self._max_rank is not None and rank > self._max_rank:
            raise BankError(
                f"{name!r} has rank {rank}; the capacity is {self._max_rank}", hint="attach with a larger max_rank"
            )

    def free_drained_slots(self) -> None:
        """Empty the slots of unloaded adapters that no route and no lease names any more."""
        live = self.routing.find_live_slots() if self._draining else set()
        for slot in self._draining.keys() - live:
            self._empty(self._draining.pop(slot)[1])

    @property
    def has_draining(self) -> bool:
        """Whether slots of unloaded adapters are in use."""
        return bool(self._draining)

    def select_evictions(self, arriving: Collection[str], *, keep: Collection[int]) -> list[str]:
        """Return the names that have to be evicted for others, the least recently used first.

        Args:
            arriving: names that need a slot.
            keep: slots that stay with their adapters.

        Raises:
            BankError: evicting does not free enough slots.
        """
        self.free_drained_slots()
        missing = self._slots.count_missing(len(arriving))
        if missing and self._draining:
            gc.collect()  # what only unreachable objects hold
            self.free_drained_slots()
            missing = self._slots.count_missing(len(arriving))
        if not missing:
            return []
        evictable = [name for name in self._evictable if self._by_name[name].slot not in keep]
        if len(evictable) < missing:
            needed = "needs a slot" if len(arriving) == 1 else f"need {len(arriving)} slots"
            others = [name for name in self._by_name if name not in evictable]
            others += [
                f"{name} (unloaded, but a thread, a task, a backward or a lease uses it)"
                for name, _ in self._draining.values()
            ]
            available = len(arriving) - missing + len(evictable)
            taken = f"all but {available}" if available else f"all {self._slots.limit}"
            wanted = format_list([repr(name) for name in arriving])
            raise BankError(
                f"{wanted} {needed}, and {taken} are taken by {format_list(others)}",
                hint="unload one or use another, or attach with more slots",
            )
        return evictable[:missing]

    @contextlib.contextmanager
    def admit_adapters(self, arriving: Mapping[str, LoadedAdapter], *, keep: Collection[int]) -> Iterator[None]:
        """Give slots and wrappers to new adapters, which the block fills.

        When the block fails, they are removed again and the evicted adapters are put back.

        Args:
            arriving: by name.
            keep: slots that stay with their adapters.

        Raises:
            BankError: not enough slots, or too low a `max_rank`.
            TargetError: they cannot be in one bank with the others.
            OutOfMemoryError: there is not enough memory.
        """
        for name, loaded in arriving.items():
            self.check_rank(name, loaded.coverage)
        new = [name for name, loaded in arriving.items() if self._find_draining(loaded) is None]
        evicted = {name: self._by_name[name] for name in self.select_evictions(new, keep=keep)}
        with translate_out_of_memory("memory ran out in loading", hint="fewer slots, or a smaller max_rank"):
            for loaded in arriving.values():
                self._layers.check_memory(loaded.coverage, self._slots.capacity)
            with self._admit(arriving, evicted):
                yield

    @contextlib.contextmanager
    def _admit(self, arriving: Mapping[str, LoadedAdapter], evicted: dict[str, LoadedAdapter]) -> Iterator[None]:
        # Tensors made in inference mode could not be written to outside it, by the next swap or load.
        with torch.inference_mode(False):
            for loaded in arriving.values():  # before an eviction, since memory may run out
                self._layers.reserve(loaded.coverage, self._slots.capacity)
            for name in evicted:
                self.remove(name)
            try:
                for name, loaded in arriving.items():
                    self._enter(name, loaded)
                yield
            except BaseException:
                for name in arriving.keys() & self._by_name.keys():
                    self.unload(name)
                for name, loaded in reversed(evicted.items()):
                    self._enter(name, loaded)
                    self._evictable.move_to_end(name, last=False)
                    self.fill(loaded)
                raise
        for loaded in evicted.values():
            assert loaded.offer is not None
            assert loaded.adapter is not None
            loaded.offer.put_in_cache(loaded.adapter, self._cache)

    def _enter(self, name: str, loaded: LoadedAdapter) -> None:
        slot = self._find_draining(loaded)
        if slot is None:
            loaded.slot = self._slots.take()
            self.routing.add_slot(loaded.slot)
        else:
            _, drained = self._draining.pop(slot)
            loaded.slot, loaded.layers = slot, drained.layers
        self._by_name[name] = loaded
        if loaded.offer is not None:
            self._evictable[name] = None

    def _find_draining(self, loaded: LoadedAdapter) -> int | None:
        """Return the slot that still holds what an adapter brings, because it was unloaded and drains."""
        for slot, (_, drained) in self._draining.items():
            if not (drained.layers and loaded.adapter and drained.adapter):
                continue
            if (loaded.adapter.digest, loaded.coverage) == (drained.adapter.digest, drained.coverage):
                return slot
        return None

    def fill(self, loaded: LoadedAdapter) -> None:
        """Copy the values of an adapter into its slot, unless they are there still."""
        if loaded.layers:
            return
        adapter = loaded.adapter
        assert adapter is not None
        lora_weights = adapter.all_pairs()
        for target in loaded.coverage.targets:
            weights = lora_weights[target.key]
            tensors = {A: weights.a, B: weights.b}
            if weights.magnitude is not None:
                tensors[MAGNITUDE] = weights.magnitude
            self.put(loaded, target.path, tensors, target.scaling)
        for path in loaded.coverage.saved:
            self.put(loaded, path, select_module_tensors(adapter.saved(), path), 1.0)
        for token_target in loaded.coverage.tokens:
            tokens = adapter.tokens()[token_target.path]
            tensors = {TOKEN_EMBEDDINGS: tokens.rows, TOKEN_INDICES: torch.tensor(tokens.indices)}
            self.put(loaded, token_target.key, tensors, 1.0)

    def put(self, loaded: LoadedAdapter, path: str, tensors: Mapping[str, Tensor], scaling: float) -> None:
        """Copy an adapter's tensors for one layer into its slot."""
        loaded.layers.append(path)
        self._layers[path].put(loaded.slot, tensors, scaling)

    def unload(self, name: str) -> None:
        """Free the name of an adapter at once, and its slot when no route and no lease names it any more."""
        loaded = self._by_name.pop(name)
        self._evictable.pop(name, None)
        self._draining[loaded.slot] = name, loaded
        self.free_drained_slots()

    def remove(self, name: str) -> None:
        """Empty the slot of an adapter at once; it is free when no route and no lease names it any more."""
        loaded = self._by_name[name]
        self._clear_layers(loaded)
        self.unload(name)

    def _empty(self, loaded: LoadedAdapter) -> None:
        """Empty a slot, and free it."""
        self._clear_layers(loaded)
        self._slots.give_back(loaded.slot)

    def _clear_layers(self, loaded: LoadedAdapter) -> None:
        for path in loaded.layers:
            self._layers[path].clear(loaded.slot)
        loaded.layers.clear()

    def clear(self) -> None:
        """Forget all adapters; the layers' slots stay as they are."""
        self._by_name.clear()
        self._draining.clear()
        self._evictable.clear()
        self._slots = SlotAllocator(self._slots.limit)


def check_capacity(label: str, value: object) -> None:
    """Raise ConfigError unless a number of slots or a rank is a whole number from 1, or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigError(f"{label} must be a whole number from 1; {value!r} was given")
