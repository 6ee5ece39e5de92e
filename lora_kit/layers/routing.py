"""Which adapter each row of a batch uses: a value for each thread and asyncio task, found by all layers of a bank."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Final, NoReturn, TypeGuard
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from lora_kit.errors import RoutingError
from lora_kit.layers.row_gather import GatherBuffer, RowCache

BASE_SLOT: Final = 0
"""The slot that means "no adapter"."""

Index = dict[torch.device, Tensor]
"""The slots of a route as int64, by device: (1,) where all rows use one, else (rows,)."""


class Route:
    """Which slot each row of a batch uses. It never changes; contexts and threads may share it.

    A slot keeps its weights while there is a `Route` that names it.

    Attributes:
        slots: the slot of every row, or one slot per row where they differ.
        mixed: whether rows differ. Compiled code reads this and the index tensors only, so that a swap changes no
            guard.
        slot: the slot of every row; without meaning where rows differ.
        rows: the slot of each row where they differ, else empty.
        row_count: how many rows a batch must have; None: any number.
        index: the slots as tensors.
    """

    def __init__(self, slots: tuple[int, ...], index: Index, *, row_count: int | None = None) -> None:
        self.slots = slots
        self.mixed = len(slots) > 1
        self.slot = BASE_SLOT if self.mixed else slots[0]
        self.rows = slots if self.mixed else ()
        self.row_count = row_count
        self.index = index


class _Workspace:
    """What the layers prepared in one thread, for the rows that it computed last.

    Threads that compute at once may share a route, so this belongs to the thread and not to the route.

    Attributes:
        rows: of the last route in which they differ.
        version: of the weights that the cache was made from.
        cache: what layers prepared.
        buffer: memory for LoRA weights that one layer gathers for one forward.
        layer_buffers: memory for those that a layer gathers for many forwards.
    """

    def __init__(self) -> None:
        self.rows: tuple[int, ...] = ()
        self.version = 0
        self.cache = RowCache()
        self.buffer = GatherBuffer()
        self.layer_buffers: dict[nn.Module, GatherBuffer] = {}


class _ThreadState(threading.local):
    """What a thread has of its own. A thread that reads it first begins with the default route.

    Attributes:
        route: what compiled code reads, because torch.compile cannot trace context variables.
        batch: how many rows the model was last given, in a forward with the route `batch_of`; 0: not known.
        batch_of: that route; weak, so that it keeps no slot from being given away.
        workspace: of the thread.
    """

    def __init__(self, routing: Routing) -> None:
        self.route = routing.default
        self.batch = 0
        self.batch_of: ReferenceType[Route] = ref(routing.default)
        self.workspace = _Workspace()


class Routing:
    """The route that each thread and asyncio task uses now; one object shared by all layers of a bank.

    A context (a thread, or an asyncio task) that has no route takes the default when it first reads, and keeps it.
    Copies and pickles are of what the caller uses now, and share nothing with the original.

    Args:
        slots: of the default route.
        devices: that layers compute on.

    Attributes:
        default: the route that new contexts begin with.
        module_lock: held while the weights of a module of the base are others for a call of it as a black box, and
            while the base's weights are read besides.
    """

    def __init__(self, slots: Sequence[int] = (BASE_SLOT,), devices: Sequence[torch.device] = ()) -> None:
        self._devices = list(devices)
        self._slot_index: dict[int, Index] = {BASE_SLOT: {}}
        self._captured: dict[tuple[torch.device, int], Tensor] = {}
        self._live_routes: set[ReferenceType[Route]] = set()
        self._version = 0
        self._current: ContextVar[Route | None] = ContextVar("route", default=None)
        self.default = self.make_route(slots)
        self._thread = _ThreadState(self)
        self.module_lock = threading.RLock()
        _ROUTINGS.add(ref(self, _ROUTINGS.discard))

    def __reduce__(self) -> tuple[type[Routing], tuple[tuple[int, ...], list[torch.device]]]:
        return Routing, (self.peek_route().slots, self._devices)

    # The route in use

    def get_route(self) -> Route:
        """Return the caller's route. A forward of a layer reads it once, and works with what it read."""
        if torch.compiler.is_dynamo_compiling():
            return self._thread.route
        return self._current.get() or self._begin()

    def peek_route(self) -> Route:
        """Return the caller's route; the default for a context that has none, which does not keep it."""
        return self._current.get() or self.default

    def _begin(self) -> Route:
        route = self.default
        self._current.set(route)
        self._thread.route = route
        return route

    def set_route(self, route: Route | None) -> None:
        """Let the caller's context use a route from now on; with None it has none, as before its first forward.

        Captured CUDA graphs read tensors that are written in place here, so they follow whichever context came last.
        """
        self._assign(route)
        for device in self._devices:
            if device.type == "cuda":
                self._write_captured(device, route or self.default)

    def _assign(self, route: Route | None) -> None:
        # A thread that has no route yet keeps no slot from being given away.
        self._thread.route = route or Route(self.default.slots, self.default.index)
        if not torch.compiler.is_dynamo_compiling():
            self._current.set(route)

    @contextlib.contextmanager
    def use_route(self, route: Route) -> Iterator[None]:
        """Let the caller use a route within a block. A context that had none has none again."""
        before = self._thread.route if torch.compiler.is_dynamo_compiling() else self._current.get()
        self._assign(route)
        try:
            yield
        finally:
            self._assign(before)

    def make_slot_route(self, slot: int) -> Route:
        """Return a route to one slot of the caller's, for a part of one layer's forward."""
        return Route((slot,), self._slot_index.get(slot, {}))

    def make_route(self, slots: Sequence[int], *, row_count: int | None = None) -> Route:
        """Return a route in which row i of a batch uses slots[i], or every row the only slot."""
        slots = tuple(slots)
        if len(set(slots)) == 1:
            slots = slots[:1]
            index = self._slot_index.get(slots[0], {})
        else:
            index = {}
        for device in self._devices:
            _add_index(index, slots, device)
        route = Route(slots, index, row_count=row_count)
        self._live_routes.add(ref(route, self._live_routes.discard))
        return route

    def find_live_slots(self) -> set[int]:
        """Return the slots of every route that a context, a forward or a recomputation still uses."""
        routes = [reference() for reference in self._live_routes.copy()]  # a copy, since other threads make routes
        return {slot for route in routes if route is not None for slot in route.slots}

    # Index tensors

    def prepare(self, device: torch.device) -> None:
        """Make index tensors on a device before a forward needs them: compiled code may not create them."""
        if device in self._devices:
            return
        self._devices.append(device)
        for slot, index in self._slot_index.items():
            _add_index(index, (slot,), device)
        for route in (self.default, self.peek_route(), self._thread.route):
            _add_index(route.index, route.slots, device)
        if device.type == "cuda":
            self._write_captured(device, self.peek_route())

    def add_slot(self, slot: int) -> None:
        """Make the index tensors of a slot, so that its use makes none."""
        self._slot_index[slot] = {}
        for device in self._devices:
            _add_index(self._slot_index[slot], (slot,), device)

    def get_index(self, route: Route, x: Tensor) -> Tensor:
        """Return the slots of a route as int64 on the device of x: (1,) while all rows use one, else (rows,).

        Raises:
            RoutingError: as `check_batch`.
        """
        if x.device not in route.index:
            _add_index(route.index, route.slots, x.device)
        index = route.index[x.device]
        if is_captured(x.device):
            index = self._captured[x.device, len(index)]
        if route.mixed:
            self._check_rows(route, x, index.shape[0])
        return index

    def begin_forward(self, route: Route, batch: int) -> None:
        """Remember how many rows the model is given in a forward of this thread; 0 where that is not known."""
        self._thread.batch, self._thread.batch_of = batch, ref(route)

    def check_batch(self, route: Route, x: Tensor) -> None:
        """Check that the batch x (n, ...) of a layer can be split evenly between the rows of a route.

        Raises:
            RoutingError: it cannot, or the rows are not its first axis (XLNet, Longformer and FSMT put time there).
        """
        if route.mixed:
            self._check_rows(route, x, len(route.rows))

    def _check_rows(self, route: Route, x: Tensor, rows: int) -> None:
        if x.shape[0] % rows:
            _raise_mismatch(x, rows)
        if torch.compiler.is_compiling():
            return
        # Flattened tokens are (n · tokens, features), windows (n · windows, tokens, features).
        batch = self._thread.batch if self._thread.batch_of() is route else 0
        axes = x.ndim if x.is_floating_point() else x.ndim + 1
        if batch and axes > 2 and x.shape[0] != batch and x.shape[1] == batch:
            raise RoutingError(
                f"a layer was given {tuple(x.shape)} for a batch of {batch}: its first axis is not that of the rows",
                hint="use() one adapter at a time",
            )

    def _write_captured(self, device: torch.device, route: Route) -> None:
        _add_index(route.index, route.slots, device)
        index, key = route.index[device], (device, len(route.slots))
        if key in self._captured:
            self._captured[key].copy_(index)
        else:
            with torch.inference_mode(False):
                self._captured[key] = index.clone()

    # What layers prepare

    def get_row_cache(self, route: Route) -> RowCache:
        """Return what the layers prepared for a route in this thread; empty after other rows or other weights."""
        work = self._thread.workspace
        if work.version != self._version:
            work.version, work.cache, work.rows = self._version, RowCache(), ()
        if route.mixed and route.rows != work.rows:
            work.cache.clear_rows()
            work.rows = route.rows
        return work.cache

    def get_buffer(self, layer: nn.Module | None = None) -> GatherBuffer:
        """Return this thread's memory for what a layer keeps for many forwards; without a layer: for one forward."""
        work = self._thread.workspace
        return work.buffer if layer is None else work.layer_buffers.setdefault(layer, GatherBuffer())

    def discard_caches(self) -> None:
        """Let every thread prepare everything anew, because weights change."""
        self._version += 1


_ROUTINGS: Final[set[ReferenceType[Routing]]] = set()


def list_routings() -> list[Routing]:
    """Return the routing of every bank there is."""
    return [routing for reference in _ROUTINGS.copy() if (routing := reference()) is not None]


def is_captured(device: torch.device) -> bool:
    """Return whether work on a device is captured into a CUDA graph now."""
    if torch.compiler.is_compiling() or device.type != "cuda":
        return False
    return torch.cuda.is_current_stream_capturing()


def _add_index(index: Index, slots: tuple[int, ...], device: torch.device) -> None:
    """Add the slots as a tensor on a device, unless they are there."""
    if device not in index:
        with torch.inference_mode(False):  # memory made in inference mode could not be used in training
            uniform = len(slots) == 1
            index[device] = torch.full((1,), slots[0], device=device) if uniform else torch.tensor(slots, device=device)


def forward_each_slot(
    module: str,
    slots: Sequence[int],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    forward: Callable[[int, tuple[Tensor, ...]], object],
) -> object:
    """Compute the rows of each slot by themselves, and return the outputs in the order of the batch.

    Args:
        module: name of the module's class, for the message.
        slots: of each of R rows.
        args: tensors (n, ...), where n is a multiple of R. kwargs: must be empty.
        forward: from a slot and its part of args, to a tensor or a tuple of tensors with as many entries.

    Raises:
        RoutingError: the module was called with something other than such tensors, or n is not a multiple of R.
    """
    if kwargs or not _is_batch(args):
        raise RoutingError(
            f"a {module} that takes more than tensors of tokens cannot serve rows of different adapters",
            hint="use() one adapter at a time",
        )
    if args[0].shape[0] % len(slots):
        _raise_mismatch(args[0], len(slots))
    slot_of = torch.tensor(slots).repeat_interleave(args[0].shape[0] // len(slots))
    parts, order = list[object](), list[Tensor]()
    for slot in sorted(set(slots)):
        indices = (slot_of == slot).nonzero().squeeze(1)
        parts.append(forward(slot, tuple(x.index_select(0, indices.to(x.device)) for x in args)))
        order.append(indices)
    return _join_outputs(parts, torch.cat(order).argsort())


def _raise_mismatch(x: Tensor, rows: int) -> NoReturn:
    raise RoutingError(
        f"{rows} rows were routed, but a layer was given a batch of {x.shape[0]}",
        hint="name one adapter per row of the batch",
    )


def _is_batch(args: tuple[object, ...]) -> TypeGuard[tuple[Tensor, ...]]:
    """Return whether these are tensors with the same number of entries."""
    tensors = [x for x in args if isinstance(x, Tensor) and x.ndim]
    return bool(args) and len(tensors) == len(args) and len({x.shape[0] for x in tensors}) == 1


def _join_outputs(parts: Sequence[object], order: Tensor) -> object:
    """Return the outputs of parts of a batch in the order of the whole: a tensor, or a tuple of tensors."""
    if isinstance(parts[0], tuple):
        return tuple(_join_outputs(each, order) for each in zip(*parts, strict=True))
    joined = torch.cat([part for part in parts if isinstance(part, Tensor)])
    return joined.index_select(0, order.to(joined.device))
