"""What a thread or asyncio task computes with next: what it chose, and the blocks and generations that it is inside.

Blocks may end in another order than they began, as those of two generators do, and in another context than they began
in, as that of a generator which another thread closes. So a block removes its own entry, wherever that is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextvars import ContextVar, Token
from inspect import CO_ASYNC_GENERATOR, CO_GENERATOR
from types import CodeType, FrameType
from typing import Final
from weakref import ReferenceType, ref

from lora_kit.layers.route import Route

_LIBRARIES: Final = frozenset({"lora_kit", "torch", "transformers", "contextlib", "functools"})
"""Packages whose functions are not the caller's."""


_FrameKey = tuple[int, CodeType]
"""Which function is running, by its place in memory and its code, which keeps nothing alive."""


_ENTERING: Final = frozenset({"lora_kit", "contextlib", "_pytest", "pytest_asyncio"})
"""Packages that begin a generator as a context manager, or as a fixture."""
_ENTER_METHODS: Final = ("__enter__", "__aenter__")


class RouteBlock:
    """A block of `using` or `rows`, or a generation, for as long as it is open.

    Attributes:
        is_generation: whether it is a generation, which keeps the route that it began with.
        is_closed: whether it was closed in another context than it was opened in.
        frame: of a generation: the function that runs it.
        is_inside_generation: whether it was opened by something that a generation called.
        caller: that function. When it has returned, the block is not around what the generation computes.
        generator: of a block in a generator: its function. While it is paused, the block is not around what its
            consumer computes.
        owner: the function that the block is in, where that is no generator. Not the function itself: that would keep
            alive what it has.
        token: by which its context is known.
    """

    def __init__(self, *, is_generation: bool = False, frame: FrameType | None = None) -> None:
        self.is_generation = is_generation
        self.is_closed = False
        self.frame = frame
        self.caller: FrameType | None = None
        self.is_inside_generation = False
        self.generator: FrameType | None = None
        self.owner: _FrameKey | None = None
        self.token: Token[None] | None = None


class RouteEntry:
    """A route that a context uses.

    Attributes:
        route: as it is used.
        block: to which it belongs; None where `use` set it, or the context began with it.
        is_chosen: whether the context chose it; otherwise it only began with it.
    """

    __slots__ = ("__weakref__", "block", "is_chosen", "route")

    def __init__(self, route: Route, block: RouteBlock | None = None, *, is_chosen: bool = True) -> None:
        self.route = route
        self.block = block
        self.is_chosen = is_chosen


class RouteStack:
    """The routes of each context, the innermost last. A context that is made by another begins with its routes."""

    def __init__(self) -> None:
        self._entries: ContextVar[tuple[RouteEntry, ...]] = ContextVar("entries", default=())
        self._marker: ContextVar[None] = ContextVar("marker", default=None)
        self._live_entries: set[ReferenceType[RouteEntry]] = set()

    def get_route(self) -> Route | None:
        """Return the route that the caller's next forward uses; None where it has none yet."""
        entries = self._entries.get()
        if len(entries) == 1 and entries[0].block is None:  # as nearly always
            return entries[0].route
        entry = self._find_innermost(self._list_entries())
        return None if entry is None else entry.route

    def _find_innermost(self, entries: tuple[RouteEntry, ...]) -> RouteEntry | None:
        """Return the entry of the innermost block around what is computed now."""
        last = next((e for e in entries[::-1] if e.block is None or self._is_in_force(e.block)), None)
        generators = [entry for entry in entries if entry.block is not None and entry.block.generator is not None]
        if last is None or last.block is None or last.block.generator is not None or not generators:
            return last
        # A block of the function that continues a generator is outside those of the generator, also where it is newer.
        running = _list_running()
        inner = running[: running.index(last.block.owner)] if last.block.owner in running else []
        for key in inner:
            own = [entry for entry in generators if entry.block and _key_of(entry.block.generator) == key]
            if own:
                return own[-1]
        return last

    def begin(self, route: Route) -> None:
        """Let a context that has no route begin with one."""
        self._entries.set((self._make_entry(route, None, is_chosen=False), *self._entries.get()))

    def use(self, route: Route) -> None:
        """Put a route in the place of the caller's innermost one: inside a generation, of the one outside it."""
        found = self._entries.get()
        if not found or not (found[1:] or found[0].block):  # as nearly always
            self._entries.set((self._make_entry(route, None),))
            return
        entries = list(self._list_entries())
        for place in range(len(entries) - 1, -1, -1):
            block = entries[place].block
            if block is None or (not block.is_generation and self._is_in_force(block)):
                entries[place] = self._make_entry(route, block)
                break
        else:
            entries.insert(0, self._make_entry(route, None))
        self._entries.set(tuple(entries))

    def open(self, route: Route, block: RouteBlock) -> None:
        """Begin a block with a route."""
        entries = self._list_entries()
        blocks = [entry.block for entry in entries if entry.block and entry.block.is_generation]
        if not block.is_generation and blocks and self._is_in_force(blocks[-1]):
            block.is_inside_generation = True
            block.caller = _find_caller(blocks[-1])
        if not block.is_generation:
            block.generator, block.owner = _find_owner()
        block.token = self._marker.set(None)
        self._entries.set((*entries, self._make_entry(route, block, is_chosen=not block.is_generation)))

    def close(self, block: RouteBlock) -> None:
        """End a block, in whichever context and order."""
        block.is_closed = block.is_closed or not self._is_own(block)
        block.caller = block.frame = block.generator = None
        self._entries.set(tuple(entry for entry in self._entries.get() if entry.block is not block))

    def exchange(self, route: Route) -> tuple[RouteEntry, ...]:
        """Let the caller use a route and nothing else; return what `put_back` takes."""
        entries = self._entries.get()
        self._entries.set((RouteEntry(route, is_chosen=False),))
        return entries

    def put_back(self, entries: tuple[RouteEntry, ...]) -> None:
        """Undo `exchange`."""
        self._entries.set(entries)

    def clear(self) -> None:
        """Forget the caller's routes."""
        self._entries.set(())

    def find_chosen_slots(self, *, by_others: bool = False) -> set[int]:
        """Return the slots that a context chose to use, or returns to after a block.

        Args:
            by_others: only those of other contexts that there are.
        """
        entries = {reference() for reference in self._live_entries.copy()} - {None}
        if by_others:
            entries -= set(self._entries.get())
        chosen = [entry for entry in entries if entry is not None and not (entry.block and entry.block.is_closed)]
        return {slot for entry in chosen for slot in entry.route.slots}

    def _list_entries(self) -> tuple[RouteEntry, ...]:
        """Return the caller's entries, without those of its blocks that another context closed."""
        entries = self._entries.get()
        closed = {entry for entry in entries if entry.block and entry.block.is_closed and self._is_own(entry.block)}
        if closed:
            entries = tuple(entry for entry in entries if entry not in closed)
            self._entries.set(entries)
        return entries

    def _make_entry(self, route: Route, block: RouteBlock | None, *, is_chosen: bool = True) -> RouteEntry:
        entry = RouteEntry(route, block, is_chosen=is_chosen)
        if is_chosen:
            self._live_entries.add(ref(entry, self._live_entries.discard))
        return entry

    def _is_in_force(self, block: RouteBlock) -> bool:
        """Return whether a block of the caller's is around what it computes now."""
        if block.is_generation:  # a context that was made inside it may live longer, or in another thread
            return block.frame is not None and is_running(block.frame)
        if block.generator is not None and not is_running(block.generator) and self._is_own(block):
            return False  # it is paused; a task that was made inside it goes on in a context of its own
        return not block.is_inside_generation or (block.caller is not None and is_running(block.caller))

    def _is_own(self, block: RouteBlock) -> bool:
        """Return whether a block was opened in the caller's context."""
        if block.token is None:
            return False
        try:
            self._marker.reset(block.token)
        except ValueError:  # the token of another context
            return False
        block.token = self._marker.set(None)  # a token can say so once
        return True


def iterate_frames() -> Iterator[FrameType]:
    """Yield the functions that are running in this thread, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def is_running(frame: FrameType) -> bool:
    """Return whether a function is running in this thread, and called the caller, however indirectly."""
    return any(each is frame for each in iterate_frames())


def find_module_call() -> FrameType | None:
    """Return the innermost call of a module that is running in this thread, which called the caller."""
    return next((frame for frame in iterate_frames() if frame.f_code.co_name == "_call_impl"), None)


def _find_caller(generation: RouteBlock) -> FrameType | None:
    """Return the outermost function that a generation calls back now: the first one that is not of a library."""
    inside: list[FrameType] = []
    for frame in iterate_frames():
        if frame is generation.frame:
            break
        inside.append(frame)
    else:
        return None
    names = [frame.f_code.co_name for frame in reversed(inside)]
    begin = names.index("generate") + 1 if "generate" in names else 0
    called = inside[::-1][begin:]
    return next((frame for frame in called if _package_of(frame) not in _LIBRARIES), None)


def _find_owner() -> tuple[FrameType | None, _FrameKey | None]:
    """Return the generator that begins a block now, or the plain function that does.

    A context manager or a fixture that is made of a generator stands for whoever enters it.
    """
    for frame in iterate_frames():
        if _package_of(frame) in _ENTERING or frame.f_code.co_name in _ENTER_METHODS:
            continue
        if not frame.f_code.co_flags & (CO_GENERATOR | CO_ASYNC_GENERATOR):
            return None, _key_of(frame)
        by = frame.f_back
        if by is not None and _package_of(by) not in _ENTERING and by.f_code.co_name not in _ENTER_METHODS:
            return frame, None
    return None, None


def _key_of(frame: FrameType | None) -> _FrameKey | None:
    return None if frame is None else (id(frame), frame.f_code)


def _list_running() -> list[_FrameKey | None]:
    """Return the functions that are running in this thread, the innermost first, and keep none of them alive."""
    return [_key_of(frame) for frame in iterate_frames()]


def _package_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
