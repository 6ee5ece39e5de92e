"""What a training loop knows of its run, and what it leaves in a checkpoint beside transformers' own files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NotRequired, TypedDict

from torch import Tensor

from lora_kit.training.loop.checkpoints import Environment, Identity, RunFolder
from lora_kit.training.loop.signals import StopRequest


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What a run's checkpoints are written with.

    Attributes:
        folder: where the checkpoints are.
        identity: everything that decides the result.
        setting: the environment.
        stop: whether a signal has asked to stop.
        encode_adapter: returns the files of the adapter as it is now, with facts of the training in its record; None
            where whole weights are trained.
        trainable: number of trained parameters, for the report of a checkpoint that is kept.
        parameters: number of parameters of the whole model, likewise.
    """

    folder: RunFolder
    identity: Identity
    setting: Environment
    stop: StopRequest
    encode_adapter: Callable[[Mapping[str, object]], Mapping[str, bytes]] | None = None
    trainable: int = 0
    parameters: int = 0


class LoopState(TypedDict):
    """The content of loop.pt: what transformers does not save.

    Attributes:
        random: random states when the checkpoint was written.
        epoch_random: random states at the beginning of the epoch, which decide the order of its samples.
        loss: sum of the losses since the last line of the log: ().
        logged: step of that line.
        seconds: wall time of the training so far.
        micro_batch: rows of a forward pass, at most.
        tokens: number of tokens trained on so far.
        before: the metrics on the validation rows before training; None without any.
        trainable: number of trained parameters.
        parameters: number of parameters of the whole model.
        trl: what a loop of TRL has counted since the last line of the log; missing in others.
    """

    random: dict[str, object]
    epoch_random: dict[str, object]
    loss: Tensor
    logged: int
    seconds: float
    micro_batch: int
    tokens: int
    before: dict[str, object] | None
    trainable: int
    parameters: int
    trl: NotRequired[dict[str, object]]
