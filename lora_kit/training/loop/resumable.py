"""The Trainer that writes checkpoints and resumes from one, to the same bytes as a run that was never stopped."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NotRequired, TypedDict, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from lora_kit.errors import AdapterError, VerificationError
from lora_kit.io.text import escape_text
from lora_kit.torch_utils import capture_random_states, preserve_random_states, restore_random_states, use_eval_mode
from lora_kit.training.loop.checkpoints import LOOP, Checkpoint, Environment, Identity, RunFolder
from lora_kit.training.loop.signals import StopRequest
from lora_kit.training.loop.trainer import Trainer
from lora_kit.training.loop.training_loop import TrainingLoop
from lora_kit.training.loop.weight_files import load_tensors, save_tensors

logger = logging.getLogger(__name__)

WEIGHTS = "weights.safetensors"
STATE, OPTIMIZER, SCHEDULER, SCALER = "trainer_state.json", "optimizer.pt", "scheduler.pt", "scaler.pt"
"""Names under which transformers.Trainer reads these files."""
_OVERRIDDEN_PRIVATE_METHODS: Final = ("_save_checkpoint", "_load_from_checkpoint", "_load_rng_state")
"""Methods that transformers' loop calls and that are replaced here; there are no public ones for these moments."""


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
    """

    folder: RunFolder
    identity: Identity
    setting: Environment
    stop: StopRequest
    encode_adapter: Callable[[Mapping[str, object]], Mapping[str, bytes]] | None = None


class _LoopState(TypedDict):
    """The content of loop.pt: what transformers does not save.

    Attributes:
        random: random states when the checkpoint was written.
        epoch_random: random states at the beginning of the epoch, which decide the order of its samples.
        loss: sum of the losses since the last line of the log: ().
        logged: step of that line.
        seconds: wall time of the training so far.
        micro_batch: rows of a forward pass, at most.
        tokens: number of tokens trained on so far.
        trl: what a loop of TRL has counted since the last line of the log; missing in others.
    """

    random: dict[str, Any]
    epoch_random: dict[str, Any]
    loss: Tensor
    logged: int
    seconds: float
    micro_batch: int
    tokens: int
    trl: NotRequired[dict[str, Any]]


class ResumableLoop(TrainingLoop):
    """A training loop whose checkpoints hold everything that decides the rest of the training.

    They hold more than transformers' own (see `_LoopState`), and one that is due at the end of an epoch is written only
    after the evaluation and the log line of that epoch.

    Args:
        run: what checkpoints are written with; after every step `run.stop` is asked whether to save and stop.

    Attributes:
        seconds_before: wall time of the training up to the checkpoint that it resumed from.
        resumed: step of that checkpoint; 0 for a run that was not resumed.
    """

    def __init__(self, *args: Any, run: RunContext, **kwargs: Any) -> None:
        missing = [name for name in _OVERRIDDEN_PRIVATE_METHODS if not hasattr(transformers.Trainer, name)]
        if missing:
            raise _build_version_error(f"has no Trainer.{missing[0]}")
        super().__init__(*args, **kwargs)
        self._run = run
        self.args.restore_callback_states_from_checkpoint = True
        self.seconds_before, self.resumed = 0.0, 0
        self._resumed_loop: _LoopState | None = None
        self._epoch_random: dict[str, Any] = {}
        self._in_epoch = self._is_save_pending = False
        self._restored: set[str] = set()
        self._started = 0.0
        self.add_callback(_LoopCallback(self))

    def train_from(self, checkpoint: Checkpoint | None) -> None:
        """Train from a checkpoint, or from the beginning, and load the best weights where they are to be kept."""
        self._started = time.perf_counter()
        if checkpoint is None:
            self.train()
            self._load_best()
            return
        logger.info("resuming from step %d in %s", checkpoint.step, escape_text(checkpoint.folder))
        loop: _LoopState = torch.load(checkpoint.folder / LOOP, map_location="cpu", weights_only=True)
        self.resumed, self.seconds_before = checkpoint.step, loop["seconds"]
        self.restore_counts(loop)
        if checkpoint.finished:
            self._load_weights(checkpoint.folder)
            self.state = TrainerState.load_from_json(str(checkpoint.folder / STATE))
        else:
            self._resumed_loop = loop
            self.args.eval_on_start = False
            self.train(resume_from_checkpoint=str(checkpoint.folder))
            if self._restored != {"weights", "random"}:
                raise _build_version_error("did not resume from a checkpoint as expected")
        self._load_best()

    # Writing: called by transformers.Trainer

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """Write a checkpoint of the step that has just ended.

        At the end of an epoch or of the training this is postponed until evaluation and logging are done: a run that
        resumes from it begins with the next epoch.
        """
        if self._in_epoch and (self.control.should_training_stop or self._is_epoch_over):
            self._is_save_pending = True
            return
        self._is_save_pending = False
        self._check_weights()
        self._run.folder.write(
            self._write_checkpoint_files,
            keep=self.args.save_total_limit,
            needed=self._estimate_checkpoint_bytes(),
            step=self.state.global_step,
            best=self._best_step,
            finished=self.control.should_training_stop,
            identity=self._run.identity,
            setting=self._run.setting,
        )
        self._run.stop.obey()

    @property
    def _is_epoch_over(self) -> bool:
        return float(self.state.epoch or 0).is_integer()

    def _check_weights(self) -> None:
        tensors = self._get_trained_tensors()
        not_finite = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if not_finite:
            raise VerificationError(
                f"{not_finite[0]} is not finite by step {self.state.global_step}", hint="a lower train.learning_rate"
            )

    def _write_checkpoint_files(self, folder: Path) -> None:
        self._write_adapter(folder)
        save_tensors(folder / WEIGHTS, self._get_trained_tensors())
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        _save_state(self.optimizer.state_dict(), folder / OPTIMIZER)
        _save_state(self.lr_scheduler.state_dict(), folder / SCHEDULER)
        if self.accelerator.scaler is not None:
            _save_state(self.accelerator.scaler.state_dict(), folder / SCALER)
        candidates: list[object] = [*self.callback_handler.callbacks, self.control]
        stateful: list[Any] = [each for each in candidates if isinstance(each, ExportableState)]
        self.state.stateful_callbacks = TrainerState(stateful_callbacks=stateful).stateful_callbacks
        self.state.save_to_json(str(folder / STATE))
        _save_state(self._collect_loop_state(), folder / LOOP)

    def _write_adapter(self, folder: Path) -> None:
        """Write the adapter as it is now, so that the folder of a checkpoint is an adapter's, too."""
        if self._run.encode_adapter is None:
            return
        step = self.state.global_step
        facts = {
            "metrics": {"steps": step, "tokens": self.tokens},
            "checkpoint": {"step": step, "steps": self.state.max_steps},
        }
        with (
            use_eval_mode(self.model),
            preserve_random_states(self.args.device),
        ):  # some types of PEFT compute what they save
            files = self._run.encode_adapter(facts)
        for name, data in files.items():
            (folder / name).write_bytes(data)

    def _estimate_checkpoint_bytes(self) -> int:
        """Return the bytes of the tensors in a checkpoint: the trained ones, and those of the optimizer."""
        assert self.optimizer is not None
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*self._get_trained_tensors().values(), *(value for value in states if isinstance(value, Tensor))]
        return sum(tensor.nbytes for tensor in tensors)

    def _collect_loop_state(self) -> _LoopState:
        now = capture_random_states()
        state = {
            "random": now,
            "epoch_random": now if self._is_epoch_over else self._epoch_random,
            "loss": self._loss_sum.cpu(),
            "logged": self._last_logged_step,
            "seconds": self.seconds_before + time.perf_counter() - self._started - self.evaluating_seconds,
            **self.capture_counts(),
        }
        return cast("_LoopState", state)

    def _get_trained_tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.model.named_parameters() if tensor.requires_grad}

    # Reading: called by transformers.Trainer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load_weights(Path(resume_from_checkpoint))
        self._restored.add("weights")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._resumed_loop is not None:
            restore_random_states(self._resumed_loop["random"])
            self._restored.add("random")

    def _load_weights(self, folder: Path) -> None:
        trained, saved = self._get_trained_tensors(), load_tensors(folder / WEIGHTS)
        if {name: tensor.shape for name, tensor in trained.items()} != {name: saved[name].shape for name in saved}:
            raise AdapterError(f"{escape_text(folder)} does not hold the tensors that are trained")
        with torch.no_grad():
            for name, tensor in trained.items():
                tensor.copy_(saved[name])

    # The best weights

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; where the result is the best so far, save a checkpoint even if none is due."""
        metrics = super().evaluate(*args, **kwargs)
        is_best = self.args.load_best_model_at_end and self._is_best(metrics)
        if is_best or self._is_asked_to_stop:
            self.control.should_save = True
        return metrics

    def _is_best(self, metrics: Mapping[str, float]) -> bool:
        best, key = self.state.best_metric, str(self.args.metric_for_best_model).removeprefix("eval_")
        value = metrics[f"eval_{key}"]
        return best is None or (value > best if self.args.greater_is_better else value < best)

    @property
    def kept(self) -> int:
        """The step whose weights the model has after training."""
        return self.state.global_step if self._best_step is None else self._best_step

    @property
    def _best_step(self) -> int | None:
        """The step of the best weights so far, where these are kept at the end; else None."""
        return self.state.best_global_step if self.args.load_best_model_at_end else None

    def _load_best(self) -> None:
        if self._best_step is not None:
            self._load_weights(self._run.folder.path(self._best_step))

    # Moments of the loop

    @property
    def _is_asked_to_stop(self) -> bool:
        return self._run.stop.signal_number is not None

    def _begin_training(self) -> None:
        if self._resumed_loop is None:
            self._restart_averages(0)
        else:
            self._restart_averages(self._resumed_loop["logged"], self._resumed_loop["loss"])

    def _begin_epoch(self) -> None:
        if self._resumed_loop is not None and not self._epoch_random:
            restore_random_states(self._resumed_loop["epoch_random"])
        self._epoch_random, self._in_epoch = capture_random_states(), True

    def _end_step(self, control: TrainerControl) -> None:
        control.should_save = control.should_save or self._is_asked_to_stop

    def _end_epoch(self, control: TrainerControl) -> None:
        self._in_epoch = False
        control.should_save = control.should_save or self._is_save_pending or self._is_asked_to_stop


class ResumableTrainer(ResumableLoop, Trainer):
    """The Trainer whose checkpoints hold everything that decides the rest of the training."""


class _LoopCallback(transformers.TrainerCallback):
    """Calls the methods of a ResumableLoop at moments of the loop."""

    def __init__(self, trainer: ResumableLoop) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._trainer._begin_training()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._trainer._begin_epoch()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._trainer._end_step(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._trainer._end_epoch(control)


def _save_state(state: object, path: Path) -> None:
    """Write a state as torch does, into a file of Python's: then a full disk is an OSError within torch's error."""
    with open(path, "wb") as file:
        torch.save(state, file)


def _build_version_error(what: str) -> VerificationError:
    """Return the error for a version of transformers with which checkpoints are not reliable."""
    hint = "lora_kit is tested with the version in constraints.txt"
    return VerificationError(f"transformers {transformers.__version__} {what}", hint=hint)
