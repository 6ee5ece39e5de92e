"""Which routes contexts chose, and which blocks and generations are open."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import FrameType
from typing import NoReturn

from lora_kit.errors import BankError, ConfigError
from lora_kit.layers.compiled_routes import install_compiled_routes
from lora_kit.layers.route import BASE_SLOT, Route
from lora_kit.layers.route_stack import RouteBlock
from lora_kit.layers.routing import Routing


class RouteChoices:
    """The routes that contexts chose themselves, by `use` or in a block. Others they only began with.

    Args:
        routing: what the layers read.
    """

    def __init__(self, routing: Routing) -> None:
        self._routing = routing
        self._open_blocks: set[RouteBlock] = set()

    def __reduce__(self) -> tuple[type[RouteChoices], tuple[Routing]]:
        return RouteChoices, (self._routing,)  # copied with the model: nothing is open in the copy

    @property
    def is_block_open(self) -> bool:
        """Whether any context is inside a block or a generation."""
        return bool(self._open_blocks)

    def find_chosen_slots(self, *, by_others: bool = False) -> set[int]:
        """Return the slots that a context chose to use, or returns to after a block, or will begin with.

        Args:
            by_others: only those of other contexts that there are.
        """
        slots = self._routing.stack.find_chosen_slots(by_others=by_others)
        return slots if by_others else {*slots, *self._routing.default.slots}

    def use(self, slot: int) -> None:
        """Route the caller to one slot, and the contexts that begin later."""
        route = self._routing.make_route((slot,))
        self._routing.default = route
        self._routing.stack.use(route)
        self._apply()

    def enter_block(self, slots: Sequence[int], *, row_count: int | None) -> ChosenBlock:
        """Begin a block in which row i of the caller's batches goes to slots[i]."""
        return self._open(self._routing.make_route(slots, row_count=row_count), RouteBlock())

    def enter_runs(self, runs: Sequence[tuple[int, int]]) -> ChosenBlock:
        """Begin a block in which consecutive tokens of the caller's packed forwards use one slot: (slot, how many)."""
        return self._open(self._routing.make_run_route(runs), RouteBlock())

    def enter_generation(self, frame: FrameType) -> ChosenBlock:
        """Begin a generation, which keeps the caller's route.

        Args:
            frame: of the function that generates.
        """
        return self._open(self._routing.get_upcoming(), RouteBlock(is_generation=True, frame=frame))

    def _open(self, route: Route, block: RouteBlock) -> ChosenBlock:
        self._routing.get_upcoming()  # what is returned to, also where it is what the context begins with
        self._open_blocks.add(block)
        self._routing.stack.open(route, block)
        self._apply()
        return ChosenBlock(self, block, route)

    def leave(self, block: RouteBlock) -> None:
        """End a block. Whatever the caller's innermost block is then is what counts."""
        self._open_blocks.discard(block)
        self._routing.stack.close(block)
        self._apply()

    def leave_slot(self, slot: int) -> None:
        """Route the caller, and the contexts that begin later, to the base where they would use a slot."""
        if slot in self._routing.get_upcoming().slots:
            self.use(BASE_SLOT)
        if slot in self._routing.default.slots:
            self._routing.default = self._routing.make_route((BASE_SLOT,))

    def forget(self) -> None:
        """Route the caller and the contexts that begin later to the base, by nobody's choice."""
        self._routing.default = self._routing.make_route((BASE_SLOT,))
        self._routing.forget()

    def _apply(self) -> None:
        install_compiled_routes()
        self._routing.follow_stack()


class ChosenBlock:
    """An open block of `using` or `rows`, or a generation, to be left once. It began when it was made."""

    def __init__(self, choices: RouteChoices, block: RouteBlock, route: Route) -> None:
        self._choices = choices
        self._block = block
        self._route: Route | None = route

    def __enter__(self) -> Route:
        route, self._route = self._route, None  # an exception that passes here keeps the block for long
        assert route is not None
        return route

    def __exit__(self, *exception: object) -> None:
        self._choices.leave(self._block)


def parse_runs(runs: object) -> tuple[tuple[str | Lease | None, ...], tuple[int, ...]]:
    """Return who computes each run of a packed forward, and how many tokens it has.

    Raises:
        ConfigError: this is not a list of names, leases or None with numbers of tokens.
    """
    listed = list(runs) if isinstance(runs, Iterable) and not isinstance(runs, (str, bytes, Mapping)) else []
    valid = all(
        isinstance(run, (tuple, list))
        and len(run) == 2
        and (run[0] is None or isinstance(run[0], (str, Lease)))
        and isinstance(run[1], int)
        and not isinstance(run[1], bool)
        and run[1] > 0
        for run in listed
    )
    if not listed or not valid:
        raise ConfigError("a list of (name, lease or None; tokens) was expected", hint='[("sql", 17), (None, 1)]')
    owners, counts = zip(*listed, strict=True)
    return owners, counts


class Lease:
    """A slot that keeps its adapter until `release`, whatever happens to the name. Made by `bank.lease`.

    A lease is a context manager too. One that is no longer reachable is released. It is not copied or pickled: the slot
    is counted once.

    Attributes:
        slot: of the adapter, in every layer.
        digest: of the adapter.
    """

    def __init__(self, slot: int, digest: str, route: Route, routing: Routing) -> None:
        self.slot = slot
        self.digest = digest
        self._route: Route | None = route
        self._routing = routing

    def release(self) -> None:
        """Let the slot go. A second call does nothing."""
        self._route = None

    def get_slot(self, routing: Routing) -> int:
        """Return the slot, for the bank that this routing belongs to.

        Raises:
            BankError: the lease was released, or is another bank's.
        """
        if self._route is None or self._routing is not routing:
            problem = "was released" if self._route is None else "is of another bank"
            raise BankError(f"this lease {problem}", hint="take one: bank.lease(name)")
        return self.slot

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise BankError("a lease is not copied or pickled", hint="take another one: bank.lease(name)")
