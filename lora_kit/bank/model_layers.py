"""The layers of a model that adapters cover: how they are wrapped, and unwrapped again."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Final

import torch
from torch import nn

from lora_kit.errors import TargetError, format_list
from lora_kit.layers.conv import LoraConvolution
from lora_kit.layers.embedding import LoraEmbedding
from lora_kit.layers.expert_linear import LoraExpert
from lora_kit.layers.grouped_linear import LoraGroupedLinear, is_grouped_linear
from lora_kit.layers.introspect import features_of, find_module, is_compiled, kind_of, unwrap_module, unwrap_outer
from lora_kit.layers.linear import LoraLinear
from lora_kit.layers.parameter import LoraParameter
from lora_kit.layers.routing import Routing
from lora_kit.layers.saved_module import SavedModule
from lora_kit.layers.slot_entry import SlotEntry
from lora_kit.layers.slot_layer import SlotLayer, compute_device_of
from lora_kit.layers.token_embedding import TiedTokenLayer, TokenTable
from lora_kit.targets.bypassed_layers import find_read_layers
from lora_kit.targets.coverage import Coverage
from lora_kit.targets.match import is_in_expert, named_layers
from lora_kit.targets.token_rows import TokenTarget, key_of, path_of
from lora_kit.torch_utils import check_memory

logger = logging.getLogger(__name__)

_WORTH_SAYING: Final = 10**9
"""Bytes of slots from which `attach` tells everybody what they take; of fewer, those who debug."""


class WrappedLayers:
    """The layers of a model that adapters cover, by path; one is wrapped when an adapter first covers it.

    Args:
        model: the base.
        routing: which all layers share.
        max_rank: that every layer has capacity for; None: as much as its adapters have needed.
        dtype: of the stacked weights.
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
        """Return what a slot holds in a layer."""
        entry = self._layers[path].entries[slot]
        assert entry is not None
        return entry

    def reserve(self, coverage: Coverage, capacity: int) -> None:
        """Wrap what is covered, and have this many slots in every wrapper.

        After a failure, capacity that was allocated stays; without an adapter it has no effect.

        Raises:
            TargetError: another adapter covers a module that is inside one of these, or around it; or an adapter needs
                to read weights that are offloaded.
        """
        self._check_readable(coverage)
        ranks = {target.path: self._max_rank or target.slot_rank for target in coverage.targets}
        token_paths = [path for target in coverage.tokens for path in target.all_paths]
        self._check_nesting(dict.fromkeys([*ranks, *token_paths], False) | dict.fromkeys(coverage.saved, True))
        self._wrap_modules(coverage, ranks, capacity)
        for path in ranks:
            if path not in self._layers:
                self._wrap_parameter(path, ranks[path], capacity)
        for target in coverage.tokens:
            ranks[target.key] = len(target.indices)
            self._wrap_token_tables(target, capacity)
        for path, layer in self._layers.items():
            layer.reserve(capacity, ranks.get(path, 0), self._dtype)
        self._mark_read_layers()

    def _mark_read_layers(self) -> None:
        """Let layers whose weight a module of the model reads give it the weight with the caller's adapter."""
        if all(layer.is_read_directly is not None for layer in self._layers.values()):
            return
        read = find_read_layers(list(named_layers(self._model)))
        for layer in self._layers.values():
            layer.is_read_directly = unwrap_module(layer) in read

    def check_memory(self, coverage: Coverage, capacity: int) -> None:
        """Raise OutOfMemoryError where the stacked weights that `reserve` would allocate are too large for memory."""
        needed: Counter[torch.device] = Counter()
        for target in coverage.targets:
            layer = self._layers.get(target.path)
            rank = self._max_rank or target.slot_rank
            if target.kind != "parameter" and (layer is None or len(layer.entries) < capacity or layer.rank < rank):
                device = compute_device_of(self._model.get_submodule(target.path))
                per_rank = sum(map(math.prod, target.shapes)) // target.slot_rank
                needed[device] += capacity * rank * per_rank * self._dtype.itemsize
        for device, count in needed.items():
            purpose = f"a capacity of {capacity} slots in {len(coverage.targets)} layers"
            check_memory(count, device, purpose=purpose, hint="attach with fewer slots or a smaller max_rank")

    def check_least_memory(self, capacity: int) -> None:
        """Log what this many slots take at most; raise OutOfMemoryError where one layer's do not fit in memory.

        Which layers adapters will cover is not known yet. At least it is one, so what the smallest needs is needed.
        """
        layers = [module for _, module in named_layers(self._model) if kind_of(module) == "linear"]
        sizes = {module: sum(features_of(module)) for module in layers}
        if not sizes:
            return
        per_feature = capacity * (self._max_rank or 1) * self._dtype.itemsize
        least = min(sizes, key=lambda module: sizes[module])
        device = compute_device_of(least)
        hint = "attach with fewer slots or a smaller max_rank"
        purpose = f"a capacity of {capacity:,} slots in one layer"
        check_memory(sizes[least] * per_feature, device, purpose=purpose, hint=hint)
        most = sum(sizes.values()) * per_feature
        level = logging.INFO if most >= _WORTH_SAYING else logging.DEBUG
        message = "%s slots take at most %s bytes in %s layers, where adapters cover them all"
        logger.log(level, message, f"{capacity:,}", f"{most:,}", f"{len(sizes):,}")

    def _wrap_modules(self, coverage: Coverage, ranks: Mapping[str, int], capacity: int) -> None:
        """Put wrappers around covered layers and saved modules that have none, in one pass over the model."""
        new: dict[str, SlotLayer] = {}
        paths = [target.path for target in coverage.targets if target.kind != "parameter"]
        for path in paths + list(coverage.saved):
            if path not in self._layers:
                module, is_saved = self._find_module(path), path in coverage.saved
                if is_saved:
                    _refuse_wrapped_parts(path, module)
                new[path] = SavedModule(module, self._routing) if is_saved else wrap_layer(path, module, self._routing)
                new[path].reserve(capacity, ranks.get(path, 0), self._dtype)
        if new:
            replace_modules(self._model, {layer.base_layer: layer for layer in new.values()})
            self._layers |= new

    def _wrap_parameter(self, path: str, rank: int, capacity: int) -> None:
        """Put a wrapper around the module of a parameter, outside those of its other parameters."""
        module_path, _, name = path.rpartition(".")
        module = self._find_module(module_path)
        layer = LoraParameter(module, name, self._routing)
        layer.reserve(capacity, rank, self._dtype)
        replace_modules(self._model, {module: layer})
        self._layers[path] = layer

    def _wrap_token_tables(self, target: TokenTarget, capacity: int) -> None:
        """Put a table of rows around an embedding, and layers that use its rows around modules that share its weight.

        They are outside the wrappers that other adapters have there.
        """
        if target.key in self._layers:
            return
        module = self._find_module(target.path)
        table = TokenTable(module, self._routing)
        table.reserve(capacity, len(target.indices), self._dtype)
        replace_modules(self._model, {module: table})
        self._layers[target.key] = table
        for path in target.tied:
            module = self._find_module(path)
            tied = TiedTokenLayer(module, self._routing, table)
            replace_modules(self._model, {module: tied})
            self._layers[key_of(path)] = tied

    def _check_readable(self, coverage: Coverage) -> None:
        """Check that nothing reads base weights that are offloaded: no DoRA, no initialization from weights.

        Raises:
            TargetError: such a weight is on meta between forwards.
        """
        reading = [target.path for target in coverage.targets if target.dora or target.starts_from_weight]
        reading += [target.path.rpartition(".")[0] for target in coverage.targets if target.kind == "parameter"]
        offloaded = [path for path in (*reading, *coverage.replaced) if _is_offloaded(find_module(self._model, path))]
        if offloaded:
            raise TargetError(
                f"these modules are offloaded, and the adapter needs their weights: {format_list(offloaded)}",
                hint="keep them on a device, or use plain LoRA weights of linear layers and embeddings",
            )

    def _find_module(self, path: str) -> nn.Module:
        """Return the module of the model to put a wrapper around.

        Raises:
            TargetError: it was compiled by itself, and so would go on without the wrapper.
        """
        module = find_module(self._model, path)
        if is_compiled(module):
            raise TargetError(
                f"{path} was compiled by itself, and would go on without its adapter",
                hint="compile the model, or a block around this module",
            )
        return unwrap_outer(module)

    def refresh_from_base(self, paths: Collection[str]) -> None:
        """Recompute what was derived from the weights of the modules of these paths."""
        for key, layer in self._layers.items():
            if path_of(key) in paths:
                layer.refresh_from_base()

    def register(self, layers: Mapping[str, SlotLayer]) -> None:
        """Register wrappers, by path, that are in the model already."""
        self._layers |= layers
        self._mark_read_layers()

    def unwrap(self) -> None:
        """Put the model's own layers back."""
        replace_modules(self._model, {layer: unwrap_module(layer) for layer in self._layers.values()})
        self._layers.clear()

    def _check_nesting(self, covered: Mapping[str, bool]) -> None:
        """Check that no adapter has weights for a module, or for a part of one, that another replaces as a whole.

        Args:
            covered: by path, whether the module is replaced as a whole.

        Raises:
            TargetError: there is such a module.
        """
        saved = {path_of(key): isinstance(layer, SavedModule) for key, layer in self._layers.items()}
        if covered.items() <= saved.items():
            return
        clashes = [(path, path) for path in covered if saved.get(path, covered[path]) != covered[path]]
        saved |= covered
        clashes += [(path, above) for path in saved for above in _iterate_parents(path) if above in saved]
        for path, other in clashes:
            raise TargetError(
                f"{path} and {other}: one adapter replaces the module as a whole, and another has LoRA weights or "
                "token embeddings in it",
                hint="use a bank for each",
            )


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules by others, under every name that the model has for them, and in lists that it calls them from."""
    for parent in list(model.modules()):
        if not isinstance(parent, SlotLayer):
            for key, child in parent._modules.items():
                if child is not None and child in new:
                    parent._modules[key] = new[child]
            for values in parent.__dict__.values():  # Mask2Former has the layers of its heads in plain lists, too
                if type(values) is list and any(isinstance(each, nn.Module) for each in values):
                    values[:] = [new.get(each, each) if isinstance(each, nn.Module) else each for each in values]


def _refuse_wrapped_parts(path: str, module: nn.Module) -> None:
    """Raise TargetError where names of wrappers would be in the keys of a module that is saved as a whole."""
    if any(unwrap_outer(part) is not part for part in module.modules()):
        raise TargetError(
            f"parts of {path} were compiled or wrapped by themselves, and it is in modules_to_save",
            hint="compile or wrap the model, or blocks around this module",
        )


def _is_offloaded(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters())


def _iterate_parents(path: str) -> Iterator[str]:
    """Yield the paths of the modules around a module."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def wrap_layer(path: str, module: nn.Module, routing: Routing) -> SlotLayer:
    """Return a wrapper for a layer that has LoRA weights."""
    kind = kind_of(module)
    if kind == "convolution":
        return LoraConvolution(module, routing)
    if kind == "embedding":
        return LoraEmbedding(module, routing)
    if is_grouped_linear(module):
        return LoraGroupedLinear(module, routing)
    return LoraExpert(module, routing) if is_in_expert(path) else LoraLinear(module, routing)
