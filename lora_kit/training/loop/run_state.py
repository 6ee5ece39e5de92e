"""What a training loop knows of its run, and what it leaves in a checkpoint beside transformers' own files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NotRequired, TypedDict

from torch import Tensor

from lora_kit.training.loop.checkpoints import Environment, Identity, RunFolder
from lora_kit.training.loop.signals import StopRequest
from lora_kit.training.loop.world import ALONE, World


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What a run's checkpoints are written with.

    Attributes:
        folder: where the checkpoints are.
        identity: everything that decides the result.
        setting: the environment.
        stop: whether a signal has asked to stop.
        world: the processes of the training.
        encode_adapter: returns the files of the adapter as it is now, with facts of the training in its record; None
            where whole weights are trained.
        trainable: number of trained parameters, for the report of a checkpoint that is kept.
        parameters: number of parameters of the whole model, likewise.
    """

    folder: RunFolder
    identity: Identity
    setting: Environment
    stop: StopRequest
    world: World = ALONE
    encode_adapter: Callable[[Mapping[str, object]], Mapping[str, bytes]] | None = None
    trainable: int = 0
    parameters: int = 0


class ProcessState(TypedDict):
    """What a process has counted and drawn.

    Attributes:
        random: random states when the checkpoint was written.
        epoch_random: random states at the beginning of the epoch, which in the first process decide the order of its
            samples.
        micro_batch: rows of a forward pass, at most.
        tokens: number of tokens that all processes have trained on so far.
        trl: what a loop of TRL has counted since the last line of the log; missing in others.
    """

    random: dict[str, object]
    epoch_random: dict[str, object]
    micro_batch: int
    tokens: int
    trl: NotRequired[dict[str, object]]


class LoopState(ProcessState):
    """The content of loop.pt: what transformers does not save.

    Attributes:
        loss: sum of the losses since the last line of the log: ().
        logged: step of that line.
        seconds: wall time of the training so far.
        before: the metrics on the validation rows before training; None without any.
        trainable: number of trained parameters.
        parameters: number of parameters of the whole model.
        others: the states of the processes after the first, whose state is this one; missing where it was alone.
    """

    loss: Tensor
    logged: int
    seconds: float
    before: dict[str, object] | None
    trainable: int
    parameters: int
    others: NotRequired[list[ProcessState]]


def choose_state(loop: LoopState, rank: int) -> ProcessState | None:
    """Return the state of a process in a checkpoint; None where there were fewer processes."""
    if rank == 0:
        return loop
    others = loop.get("others", [])
    return others[rank - 1] if rank <= len(others) else None
