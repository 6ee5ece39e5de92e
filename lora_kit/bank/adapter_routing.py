"""What a bank routes: adapters by name, for everybody, for each row of a batch, or for runs of tokens."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence

from lora_kit.bank.frozen_model import FrozenModel
from lora_kit.bank.lazy import LazyAdapters
from lora_kit.bank.model_layers import WrappedLayers
from lora_kit.bank.routes import ChosenBlock, Lease, RouteChoices, parse_runs
from lora_kit.bank.slots import LoadedAdapter, LoadedAdapters
from lora_kit.errors import BankError, ConfigError
from lora_kit.layers.route import BASE_SLOT
from lora_kit.layers.routing import Routing


class AdapterRouting:
    """The part of an `AdapterBank` that chooses which adapters a computation uses. The bank sets its attributes."""

    _routing: Routing
    _choices: RouteChoices
    _change_lock: threading.RLock
    _layers: WrappedLayers
    _loaded_adapters: LoadedAdapters
    _lazy_adapters: LazyAdapters
    _frozen_model: FrozenModel

    @property
    def active(self) -> str | tuple[str | None, ...] | None:
        """The adapter that the caller uses: a name, one name per row inside `rows`, or None for the base."""
        names, route = self._loaded_adapters.names_by_slot(), self._routing.get_upcoming()
        return tuple(names.get(slot) for slot in route.rows) if route.mixed else names.get(route.slot)

    def use(self, name: str | None) -> None:
        """Route every row to one adapter, or to the base with None: one assignment, however many are loaded.

        An offered adapter without a slot is loaded first, here as in `using` and `rows`; if that fails, everything is
        as it was.

        Raises:
            UnknownAdapterError: no adapter of that name. For an offered one also what `load` raises.
        """
        with self._change_lock:
            if name is not None and name not in self._loaded_adapters:
                self._load_offered([name], keep=())
            self._choices.use(BASE_SLOT if name is None else self._loaded_adapters.use_slot_of(name))

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Do as `use` within a block.

        Raises:
            UnknownAdapterError: as `use`.
        """
        with self._route_rows([name], row_count=None):
            yield

    @contextlib.contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Route row i of the batch to the adapter names[i], or to the base with None, within a block.

        Beams and several returned sequences belong to the row they come from.

        Raises:
            UnknownAdapterError: as `use`.
            ConfigError: names is not a list with at least one name.
            RoutingError: in the forward: the batch cannot be split evenly between the rows.

        Example:
            with bank.rows(["sql", None]):
                model.generate(**tokenizer(["all names:"] * 2, return_tensors="pt"), max_new_tokens=2)
        """
        names = list(names) if isinstance(names, Iterable) and not isinstance(names, str) else []
        if not names:
            raise ConfigError("a list with one name (or None) per row was expected")
        with self._route_rows(names, row_count=len(names)):
            yield

    @contextlib.contextmanager
    def runs(self, runs: Sequence[tuple[str | Lease | None, int]]) -> Iterator[None]:
        """Route consecutive tokens of a packed forward, (1, T), within a block: a name, a lease or None, and how many.

        A layer may be given the last token of each run alone, as a head is with `logits_to_keep`.

        Raises:
            UnknownAdapterError: as `use`.
            BankError: a lease was released, or is another bank's.
            ConfigError: runs is not a list of names with numbers of tokens.
            RoutingError: in the forward: it has another number of tokens, or a layer cannot tell tokens apart; see
                `reason_no_runs`.

        Example:
            with bank.runs([("sql", 2), (None, 1)]):
                model(input_ids=torch.tensor([[5, 6, 7]]), position_ids=torch.tensor([[0, 1, 0]]))
        """
        owners, counts = parse_runs(runs)
        with self._change_lock:
            slots = iter(self._get_slots([owner for owner in owners if not isinstance(owner, Lease)]))
            each = [owner.get_slot(self._routing) if isinstance(owner, Lease) else next(slots) for owner in owners]
            block = self._choices.enter_runs(list(zip(each, counts, strict=True)))
        with block:
            yield

    def reason_no_runs(self, name: str) -> str | None:
        """Return why an adapter cannot be in a packed forward beside others; None where it can.

        Raises:
            UnknownAdapterError: no adapter of that name.
        """
        layers = self._get_loaded(name).layers
        reasons = ((path, self._layers[path].reason_no_runs()) for path in layers)
        return next((f"{path}: {reason}" for path, reason in reasons if reason is not None), None)

    def _route_rows(self, names: Sequence[str | None], *, row_count: int | None) -> ChosenBlock:
        with self._change_lock:
            return self._choices.enter_block(self._get_slots(names), row_count=row_count)

    def lease(self, name: str) -> Lease:
        """Keep an adapter in its slot until the lease is released: `unload` then frees the name only.

        Raises:
            UnknownAdapterError: no adapter of that name.
            BankError: it is trainable, so it has no digest that stays. For an offered one also what `load` raises.

        Example:
            with bank.lease("sql") as lease:
                print(lease.slot, lease.digest)
        """
        with self._change_lock:
            adapter = self._get_loaded(name).adapter
            if adapter is None:
                raise BankError(
                    f"{name!r} is trainable, so its content changes", hint="lease a snapshot that is loaded"
                )
            slot = self._loaded_adapters.use_slot_of(name)
            return Lease(slot, adapter.digest, self._routing.make_route((slot,)), self._routing)

    # Slots of names

    def _check_name(self, name: object) -> None:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"an adapter's name is a string; {name!r} was given")
        if name in self._loaded_adapters or name in self._lazy_adapters:
            state = "loaded" if name in self._loaded_adapters else "offered"
            raise BankError(f"{name!r} is {state} already", hint="unload it first")

    def _get_loaded(self, name: str) -> LoadedAdapter:
        """Return the loaded adapter of that name, loading it first if it was only offered."""
        if name not in self._loaded_adapters:
            with self._change_lock:
                self._load_offered([name], keep=())
                return self._loaded_adapters[name]
        return self._loaded_adapters[name]

    def _get_slots(self, names: Sequence[str | None]) -> list[int]:
        """Return the slot of each name, and mark it as just used; load offered ones first, all of them or none."""
        absent = [name for name in names if name is not None and name not in self._loaded_adapters]
        if absent:
            self._load_offered(absent, keep=names)
        return [BASE_SLOT if name is None else self._loaded_adapters.use_slot_of(name) for name in names]

    def _load_offered(self, names: Collection[str], *, keep: Collection[str | None]) -> None:
        for name in names:
            if not isinstance(name, str):
                raise ConfigError(f"an adapter's name is a string; {name!r} was given")
        self._lazy_adapters.load(dict.fromkeys(names), keep=keep, slots_in_use=self._routing.find_live_slots())
