"""The Trainer that writes checkpoints and resumes from one, to the same bytes as a run that was never stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from lora_kit.errors import AdapterError, StorageError, VerificationError
from lora_kit.evaluation.measure import Evaluation
from lora_kit.io.text import escape_text
from lora_kit.torch_utils import capture_random_states, preserve_random_states, restore_random_states, use_eval_mode
from lora_kit.training.loop.checkpoints import LOOP, Checkpoint
from lora_kit.training.loop.moments import MomentsCallback
from lora_kit.training.loop.run_state import LoopState, ProcessState, RunContext, choose_state
from lora_kit.training.loop.signals import SIGNALS
from lora_kit.training.loop.trainer import Trainer
from lora_kit.training.loop.training_loop import TrainingLoop
from lora_kit.training.loop.weight_average import WeightAverage
from lora_kit.training.loop.weight_files import load_tensors, save_tensors

logger = logging.getLogger(__name__)

WEIGHTS, AVERAGE = "weights.safetensors", "average.safetensors"
"""The trained tensors, and their moving average where the recipe asks for one."""
STATE, OPTIMIZER, SCHEDULER, SCALER = "trainer_state.json", "optimizer.pt", "scheduler.pt", "scaler.pt"
"""Names under which transformers.Trainer reads these files."""
_OVERRIDDEN_PRIVATE_METHODS: Final = ("_save_checkpoint", "_load_from_checkpoint", "_load_rng_state")
"""Methods that transformers' loop calls and that are replaced here; there are no public ones for these moments."""


class ResumableLoop(TrainingLoop):
    """A training loop whose checkpoints hold everything that decides the rest of the training.

    They hold more than transformers' own (see `LoopState`), and one that is due at the end of an epoch is written only
    after the evaluation and the log line of that epoch.

    Args:
        run: what checkpoints are written with; after every step `run.stop` is asked whether to save and stop.
        ema_decay: of a moving average of the trained tensors, see `WeightAverage`, which is evaluated and is the
            result; None for the tensors themselves.

    Attributes:
        seconds_before: wall time of the training up to the checkpoint that it resumed from.
        resumed: step of that checkpoint; 0 for a run that was not resumed.
        before: the metrics on the validation rows before training; None without any, or until they are measured.
    """

    def __init__(self, *args: Any, run: RunContext, ema_decay: float | None = None, **kwargs: Any) -> None:
        missing = [name for name in _OVERRIDDEN_PRIVATE_METHODS if not hasattr(transformers.Trainer, name)]
        if missing:
            raise _build_version_error(f"has no Trainer.{missing[0]}")
        super().__init__(*args, world=run.world, **kwargs)
        self._run, self._ema_decay = run, ema_decay
        self._average: WeightAverage | None = None
        self.args.restore_callback_states_from_checkpoint = True
        self.seconds_before, self.resumed = 0.0, 0
        self.before: Evaluation | None = None
        self._resumed_loop: LoopState | None = None
        self._own_state: ProcessState | None = None
        self._states: list[ProcessState] = []
        self._epoch_random: dict[str, object] = {}
        self._in_epoch = self._is_save_pending = False
        self._restored: set[str] = set()
        self._started = 0.0
        self.add_callback(MomentsCallback(self))

    def train_from(self, checkpoint: Checkpoint | None) -> None:
        """Train from a checkpoint, or from the beginning, and load the best weights where they are to be kept."""
        self._started = time.perf_counter()
        if checkpoint is None:
            self._draw_apart(0)
            self.train()
        else:
            self._resume(checkpoint)
        self._run.stop.agree([max(counts) for counts in zip(*self.world.gather(self._count_signals()), strict=True)])
        self._load_result()

    def _resume(self, checkpoint: Checkpoint) -> None:
        logger.info("resuming from step %d in %s", checkpoint.step, escape_text(checkpoint.folder))
        if not (checkpoint.folder / LOOP).is_file():
            what = f"process {self.world.rank} finds no checkpoint {escape_text(checkpoint.folder)}"
            raise StorageError(what, hint="the output has to be in a folder that every machine has")
        loop: LoopState = torch.load(checkpoint.folder / LOOP, map_location="cpu", weights_only=True)
        self.resumed, self.seconds_before = checkpoint.step, loop["seconds"]
        self._own_state = choose_state(loop, self.world.rank)
        if self._own_state is None:  # there was no such process before
            self.restore_counts({**loop, "micro_batch": self.micro_batch})
            self._draw_apart(checkpoint.step)
        else:
            self.restore_counts(self._own_state)
        if checkpoint.finished:
            self._load_weights(checkpoint.folder)
            self.state = TrainerState.load_from_json(str(checkpoint.folder / STATE))
            return
        self._resumed_loop = loop
        self.args.eval_on_start = False
        self.train(resume_from_checkpoint=str(checkpoint.folder))
        if self._restored != {"weights", "random"}:
            raise _build_version_error("did not resume from a checkpoint as expected")

    def _draw_apart(self, step: int) -> None:
        """Have the processes after the first draw dropout of their own. The first draws as a process alone does."""
        if not self.world.is_first:
            transformers.set_seed(self.args.seed + self.world.rank + 2**16 * step)

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
        self._states = self.world.gather(self._collect_state())
        self.world.ask_first(self._write_checkpoint)
        self._run.stop.obey()

    def _write_checkpoint(self) -> None:
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
        with self._use_average():
            self._write_adapter(folder)
        save_tensors(folder / WEIGHTS, self._get_trained_tensors())
        if self._average is not None:
            save_tensors(folder / AVERAGE, self._average.tensors)
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
        tensors += [] if self._average is None else self._average.tensors.values()
        return sum(tensor.nbytes for tensor in tensors)

    def _collect_state(self) -> ProcessState:
        """Return what this process has counted and drawn."""
        now = capture_random_states()
        epoch_random = now if self._is_epoch_over else self._epoch_random
        return cast("ProcessState", {"random": now, "epoch_random": epoch_random, **self.capture_counts()})

    def _collect_loop_state(self) -> LoopState:
        first, *others = self._states
        state = {
            "loss": self._loss_sum.cpu(),
            "logged": self._last_logged_step,
            "seconds": self.seconds_before + time.perf_counter() - self._started - self.evaluating_seconds,
            "before": None if self.before is None else dataclasses.asdict(self.before),
            "trainable": self._run.trainable,
            "parameters": self._run.parameters,
            **first,
        }
        return cast("LoopState", state | ({"others": others} if others else {}))

    def _get_trained_tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.model.named_parameters() if tensor.requires_grad}

    # Reading: called by transformers.Trainer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load_weights(Path(resume_from_checkpoint))
        self._restored.add("weights")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._resumed_loop is not None:
            if self._own_state is not None:
                restore_random_states(self._own_state["random"])
            self._restored.add("random")

    def _load_weights(self, folder: Path) -> None:
        trained, saved = self._get_trained_tensors(), load_tensors(folder / WEIGHTS)
        if {name: tensor.shape for name, tensor in trained.items()} != {name: saved[name].shape for name in saved}:
            raise AdapterError(f"{escape_text(folder)} does not hold the tensors that are trained")
        with torch.no_grad():
            for name, tensor in trained.items():
                tensor.copy_(saved[name])
        if self._ema_decay is not None:
            self._average = WeightAverage(self._ema_decay, trained)
            self._average.load(load_tensors(folder / AVERAGE))

    # The average, and the best weights

    def _use_average(self) -> contextlib.AbstractContextManager[None]:
        """Have the trained tensors be their average until the block ends, where there is one."""
        if self._average is None:
            return contextlib.nullcontext()
        return self._average.swap_into(self._get_trained_tensors())

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; where the result is the best so far, save a checkpoint even if none is due."""
        with self._use_average():
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

    def _load_result(self) -> None:
        """Give the trained tensors the values that are the result: the best ones, and of these the average."""
        if self._best_step is not None:
            self._load_weights(self._run.folder.path(self._best_step))
        if self._average is not None:
            self._average.copy_to(self._get_trained_tensors())

    # Moments of the loop

    @property
    def _is_asked_to_stop(self) -> bool:
        return self._run.stop.signal_number is not None

    def begin_training(self) -> None:
        """Start the average and the means of the log, or continue those of the checkpoint."""
        if self._ema_decay is not None and self._average is None:
            self._average = WeightAverage(self._ema_decay, self._get_trained_tensors())
        if self._resumed_loop is None:
            self._restart_averages(0)
        else:
            self._restart_averages(self._resumed_loop["logged"], self._resumed_loop["loss"])

    def begin_epoch(self) -> None:
        """Note the random states that decide the order of the samples."""
        if self._own_state is not None and not self._epoch_random:
            restore_random_states(self._own_state["epoch_random"])
        self._epoch_random, self._in_epoch = capture_random_states(), True

    def _count_signals(self) -> list[int]:
        return [int(self._run.stop.received == number) for number in SIGNALS]

    def _collect_notes(self) -> list[int]:
        return [*super()._collect_notes(), *self._count_signals()]

    def _take_notes(self, sums: Sequence[int]) -> None:
        own = len(SIGNALS)
        super()._take_notes(sums[:-own])
        self._run.stop.agree(sums[-own:])

    def end_step(self, control: TrainerControl) -> None:
        """Update the average; ask for a checkpoint where the training is to stop."""
        if self._average is not None:
            self._average.update(self._get_trained_tensors())
        control.should_save = control.should_save or self._is_asked_to_stop

    def end_epoch(self, control: TrainerControl) -> None:
        """Ask for the checkpoint that was postponed to the end of the epoch."""
        self._in_epoch = False
        control.should_save = control.should_save or self._is_save_pending or self._is_asked_to_stop


class ResumableTrainer(ResumableLoop, Trainer):
    """The Trainer whose checkpoints hold everything that decides the rest of the training."""


def _save_state(state: object, path: Path) -> None:
    """Write a state as torch does, into a file of Python's: then a full disk is an OSError within torch's error."""
    with open(path, "wb") as file:
        torch.save(state, file)


def _build_version_error(what: str) -> VerificationError:
    """Return the error for a version of transformers with which checkpoints are not reliable."""
    hint = "lora_kit is tested with the version in constraints.txt"
    return VerificationError(f"transformers {transformers.__version__} {what}", hint=hint)
