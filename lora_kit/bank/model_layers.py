"""Where adapters are put: the slots that are free, and the wrapped layers of a model that have them."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import nn

from lora_kit.errors import TargetError
from lora_kit.layers.conv import LoraConvolution
from lora_kit.layers.embedding import LoraEmbedding
from lora_kit.layers.introspect import kind_of, unwrap_module
from lora_kit.layers.linear import LoraExpert, LoraLinear
from lora_kit.layers.parameter import LoraParameter
from lora_kit.layers.routing import Routing
from lora_kit.layers.saved_module import SavedModule
from lora_kit.layers.slot_layer import SlotEntry, SlotLayer
from lora_kit.layers.token_embedding import TiedTokenLayer, TokenTable
from lora_kit.targets.coverage import Coverage
from lora_kit.targets.match import is_in_expert
from lora_kit.targets.token_rows import TokenTarget, key_of, path_of


class SlotAllocator:
    """Which slots are free. Slot 0 is nobody's: it means "no adapter".

    Args:
        limit: how many there are. None: their number doubles when it must.

    Attributes:
        room: slots that every layer must have, slot 0 included.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.room = 1 + (limit or 1)
        self._free = list(range(1, self.room))

    def missing(self, count: int) -> int:
        """How many of this many slots cannot be had, after growing as far as it goes."""
        while self.limit is None and len(self._free) < count:
            grown = 2 * self.room - 1
            self._free += range(self.room, grown)
            self.room = grown
        return max(0, count - len(self._free))

    def take(self) -> int:
        """The lowest free slot."""
        return heapq.heappop(self._free)

    def give_back(self, slot: int) -> None:
        heapq.heappush(self._free, slot)


class WrappedLayers:
    """The layers of a model that adapters cover, by path; one is wrapped when an adapter first covers it.

    Args:
        max_rank: that every layer has room for; None: as much as its adapters have needed.
        dtype: of the slabs.
    """

    def __init__(self, model: nn.Module, routing: Routing, *, max_rank: int | None, dtype: torch.dtype) -> None:
        self._model = model
        self._routing = routing
        self._max_rank = max_rank
        self._dtype = dtype
        self._layers: dict[str, SlotLayer] = {}

    def __getitem__(self, path: str) -> SlotLayer:
        return self._layers[path]

    def entry(self, path: str, slot: int) -> SlotEntry:
        """What a slot holds in a layer."""
        entry = self._layers[path].entries[slot]
        assert entry is not None
        return entry

    def reserve(self, coverage: Coverage, room: int) -> None:
        """Wrap what is covered, and have this many slots in every wrapper.

        When it fails, room that was made stays; without an adapter it does nothing.

        Raises:
            TargetError: another adapter covers a module that lies inside one of these, or around it.
        """
        ranks = {target.path: self._max_rank or target.slot_rank for target in coverage.targets}
        whole = frozenset(coverage.saved)
        seen = [path for target in coverage.tokens for path in target.all_paths]
        self._check_nesting(dict.fromkeys([*ranks, *seen], False) | dict.fromkeys(whole, True))
        new: dict[str, SlotLayer] = {}
        parameters = {target.path for target in coverage.targets if target.kind == "parameter"}
        for path in [*ranks, *coverage.saved]:
            if path not in self._layers and path not in parameters:
                module = self._model.get_submodule(path)
                new[path] = SavedModule(module, self._routing) if path in whole else self._make_wrapper(path, module)
                new[path].reserve(room, ranks.get(path, 0), self._dtype)
        if new:
            replace_modules(self._model, {layer.base_layer: layer for layer in new.values()})
            self._layers |= new
        for path in ranks:
            if path not in self._layers:
                self._wrap_parameter(path)
        for target in coverage.tokens:
            ranks[target.key] = len(target.indices)
            self._wrap_tables(target, room)
        for path, layer in self._layers.items():
            layer.reserve(room, ranks.get(path, 0), self._dtype)

    def _make_wrapper(self, path: str, module: nn.Module) -> SlotLayer:
        if kind_of(module) == "convolution":
            return LoraConvolution(module, self._routing)
        return wrap_layer(module, self._routing, of_an_expert=is_in_expert(path))

    def _wrap_parameter(self, path: str) -> None:
        """Put a wrapper around the module of a parameter, outside of those that others of its parameters have."""
        module_path, _, name = path.rpartition(".")
        module = self._model.get_submodule(module_path)
        layer = LoraParameter(module, name, self._routing)
        replace_modules(self._model, {module: layer})
        self._layers[path] = layer

    def _wrap_tables(self, target: TokenTarget, room: int) -> None:
        """Put a table of rows around an embedding, and around what shares its weight a layer that sees the same rows.

        They stand outside of what other adapters have there.
        """
        if target.key in self._layers:
            return
        module = self._model.get_submodule(target.path)
        table = TokenTable(module, self._routing)
        table.reserve(room, len(target.indices), self._dtype)
        replace_modules(self._model, {module: table})
        self._layers[target.key] = table
        for path in target.tied:
            module = self._model.get_submodule(path)
            tied = TiedTokenLayer(module, self._routing, table)
            replace_modules(self._model, {module: tied})
            self._layers[key_of(path)] = tied

    def refresh_from_base(self, paths: Collection[str]) -> None:
        """Bring up to date what was derived from the weights of the modules of these paths."""
        for key, layer in self._layers.items():
            if path_of(key) in paths:
                layer.refresh_from_base()

    def take_over(self, layers: Mapping[str, SlotLayer]) -> None:
        """Count layers as wrapped, by path, that stand in the model already."""
        self._layers |= layers

    def unwrap(self) -> None:
        """Put the model's own layers back."""
        replace_modules(self._model, {layer: unwrap_module(layer) for layer in self._layers.values()})
        self._layers.clear()

    def _check_nesting(self, covered: Mapping[str, bool]) -> None:
        """A layer carries pairs or is saved whole, for all adapters of a bank alike.

        Args:
            covered: path to whether it is saved whole.
        """
        saved = {path_of(key): isinstance(layer, SavedModule) for key, layer in self._layers.items()}
        if covered.items() <= saved.items():
            return
        clashes = [(path, path) for path in covered if saved.get(path, covered[path]) != covered[path]]
        saved |= covered
        clashes += [(path, above) for path in saved for above in _iterate_parents(path) if above in saved]
        for path, other in clashes:
            raise TargetError(
                f"{path} and {other}: one adapter saves the module whole and another puts pairs into it, or rows"
                " of tokens",
                hint="use a bank for each",
            )


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in the places of others, under every name the model knows those by."""
    for parent in list(model.modules()):
        if not isinstance(parent, SlotLayer):
            for key, child in parent._modules.items():
                if child is not None and child in new:
                    parent._modules[key] = new[child]


def _iterate_parents(path: str) -> Iterator[str]:
    """Paths of the modules around a module."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def wrap_layer(module: nn.Module, routing: Routing, *, of_an_expert: bool = False) -> SlotLayer:
    """The wrapper for a layer that carries pairs.

    Args:
        of_an_expert: whether it belongs to one expert of a mixture.
    """
    if kind_of(module) == "embedding":
        return LoraEmbedding(module, routing)
    return LoraExpert(module, routing) if of_an_expert else LoraLinear(module, routing)
