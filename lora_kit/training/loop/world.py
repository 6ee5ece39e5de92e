"""The processes of one training: which of them writes, what they decide together, and the sum of their gradients.

Every process runs the same training on rows of its own. A launcher such as torchrun starts them and gives each its RANK
and the WORLD_SIZE. Nothing else in the package knows torch.distributed: transformers and accelerate see one process
that has all rows of a batch, of which each process then computes its own.

What is not a gradient goes through the launcher's key-value store, where a process that waits sees that another one
has failed. A process that fails leaves its error there, and all raise it.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Final, TypeVar

import torch.distributed as dist
from torch import Tensor, nn

from lora_kit.errors import REPORTED_ELSEWHERE, LoraKitError, StorageError
from lora_kit.io.text import shorten
from lora_kit.models.silence import use_log_level
from lora_kit.training.loop.flat_sum import sum_gradients
from lora_kit.training.loop.heartbeat import Heartbeat
from lora_kit.training.loop.launcher import (
    choose_backend,
    choose_device,
    count_by_machine,
    hide_launcher,
    read_local_rank,
    read_world_size,
)
from lora_kit.training.loop.store_exchange import (
    FAILURE,
    PeerError,
    StoreExchange,
    find_address,
    translate_loss,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

_TIMEOUT: Final = timedelta(hours=1)
"""Of a sum of gradients: a process may wait for one that halves its rows; what was lost is found otherwise."""
_JOIN_TIMEOUT: Final = timedelta(minutes=10)
"""In which all processes must have come."""
_PATIENCE: Final = 3.0
"""Seconds in which the first process reports a failure; then another one does."""
_LEAVE_SECONDS: Final = 30.0
"""Seconds for which the first process, which may have the store, waits for the others to have read it."""
_SPEAKER: Final = "speaker"
_LEFT: Final = "left"


class World:
    """The processes of a training, as one of them sees them.

    All processes must call the methods below in the same order.

    Args:
        rank: number of this process, from 0.
        size: number of processes.
        exchange: passes values between them; None for a process alone.
        all_reduce: replaces a tensor by its sum over all processes, in place.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        processes_by_machine: how many run on each machine; a launcher that was started twice on one is two.
        describe_resume: returns what to do after a process was lost.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        exchange: StoreExchange | None = None,
        all_reduce: Callable[[Tensor], object] = dist.all_reduce,
    ) -> None:
        self.rank, self.size = rank, size
        self.processes_by_machine: tuple[int, ...] = (size,)
        self.describe_resume: Callable[[], str] = lambda: ""
        self._maybe_exchange, self._all_reduce = exchange, all_reduce
        self._turn = 0
        self._has_lost = False

    @property
    def is_first(self) -> bool:
        """Whether this is the process that locks, decides, writes and reports."""
        return self.rank == 0

    @property
    def _exchange(self) -> StoreExchange:
        assert self._maybe_exchange is not None
        return self._maybe_exchange

    # Values

    def ask_first(self, ask: Callable[[], T]) -> T:
        """Return in every process what `ask` returns in the first one."""
        if self.size == 1:
            return ask()
        self._turn += 1
        if self.is_first:
            value = ask()
            self._exchange.put(f"{self._turn}", value)
            return value
        answer: T = self._exchange.take(f"{self._turn}")
        return answer

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in their order."""
        if self.size == 1:
            return [value]
        self._turn += 1
        before = self._exchange.take_own_keys()
        self._exchange.put(f"{self._turn}/{self.rank}", value)
        values: list[T] = [self._exchange.take(f"{self._turn}/{rank}") for rank in range(self.size)]
        self._exchange.delete(before)  # every process has come here, so it has taken what was given before
        return values

    @contextlib.contextmanager
    def on_first(self, context: contextlib.AbstractContextManager[object]) -> Iterator[None]:
        """Enter a context in the first process; the others wait until it is entered, and for nothing at its end."""
        with context if self.is_first else contextlib.nullcontext():
            self.meet()
            yield

    def exchange_addresses(self) -> None:
        """Find out where the other processes are, and so whether they are still there."""
        addresses, local_ranks = zip(*self.gather((find_address(), read_local_rank())), strict=True)
        self._exchange.addresses = [address for rank, address in enumerate(addresses) if rank != self.rank]
        self.processes_by_machine = count_by_machine(local_ranks)

    def meet(self) -> None:
        """Wait until every process is here.

        Raises:
            PeerError: one failed, or was lost.
        """
        self.gather(None)

    def leave(self) -> None:
        """Say that all was read, or as the first process wait until the others say so: the store may end with it.

        For a process that was lost nothing waits.
        """
        end = time.monotonic() + _LEAVE_SECONDS
        with contextlib.suppress(PeerError, RuntimeError):
            if not self.is_first:
                self._exchange.put(f"{_LEFT}/{self.rank}", None)
            for rank in range(1, self.size) if self.is_first and not self._has_lost else ():
                self._exchange.wait(f"{_LEFT}/{rank}", seconds=end - time.monotonic())

    # Tensors

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        with translate_loss():
            self._all_reduce(total)
        return total

    def sum_gradients(self, parameters: Sequence[nn.Parameter], notes: Sequence[Tensor]) -> list[Tensor]:
        """Replace every gradient by its sum over all processes; a gradient that none has stays None.

        Args:
            parameters: the same in all processes.
            notes: numbers to be summed as well: fp32 ().

        Returns:
            The sums of the notes: fp32 () each.
        """
        if self.size == 1:
            return list(notes)
        with translate_loss():
            return sum_gradients(parameters, notes, all_reduce=self._all_reduce)

    # Failures

    def agree_on(self, error: BaseException) -> BaseException:
        """Return the error that all processes raise: the first that one of them has met, or that one was lost.

        The one process that reports it gets it without the attribute `REPORTED_ELSEWHERE`.
        """
        agreed = error
        speaks = True
        try:
            agreed = self._find_failure(error)
            speaks = self._claims_to_speak()
        except (PeerError, RuntimeError):  # the store is gone with the process or the machine that had it
            agreed = self._build_loss_error() if isinstance(error, PeerError) else error
        if not speaks:
            setattr(agreed, REPORTED_ELSEWHERE, True)
        return agreed

    def _find_failure(self, error: BaseException) -> BaseException:
        exchange = self._exchange
        # Where one was killed, the launcher ends the others, and what they wait for fails.
        is_consequence = not isinstance(error, LoraKitError) and exchange.has_gone()
        is_loss = isinstance(error, PeerError) or is_consequence
        if not is_loss:
            rank, first = exchange.claim(FAILURE, (self.rank, _make_portable(error)))
            return error if rank == self.rank else first
        if not exchange.wait(FAILURE, seconds=_PATIENCE):
            return self._build_loss_error()
        return exchange.claim(FAILURE, None)[1]

    def _claims_to_speak(self) -> bool:
        """Return whether this process is the one that reports the failure: the first, unless it is slow or lost."""
        if not self.is_first:
            self._exchange.wait(_SPEAKER, seconds=_PATIENCE)
        return bool(self._exchange.claim(_SPEAKER, self.rank) == self.rank)

    def end_process(self, lost: int | None) -> None:
        """Report that a process was lost, and end this one, which may be waiting for it without an end."""
        answer: list[BaseException] = []
        ask = threading.Thread(target=lambda: answer.append(self.agree_on(PeerError())), daemon=True)
        ask.start()
        ask.join(3 * _PATIENCE)  # a store that is cut off does not answer
        error = answer[0] if answer else self._build_loss_error()
        if not getattr(error, REPORTED_ELSEWHERE, False):
            record = logger.makeRecord(logger.name, logging.ERROR, __file__, 0, str(error), (), None)
            logger.handle(record)  # only the first process logs, and it may be the one that is lost
        os._exit(getattr(error, "exit_code", StorageError.exit_code))

    def _build_loss_error(self) -> StorageError:
        self._has_lost = True
        what = f"one of the {self.size} processes was lost: it was killed, or its machine cannot be reached"
        return StorageError(what, hint=self.describe_resume())


ALONE: Final = World()
"""A training of one process."""
_current: World | None = None
_joined = 0


@contextlib.contextmanager
def join_world() -> Iterator[World]:
    """Yield the processes that a launcher has started with this one; `ALONE` without a launcher.

    An error that one process raises in the block is raised in all of them. All but the first log nothing.

    Raises:
        ConfigError: the environment is not that of a launcher.
        StorageError: a process was lost.
    """
    global _current
    if _current is not None or read_world_size() == 1:
        world = _current or ALONE
        with hide_launcher(), _silence_others(world):
            yield world
        return
    world, heartbeat = _connect()
    _current = world
    try:
        world.exchange_addresses()
        with hide_launcher(), _silence_others(world):
            yield world
            world.meet()
            world.leave()
    except BaseException as error:
        agreed = world.agree_on(error)
        # The others may be waiting for a sum; that its connections close wakes them.
        dist.destroy_process_group()
        world.leave()
        if agreed is error:
            raise
        raise agreed from None
    finally:
        _current = None
        heartbeat.stop()


def _silence_others(world: World) -> contextlib.AbstractContextManager[None]:
    """Log in the first process only."""
    return contextlib.nullcontext() if world.is_first else use_log_level("lora_kit", logging.CRITICAL + 1)


def _connect() -> tuple[World, Heartbeat]:
    """Return the world, and what shows the others that this process is alive.

    The connections stay for the next training: a launcher's store does not let processes connect anew.
    """
    global _joined
    _joined += 1
    if not dist.is_initialized():
        choose_device()
        _meet_others()
        atexit.register(_disconnect)
    launched = dist.distributed_c10d._get_default_store()
    prefix = f"lora_kit/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_joined}"
    exchange = StoreExchange(dist.PrefixStore(prefix, launched))
    world = World(dist.get_rank(), dist.get_world_size(), exchange=exchange)
    own_connection = dist.PrefixStore(prefix, launched.clone())  # type: ignore[attr-defined]
    heartbeat = Heartbeat(own_connection, world.rank, world.size, on_lost=world.end_process)
    heartbeat.start()
    return world, heartbeat


def _meet_others() -> None:
    """Make torch's process group of the processes that a launcher has started.

    Raises:
        StorageError: they do not come, or cannot be reached.
    """
    place, size = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", read_world_size()
    if os.environ["RANK"] == "0":
        logger.info("%d processes meet at %s", size, place)
    try:
        store, rank, _ = next(dist.rendezvous("env://", timeout=_JOIN_TIMEOUT))
        dist.init_process_group(
            choose_backend(), store=dist.PrefixStore("processes", store), rank=rank, world_size=size, timeout=_TIMEOUT
        )
    except RuntimeError as error:
        what = f"{size} processes should meet at {place}, and did not: {shorten(error)}"
        raise StorageError(what, hint=f"WORLD_SIZE is {size}: as many must be started, and reach that place") from None


def _disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _make_portable(error: BaseException) -> BaseException:
    """Return an error that can be pickled: itself, or one with its words."""
    with contextlib.suppress(Exception):
        pickle.loads(pickle.dumps(error))
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
