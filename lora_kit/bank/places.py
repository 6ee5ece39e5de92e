"""Where adapters are put: the slots that are free, and the wrapped layers of a model that have them."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from lora_kit.errors import TargetError
from lora_kit.layers import LoraConvolution, LoraParameter, Routing, SavedModule, SlotLayer, kind_of, wrap
from lora_kit.targets import Coverage, is_of_an_expert


class Slots:
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

    def reserve(self, coverage: Coverage, room: int) -> None:
        """Wrap what is covered, and have this many slots in every wrapper.

        When it fails, room that was made stays; without an adapter it does nothing.

        Raises:
            TargetError: another adapter covers a module that lies inside one of these, or around it.
        """
        ranks = {target.path: self._max_rank or target.rank for target in coverage.targets}
        whole = frozenset(coverage.saved)
        self._check_nesting(dict.fromkeys(ranks, False) | dict.fromkeys(whole, True))
        new: dict[str, SlotLayer] = {}
        parameters = {target.path for target in coverage.targets if target.kind == "parameter"}
        for path in [*ranks, *coverage.saved]:
            if path not in self._layers and path not in parameters:
                module = self._model.get_submodule(path)
                new[path] = SavedModule(module, self._routing) if path in whole else self._wrapper(path, module)
                new[path].reserve(room, ranks.get(path, 0), self._dtype)
        if new:
            replace_modules(self._model, {layer.base_layer: layer for layer in new.values()})
            self._layers |= new
        for path in ranks:
            if path not in self._layers:
                self._wrap_parameter(path)
        for path, layer in self._layers.items():
            layer.reserve(room, ranks.get(path, 0), self._dtype)

    def _wrapper(self, path: str, module: nn.Module) -> SlotLayer:
        if kind_of(module) == "convolution":
            return LoraConvolution(module, self._routing)
        return wrap(module, self._routing, of_an_expert=is_of_an_expert(path))

    def _wrap_parameter(self, path: str) -> None:
        """Put a wrapper around the module of a parameter, outside of those that others of its parameters have."""
        module_path, _, name = path.rpartition(".")
        module = self._model.get_submodule(module_path)
        layer = LoraParameter(module, name, self._routing)
        replace_modules(self._model, {module: layer})
        self._layers[path] = layer

    def take_over(self, layers: Mapping[str, SlotLayer]) -> None:
        """Count layers as wrapped, by path, that stand in the model already."""
        self._layers |= layers

    def unwrap(self) -> None:
        """Put the model's own layers back."""
        replace_modules(self._model, {layer: _innermost(layer) for layer in self._layers.values()})
        self._layers.clear()

    def _check_nesting(self, covered: Mapping[str, bool]) -> None:
        """A layer carries pairs or is saved whole, for all adapters of a bank alike.

        Args:
            covered: path to whether it is saved whole.
        """
        saved = {path: isinstance(layer, SavedModule) for path, layer in self._layers.items()}
        if covered.items() <= saved.items():
            return
        clashes = [(path, path) for path in covered if saved.get(path, covered[path]) != covered[path]]
        saved |= covered
        clashes += [(path, above) for path in saved for above in _above(path) if above in saved]
        for path, other in clashes:
            raise TargetError(
                f"{path} and {other}: one adapter saves the module whole and another puts pairs into it",
                hint="use a bank for each",
            )


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in the places of others, under every name the model knows those by."""
    for parent in list(model.modules()):
        if not isinstance(parent, SlotLayer):
            for key, child in parent._modules.items():
                if child is not None and child in new:
                    parent._modules[key] = new[child]


def _innermost(layer: nn.Module) -> nn.Module:
    """The model's own module inside a wrapper, or inside several."""
    while isinstance(layer, SlotLayer):
        layer = layer.base_layer
    return layer


def _above(path: str) -> Iterator[str]:
    """Paths of the modules around a module."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path
