"""The processes of one training: which of them writes, what they decide together, and the sum of their gradients.

Every process runs the same training on rows of its own. A launcher such as torchrun starts them and gives each its RANK
and the WORLD_SIZE. Nothing else in the package knows torch.distributed: transformers and accelerate see one process
that has all rows of a batch, of which each process then computes its own.

What is not a gradient goes through the launcher's key-value store, where a process that waits sees that another one
has failed. A process that fails leaves its error there, and all raise it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_kit.errors import REPORTED_ELSEWHERE, StorageError
from lora_kit.models.silence import use_log_level
from lora_kit.training.loop.flat_sum import sum_gradients

T = TypeVar("T")

_VARIABLES: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")
"""What a launcher sets; it is hidden from libraries that would act on it."""
_TIMEOUT: Final = timedelta(hours=1)
"""Of a sum of gradients: a process may wait for one that halves its rows; what was lost is found otherwise."""
_POLL_SECONDS: Final = (0.0005, 0.02)
"""Least and most time between two looks at the store. To wait in the store would print a warning of torch's own."""
_PATIENCE: Final = 3.0
"""Seconds in which the first process reports a failure; then another one does."""
_PART: Final = 2**22
"""Bytes under one key of a store, which takes 8 MiB at most."""
_FAILURE, _SPEAKER = "failure", "speaker"


class PeerError(Exception):
    """Another process has failed, or was lost; `World.agree_on` says which error all raise."""


class World:
    """The processes of a training, as one of them sees them.

    All processes must call the methods below in the same order.

    Args:
        rank: number of this process, from 0.
        size: number of processes.
        store: of the launcher; None for a process alone.
        all_reduce: replaces a tensor by its sum over all processes, in place.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        describe_resume: returns what to do after a process was lost.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        store: dist.Store | None = None,
        all_reduce: Callable[[Tensor], object] = dist.all_reduce,
    ) -> None:
        self.rank, self.size = rank, size
        self.describe_resume: Callable[[], str] = lambda: ""
        self._store, self._all_reduce = store, all_reduce
        self._turn = 0
        self._own_keys: list[str] = []

    @property
    def is_first(self) -> bool:
        """Whether this is the process that locks, decides, writes and reports."""
        return self.rank == 0

    # Values

    def ask_first(self, ask: Callable[[], T]) -> T:
        """Return in every process what `ask` returns in the first one."""
        if self.size == 1:
            return ask()
        self._turn += 1
        if self.is_first:
            value = ask()
            self._put(f"{self._turn}", value)
            return value
        answer: T = self._take(f"{self._turn}")
        return answer

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in their order."""
        if self.size == 1:
            return [value]
        self._turn += 1
        before = self._own_keys
        self._own_keys = []
        self._put(f"{self._turn}/{self.rank}", value)
        values: list[T] = [self._take(f"{self._turn}/{rank}") for rank in range(self.size)]
        assert self._store is not None
        for key in before:  # every process has come here, so it has read what was given before
            self._store.delete_key(key)
        return values

    @contextlib.contextmanager
    def on_first(self, context: contextlib.AbstractContextManager[object]) -> Iterator[None]:
        """Enter a context in the first process; the others wait until it is entered, and for nothing at its end."""
        with context if self.is_first else contextlib.nullcontext():
            self.meet()
            yield

    def meet(self) -> None:
        """Wait until every process is here.

        Raises:
            PeerError: one failed, or was lost.
        """
        self.gather(None)

    def _put(self, key: str, value: object) -> None:
        assert self._store is not None
        data = pickle.dumps(value)
        parts = [data[start : start + _PART] for start in range(0, len(data), _PART)]
        with _translate_loss():
            for number, part in enumerate(parts):
                self._store.set(f"{key}.{number}", part)  # type: ignore[arg-type] # torch takes bytes, too
            self._store.set(key, str(len(parts)))
        self._own_keys += [key, *(f"{key}.{number}" for number in range(len(parts)))]

    def _take(self, key: str) -> T:  # type: ignore[type-var]
        with _translate_loss():
            self._wait(key)
            assert self._store is not None
            count = int(self._store.get(key))
            data = b"".join(self._store.get(f"{key}.{number}") for number in range(count))
        value: T = pickle.loads(data)
        return value

    def _wait(self, key: str, *, seconds: float = math.inf) -> bool:
        """Wait for a key; return whether it is there.

        Raises:
            PeerError: another process has failed, which has not set the key.
        """
        assert self._store is not None
        pause, most = _POLL_SECONDS
        end = time.monotonic() + seconds
        while not self._store.check([key]):
            if time.monotonic() > end:
                return False
            if seconds == math.inf and self._store.check([_FAILURE]):
                raise PeerError("another process has failed")
            time.sleep(pause)
            pause = min(2 * pause, most)
        return True

    # Tensors

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        with _translate_loss():
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
        with _translate_loss():
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
        assert self._store is not None
        if not isinstance(error, PeerError):
            own = pickle.dumps((self.rank, _make_portable(error)))
            rank, first = pickle.loads(self._store.compare_set(_FAILURE, "", own))  # type: ignore[arg-type]
            return error if rank == self.rank else first
        if not self._wait(_FAILURE, seconds=_PATIENCE):
            return self._build_loss_error()
        _, first = pickle.loads(self._store.get(_FAILURE))
        return first

    def _claims_to_speak(self) -> bool:
        """Return whether this process is the one that reports the failure: the first, unless it is slow or lost."""
        assert self._store is not None
        if not self.is_first:
            self._wait(_SPEAKER, seconds=_PATIENCE)
        return self._store.compare_set(_SPEAKER, "", str(self.rank)).decode() == str(self.rank)

    def _build_loss_error(self) -> StorageError:
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
        StorageError: a process was lost.
    """
    global _current
    if _current is not None or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        world = _current or ALONE
        with _hide_launcher(), _silence_others(world):
            yield world
        return
    world, leave = _connect()
    _current = world
    try:
        with _hide_launcher(), _silence_others(world):
            yield world
            world.meet()
    except BaseException as error:
        agreed = world.agree_on(error)
        if agreed is error:
            raise
        raise agreed from None
    finally:
        _current = None
        leave()


def _silence_others(world: World) -> contextlib.AbstractContextManager[None]:
    """Log in the first process only."""
    return contextlib.nullcontext() if world.is_first else use_log_level("lora_kit", logging.CRITICAL + 1)


def _connect() -> tuple[World, Callable[[], None]]:
    """Return the world, and what leaves it."""
    global _joined
    _joined += 1
    is_ours = not dist.is_initialized()
    if is_ours:
        _choose_device()
        dist.init_process_group(_choose_backend(), timeout=_TIMEOUT)
    launched = dist.distributed_c10d._get_default_store()
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"lora_kit/{restart}/{_joined}", launched)
    world = World(dist.get_rank(), dist.get_world_size(), store=store)
    return world, dist.destroy_process_group if is_ours else lambda: None


def _choose_device() -> None:
    """Let `cuda` be a device of this process's own, where there are as many."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def _choose_backend() -> str:
    if not torch.cuda.is_available():
        return "gloo"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # NCCL does not let two processes share a device.
    return "cpu:gloo,cuda:nccl" if here <= torch.cuda.device_count() else "cpu:gloo,cuda:gloo"


@contextlib.contextmanager
def _hide_launcher() -> Iterator[None]:
    """Hide a launcher's variables, and restore them: accelerate would wrap the model and gather what is summed here."""
    before = {name: os.environ.pop(name) for name in _VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


@contextlib.contextmanager
def _translate_loss() -> Iterator[None]:
    """Raise a PeerError for what torch raises where another process is gone."""
    try:
        yield
    except (PeerError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        raise PeerError(str(error)) from error


def _make_portable(error: BaseException) -> BaseException:
    """Return an error that can be pickled: itself, or one with its words."""
    with contextlib.suppress(Exception):
        pickle.loads(pickle.dumps(error))
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
