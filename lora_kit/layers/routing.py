"""Which adapter each row of a batch uses: a value for each thread and asyncio task, found by all layers of a bank."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Final
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from lora_kit.errors import RoutingError
from lora_kit.layers.forward_scope import ForwardScope
from lora_kit.layers.route import BASE_SLOT, Index, Route, add_index
from lora_kit.layers.route_stack import RouteStack
from lora_kit.layers.row_gather import GatherBuffer, RowCache, Workspace
from lora_kit.layers.token_runs import RunRoute


class _ThreadState(threading.local):
    """What a thread has of its own.

    Attributes:
        route: what compiled code reads, because torch.compile cannot trace context variables; see `compiled_routes`.
        is_repeating: whether a part of a forward is computed again, with a route that is known.
        workspace: of the thread.
    """

    def __init__(self, routing: Routing) -> None:
        self.route = routing.peek_route()
        self.is_repeating = False
        self.workspace = Workspace()


class Routing:
    """The route that each thread and asyncio task uses now; one object shared by all layers of a bank.

    A context (a thread, or an asyncio task) that has no route takes the default when it first reads, and keeps it.
    While a forward of the model runs, its layers use the route that it began with, whatever is chosen meanwhile. Copies
    and pickles are of what the caller uses now, and share nothing with the original.

    Args:
        slots: of the default route.
        devices: that layers compute on.
        row_count: of the default route.

    Attributes:
        default: the route that new contexts begin with.
        stack: what forwards that begin now use.
        module_lock: held while the weights of a module of the base are others for a call of it as a black box, and
            while the base's weights are read besides.
    """

    def __init__(
        self,
        slots: Sequence[int] = (BASE_SLOT,),
        devices: Sequence[torch.device] = (),
        row_count: int | None = None,
    ) -> None:
        self._devices = list(devices)
        self._slot_index: dict[int, Index] = {BASE_SLOT: {}}
        self._captured: dict[tuple[torch.device, int], Tensor] = {}
        self._live_routes: set[ReferenceType[Route]] = set()
        self._version = 0
        self._trained_slots: set[tuple[int, ...]] = set()
        self._has_recomputed = False
        self._current: ContextVar[Route | None] = ContextVar("route", default=None)
        self._forward: ContextVar[ForwardScope | None] = ContextVar("forward", default=None)
        self.stack = RouteStack()
        self.default = self.make_route(slots, row_count=row_count)
        self._thread = _ThreadState(self)
        self.module_lock = threading.RLock()
        _ROUTINGS.add(ref(self, _ROUTINGS.discard))

    def __reduce__(self) -> tuple[type[Routing], tuple[object, ...]]:
        route = self.peek_route()
        return Routing, (route.slots, self._devices, route.row_count)

    # The route in use

    def get_route(self) -> Route:
        """Return the caller's route. A forward of a layer reads it once, and works with what it read."""
        if torch.compiler.is_dynamo_compiling():
            return self._thread.route
        route = self._current.get() or self._begin()
        if is_in_backward():
            self._check_recomputed(route)
        return route

    def _check_recomputed(self, route: Route) -> None:
        """Check that layers called by a backward use the route of its forward, where torch does not say which that was.

        Checkpoints of torch bring their route. Functions of others that compute a part of the model again, as those of
        Reformer do, do not.

        Raises:
            RoutingError: the forwards since the last such backward used another route, or several.
        """
        if self._thread.is_repeating or self.get_forward() is not None:
            return
        self._has_recomputed = True
        if self._trained_slots != {route.slots}:
            raise RoutingError(
                "a part of the model is computed again in a backward, and it is not known with which adapter",
                hint="run each backward while the adapter of its forward is chosen, and before the next forward",
            )

    def peek_route(self) -> Route:
        """Return the caller's route; the default for a context that has none, which does not keep it."""
        return self._current.get() or self.default

    def get_upcoming(self) -> Route:
        """Return the route of a forward that begins now. A context that has none takes the default, and keeps it."""
        route = self.stack.get_route()
        if route is None:
            route = self.default
            self.stack.begin(route)
        return route

    def _begin(self) -> Route:
        route = self.get_upcoming()
        self._current.set(route)
        self._thread.route = route
        return route

    def follow_stack(self) -> None:
        """Let the caller's context use what its stack says now; a forward that is running keeps what it has.

        Captured CUDA graphs read tensors that are written in place here, so they follow whichever context came last.
        """
        forward = self._forward.get()
        if forward is not None:
            if forward.is_running:
                return
            self._forward.set(None)  # it was interrupted, or is of the context that made this one
        route = self.stack.get_route()
        self._assign(route)
        for device in self._devices:
            if device.type == "cuda" and not (route and route.runs):  # runs are not captured
                self._write_captured(device, route or self.default)

    def forget(self) -> None:
        """Let the caller have no route, as before its first forward."""
        self.stack.clear()
        self.follow_stack()

    def _assign(self, route: Route | None) -> None:
        # A thread that has no route yet keeps no slot from being given away.
        self._thread.route = route or Route(self.default.slots, self.default.index)
        if not torch.compiler.is_dynamo_compiling():
            self._current.set(route)

    @contextlib.contextmanager
    def use_route(self, route: Route) -> Iterator[None]:
        """Let the caller's layers use a route within a block, as a part of one forward."""
        before = self._thread.route if torch.compiler.is_dynamo_compiling() else self._current.get()
        self._assign(route)
        try:
            yield
        finally:
            self._assign(before)

    def refresh_thread(self) -> None:
        """Let compiled code that the caller enters now use the caller's route."""
        self._thread.route = self.get_upcoming() if self.get_forward() is None else self.get_route()

    # Forwards

    def get_forward(self) -> ForwardScope | None:
        """Return the forward of the model that is running."""
        forward = self._forward.get()
        return forward if forward is not None and forward.is_running else None

    def begin_forward(self, forward: ForwardScope) -> None:
        """Let the layers use the route of a forward until `end_forward`."""
        self._forward.set(forward)
        self._assign(forward.route)

    def end_forward(self, forward: ForwardScope) -> None:
        """Return to what was before a forward, or to what was chosen in it."""
        forward.finish()
        if torch.is_grad_enabled():
            if self._has_recomputed:
                self._has_recomputed, self._trained_slots = False, set()
            self._trained_slots.add(forward.route.slots)
        outer, forward.outer = forward.outer, None
        self._forward.set(outer)
        self._assign(outer.route if outer else self.stack.get_route())

    def save_forward(self) -> tuple[Route, ForwardScope | None]:
        """Return what `repeat_forward` takes to compute a part of the caller's forward again."""
        return self.peek_route(), self._forward.get()

    @contextlib.contextmanager
    def repeat_forward(self, route: Route, forward: ForwardScope | None) -> Iterator[None]:
        """Let whatever the caller computes within a block be a part of a forward that is over."""
        current, running = self._current.get(), self._forward.get()
        entries = self.stack.exchange(route)
        self._forward.set(forward)
        self._assign(route)
        was_repeating, self._thread.is_repeating = self._thread.is_repeating, True
        try:
            yield
        finally:
            self._thread.is_repeating = was_repeating
            self.stack.put_back(entries)
            self._forward.set(running)
            self._assign(current)

    # Routes

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
            add_index(index, slots, device)
        route = Route(slots, index, row_count=row_count)
        self._live_routes.add(ref(route, self._live_routes.discard))
        return route

    def make_run_route(self, runs: Sequence[tuple[int, int]]) -> Route:
        """Return a route in which consecutive tokens use one slot: (slot, how many) of each run, in their order."""
        if len({slot for slot, _ in runs}) == 1:
            return self.make_route([runs[0][0]])
        route = RunRoute(runs, self.make_route)
        self._live_routes.add(ref(route, self._live_routes.discard))
        return route

    def find_live_slots(self) -> set[int]:
        """Return the slots of every route that a context, a forward or a recomputation still uses."""
        routes = [reference() for reference in self._live_routes.copy()]  # a copy, since other threads make routes
        return {slot for route in routes if route is not None for slot in route.slots}

    def check_rows(self, route: Route, x: Tensor, layer: nn.Module) -> None:
        """Check that an input x (n, ...) of a layer can be split into the rows of a route, in their order.

        Raises:
            RoutingError: it cannot, or nothing shows that it can.
        """
        if not route.mixed:
            return
        if torch.compiler.is_compiling():  # which knows nothing of the forward that it belongs to
            # Not `route.rows`, a guard on which would fail for every other route.
            rows = route.add_index(x.device).shape[0]
            reason = f"was given a batch of {x.shape[0]}" if x.shape[0] % rows else None
        else:
            rows = len(route.rows)
            forward = self._forward.get()
            if forward is not None and forward.batch is not None:
                reason = forward.reason_not_by_row(x, layer)
            else:
                reason = None if x.shape[0] == rows else f"was given a batch of {x.shape[0]}"
        if reason is not None:
            raise RoutingError(
                f"{rows} rows were routed, but a layer {reason}",
                hint="name one adapter per row of the batch of the model, or use() one adapter at a time",
            )

    # Index tensors

    def prepare(self, device: torch.device) -> None:
        """Make index tensors on a device before a forward needs them: compiled code may not create them."""
        if device in self._devices:
            return
        self._devices.append(device)
        for slot, index in self._slot_index.items():
            add_index(index, (slot,), device)
        for route in (self.default, self.peek_route(), self._thread.route):
            route.add_index(device)
        if device.type == "cuda":
            self._write_captured(device, self.peek_route())

    def add_slot(self, slot: int) -> None:
        """Make the index tensors of a slot, so that its use makes none."""
        self._slot_index[slot] = {}
        for device in self._devices:
            add_index(self._slot_index[slot], (slot,), device)

    def get_index(self, route: Route, x: Tensor) -> Tensor:
        """Return the slots of a route as int64 on the device of x: (1,) while all rows use one, else (rows,)."""
        index = route.add_index(x.device)
        if is_captured(x.device):
            index = self._captured[x.device, len(index)]
        return index

    def _write_captured(self, device: torch.device, route: Route) -> None:
        index, key = route.add_index(device), (device, len(route.slots))
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
        if route.cache_key and route.cache_key != work.rows:
            work.cache.clear_rows()
            work.rows = route.cache_key
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


def is_in_backward() -> bool:
    """Return whether a backward is running that called the caller."""
    return torch._C._current_graph_task_id() != -1


def is_captured(device: torch.device) -> bool:
    """Return whether work on a device is captured into a CUDA graph now."""
    if torch.compiler.is_compiling() or device.type != "cuda":
        return False
    return torch.cuda.is_current_stream_capturing()
