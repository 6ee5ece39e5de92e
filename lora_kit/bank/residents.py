"""Which adapters have a slot: how they come in, all of them or none, and which ones leave for others."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_kit.adapter.adapter import Adapter
from lora_kit.bank.adapter_cache import AdapterCache, LazyAdapter
from lora_kit.bank.model_layers import SlotAllocator, WrappedLayers
from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import BankError, format_list
from lora_kit.layers.initialization import MAGNITUDE, A, B
from lora_kit.layers.routing import BASE_SLOT
from lora_kit.layers.token_embedding import TOKEN_EMBEDDINGS, TOKEN_INDICES
from lora_kit.targets.compatibility import select_module_tensors
from lora_kit.targets.coverage import Coverage


@dataclass
class LoadedAdapter:
    """An adapter in a slot.

    Attributes:
        adapter: the value it was loaded from; None for a trainable one, whose values live in its leaf parameters.
        offer: what it can be brought in by again, so that its slot may be given to another; None: it stays.
        layers: paths of the layers that hold something of it.
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
        slots: how many there are; None: their number grows.
        max_rank: the largest rank there is room for; None: it grows.
        cache: keeps those that leave.
    """

    def __init__(self, layers: WrappedLayers, *, slots: int | None, max_rank: int | None, cache: AdapterCache) -> None:
        self._layers = layers
        self._slots = SlotAllocator(slots)
        self._max_rank = max_rank
        self._cache = cache
        self._by_name: dict[str, LoadedAdapter] = {}
        self._evictable: OrderedDict[str, None] = OrderedDict()  # names, the least recently used first

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._by_name

    def __getitem__(self, name: str) -> LoadedAdapter:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def slot_of(self, name: str) -> int:
        """The slot of an adapter, which is the last one to leave then."""
        resident = self._by_name[name]
        if resident.offer is not None:
            self._evictable.move_to_end(name)
        return resident.slot

    def check_rank(self, name: str, coverage: Coverage) -> None:
        """Raise BankError for a rank that there is no room for."""
        rank = max((target.slot_rank for target in coverage.targets), default=0)
        if self._max_rank is not None and rank > self._max_rank:
            raise BankError(
                f"{name!r} has rank {rank}; there is room for {self._max_rank}", hint="attach with a larger max_rank"
            )

    def select_evictions(self, arriving: Collection[str], *, keep: Collection[int]) -> list[str]:
        """Names that have to leave for others, the least recently used first.

        Args:
            keep: slots that nobody may leave.

        Raises:
            BankError: there is no room, even so.
        """
        missing = self._slots.missing(len(arriving))
        if not missing:
            return []
        free = [name for name in self._evictable if self._by_name[name].slot not in keep]
        if len(free) < missing:
            needed = "needs a slot" if len(arriving) == 1 else f"need {len(arriving)} slots"
            others = format_list([name for name in self._by_name if name not in free])
            available = len(arriving) - missing + len(free)
            had = f"all but {available}" if available else f"all {self._slots.limit}"
            raise BankError(
                f"{format_list([repr(name) for name in arriving])} {needed}, and {had} are taken by {others}",
                hint="unload one or use another, or attach with more slots",
            )
        return free[:missing]

    @contextlib.contextmanager
    def admit_adapters(self, arriving: Mapping[str, LoadedAdapter], *, keep: Collection[int]) -> Iterator[None]:
        """Slots and wrappers for new residents; when the block fails they are taken out again, and who left is back.

        Args:
            keep: slots that nobody may leave.

        Raises:
            BankError: there is no room. TargetError: they cannot be in one bank with others.
        """
        for name, resident in arriving.items():
            self.check_rank(name, resident.coverage)
        left = {name: self._by_name[name] for name in self.select_evictions(arriving, keep=keep)}
        # Tensors made in inference mode could not be written to outside it, by the next swap or load.
        with torch.inference_mode(False):
            for resident in arriving.values():  # before anybody leaves, since memory may run out
                self._layers.reserve(resident.coverage, self._slots.room)
            for name in left:
                self.remove(name)
            try:
                for name, resident in arriving.items():
                    self._enter(name, resident)
                yield
            except BaseException:
                for name in arriving.keys() & self._by_name.keys():
                    self.remove(name)
                for name, resident in reversed(left.items()):
                    self._enter(name, resident)
                    self._evictable.move_to_end(name, last=False)
                    self.fill(resident)
                raise
        for resident in left.values():
            assert resident.offer is not None
            assert resident.adapter is not None
            resident.offer.put_in_cache(resident.adapter, self._cache)

    def _enter(self, name: str, resident: LoadedAdapter) -> None:
        resident.slot = self._slots.take()
        self._by_name[name] = resident
        if resident.offer is not None:
            self._evictable[name] = None

    def fill(self, resident: LoadedAdapter) -> None:
        """Copy the values of an adapter into its slot."""
        adapter = resident.adapter
        assert adapter is not None
        pairs = adapter.all_pairs()
        for target in resident.coverage.targets:
            pair = pairs[target.key]
            tensors = {A: pair.a, B: pair.b}
            if pair.magnitude is not None:
                tensors[MAGNITUDE] = pair.magnitude
            self.put(resident, target.path, tensors, target.scaling)
        for path in resident.coverage.saved:
            self.put(resident, path, select_module_tensors(adapter.saved(), path), 1.0)
        for rows in resident.coverage.tokens:
            held = adapter.tokens()[rows.path]
            self.put(resident, rows.key, {TOKEN_EMBEDDINGS: held.rows, TOKEN_INDICES: torch.tensor(held.indices)}, 1.0)

    def put(self, resident: LoadedAdapter, path: str, tensors: Mapping[str, Tensor], scaling: float) -> None:
        """Copy what an adapter brings to one layer into its slot."""
        resident.layers.append(path)
        self._layers[path].put(resident.slot, tensors, scaling)

    def remove(self, name: str) -> None:
        """Empty the slot of an adapter, and free it."""
        resident = self._by_name.pop(name)
        self._evictable.pop(name, None)
        for path in resident.layers:
            self._layers[path].clear(resident.slot)
        resident.layers.clear()
        self._slots.give_back(resident.slot)

    def clear(self) -> None:
        """Forget everybody; what is in the layers' slots stays there."""
        self._by_name.clear()
        self._evictable.clear()
        self._slots = SlotAllocator(self._slots.limit)
