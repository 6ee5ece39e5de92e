"""The loop that gives each training its turn, and computes the frozen layers of a group of them at once."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lora_kit.names import THREAD_PREFIX
from lora_kit.torch_utils import is_out_of_memory
from lora_kit.training.together.body_stand_in import (
    Ask,
    BackwardRequest,
    ForwardRequest,
    JointRequest,
    ProbeRequest,
)
from lora_kit.training.together.group_size import GroupSize
from lora_kit.training.together.joint_model import JointModel
from lora_kit.training.together.packed_rows import RowBlock
from lora_kit.training.together.turns import TurnThread

logger = logging.getLogger(__name__)

TellBody: TypeAlias = Callable[[nn.Module], None]
"""Is called with the body of a training's model before that first asks."""
Work: TypeAlias = Callable[[Ask, TellBody], Any]
"""A training; its result is the work's."""


@dataclass
class Member:
    """One of the trainings.

    Attributes:
        name: of its adapter.
        thread: that it runs in.
        body: of its model; None until that is known, and where it computes its batches itself.
    """

    name: str
    thread: TurnThread[JointRequest, Any, Any]
    body: nn.Module | None = None


class JointDriver:
    """Runs trainings, each as if it were alone; a group of them shares the forward and backward of the frozen layers.

    Args:
        model: computes the groups; None where all compute their batches themselves.
        slots: trainings that are begun and not ended, at most.
    """

    def __init__(self, model: JointModel | None, *, slots: int) -> None:
        self._model, self._slots = model, slots
        self._sizes = GroupSize(slots)
        self._waiting: deque[Member] = deque()
        self._queue: deque[Member] = deque()
        self._active: list[Member] = []

    def run(self, works: Sequence[tuple[str, Work]], *, may_begin: Callable[[], bool]) -> list[Member]:
        """Run all trainings, and return them when they have ended, in their order.

        Args:
            works: with the names of their adapters.
            may_begin: whether a further training may begin now; those that may not are never begun.
        """
        members = [self._make_member(name, work) for name, work in works]
        self._waiting.extend(members)
        try:
            while self._active or self._waiting:
                self._fill_slots(may_begin)
                if self._queue:
                    self._run_group(self._take_group())
        finally:
            for member in members:
                member.thread.abandon()
        return members

    def _make_member(self, name: str, work: Work) -> Member:
        def set_body(body: nn.Module) -> None:
            member.body = body

        member = Member(name, TurnThread(f"{THREAD_PREFIX}{name}", lambda ask: work(ask, set_body)))
        return member

    def _fill_slots(self, may_begin: Callable[[], bool]) -> None:
        while self._waiting and len(self._active) < self._slots:
            member = self._waiting.popleft()
            if may_begin():
                self._active.append(member)
                self._resume(member, None)

    def _resume(self, member: Member, answer: Any) -> None:
        """Give a training its turn, and afterwards put it where it waits."""
        member.thread.resume(answer)
        while isinstance(probe := member.thread.request, ProbeRequest):
            member.thread.resume(self._probe(member, probe))
        if member.thread.has_ended:
            self._active.remove(member)
            if member in self._queue:
                self._queue.remove(member)
            if member.body is not None and self._active:
                self._join()
        elif isinstance(member.thread.request, ForwardRequest):
            self._queue.append(member)

    def _probe(self, member: Member, probe: ProbeRequest) -> str | None:
        assert self._model is not None
        assert member.body is not None
        self._join()
        reason = self._model.reason_not_joint(member.body, probe)
        if reason is not None:
            member.body = None
            self._join()
        return reason

    def _join(self) -> None:
        assert self._model is not None
        self._model.join([member.body for member in self._active if member.body is not None])

    def _take_group(self) -> list[Member]:
        """Take the next members of the queue that can be computed at once."""
        first = self._queue[0]
        alike = [member for member in self._queue if _get_kind(member) == _get_kind(first)]
        group = alike[: self._sizes.choose(len(self._active))]
        for member in group:
            self._queue.remove(member)
        return group

    def _run_group(self, group: Sequence[Member]) -> None:
        started, streams = time.perf_counter(), [member.thread.state.torch.copy() for member in group]
        try:
            states = self._compute_forward(group)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            for member, stream in zip(group, streams, strict=True):
                member.thread.state.torch = stream  # without what the failed forward drew
            self._retreat(group, error)
            return
        seconds = time.perf_counter() - started
        for member, state in zip(group, states, strict=True):
            self._resume(member, state.detach().requires_grad_())
        gradients = [(member, state, _get_gradient(member)) for member, state in zip(group, states, strict=True)]
        todo = [(member, state, gradient) for member, state, gradient in gradients if gradient is not None]
        del states, gradients
        started = time.perf_counter()
        failure = _run_backward([(state, gradient) for _, state, gradient in todo])
        seconds += time.perf_counter() - started
        tokens = sum(state[..., 0].numel() for _, state, _ in todo)
        if failure is None and len(todo) == len(group):
            self._sizes.record(len(group), tokens=tokens, seconds=seconds)
        for member in [member for member, _, _ in todo]:
            self._resume(member, failure)

    def _compute_forward(self, group: Sequence[Member]) -> list[Tensor]:
        assert self._model is not None
        return self._model.forward(list(_iterate_blocks(group)), _get_request(group[0]).autocast)

    def _retreat(self, group: Sequence[Member], error: RuntimeError) -> None:
        """Compute fewer at once from now on; a training that ran out of memory alone deals with it itself."""
        if len(group) == 1:
            self._resume(group[0], error)
            return
        self._sizes.limit(len(group) // 2)
        logger.warning("memory ran out with %d adapters at once; at most %d from now on", len(group), len(group) // 2)
        self._queue.extendleft(reversed(group))


def _get_request(member: Member) -> ForwardRequest:
    request = member.thread.request
    assert isinstance(request, ForwardRequest)
    return request


def _get_kind(member: Member) -> tuple[object, ...]:
    """Return what must be equal for members that are computed at once."""
    request = _get_request(member)
    return request.autocast, "token_type_ids" in request.inputs


def _iterate_blocks(group: Sequence[Member]) -> Iterator[RowBlock]:
    for member in group:
        assert member.body is not None
        yield RowBlock(member.body, _get_request(member).inputs, member.thread.state.torch)


def _get_gradient(member: Member) -> Tensor | None:
    """Return the gradient of a member's hidden states; None where it has ended, or begins its step anew."""
    request = member.thread.request
    return request.gradient if isinstance(request, BackwardRequest) else None


def _run_backward(pairs: Sequence[tuple[Tensor, Tensor]]) -> RuntimeError | None:
    """Run one backward for all; return the error where memory ran out."""
    if not pairs:
        return None
    try:
        torch.autograd.backward([state for state, _ in pairs], [gradient for _, gradient in pairs])
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return error
    return None
