"""The Trainer that writes checkpoints and goes on from one, to the same bytes as a run that was never stopped."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer_callback import ExportableState, TrainerState

from lora_kit.errors import AdapterError, VerificationError
from lora_kit.io.text import escape_text
from lora_kit.torch_utils import capture_random_states, restore_random_states
from lora_kit.training.loop.checkpoints import Checkpoint, Identity, RunFolder
from lora_kit.training.loop.signals import StopRequest
from lora_kit.training.loop.trainer import Trainer

logger = logging.getLogger(__name__)

WEIGHTS, LOOP = "weights.safetensors", "loop.pt"
STATE, OPTIMIZER, SCHEDULER, SCALER = "trainer_state.json", "optimizer.pt", "scheduler.pt", "scaler.pt"
"""Read by transformers.Trainer under these names."""
_OVERRIDDEN_PRIVATE_METHODS: Final = ("_save_checkpoint", "_load_from_checkpoint", "_load_rng_state")
"""Moments of transformers' loop for which it has no public name: methods that it calls, and that are replaced here."""


class ResumableTrainer(Trainer):
    """A Trainer whose checkpoints hold the trained tensors and everything else that decides how training goes on.

    What transformers leaves out is added: the loss since the last line of the log, the random states at the beginning
    of the epoch, from which the order of the samples follows, the counts of the report, and a moment to save at which
    nothing of the epoch is left to do.

    Args:
        run: where the checkpoints are.
        identity, setting: of the run, see `lora_kit.training.loop.checkpoints`.
        stop: asked after every step whether to save and stop there.

    Attributes:
        seconds_before: wall time of the training up to the checkpoint it went on from.
        resumed: step of that checkpoint; 0 for a run from the beginning.
    """

    def __init__(
        self, *args: Any, run: RunFolder, identity: Identity, setting: dict[str, Any], stop: StopRequest, **kwargs: Any
    ) -> None:
        missing = [name for name in _OVERRIDDEN_PRIVATE_METHODS if not hasattr(transformers.Trainer, name)]
        if missing:
            raise _build_version_error(f"has no Trainer.{missing[0]}")
        super().__init__(*args, **kwargs)
        self._run, self._identity, self._setting, self._stop = run, identity, setting, stop
        self.args.restore_callback_states_from_checkpoint = True
        self.seconds_before, self.resumed = 0.0, 0
        self._resumed_loop: dict[str, Any] | None = None
        self._epoch_random: dict[str, Any] = {}
        self._in_epoch = self._is_save_pending = False
        self._put_back: set[str] = set()
        self._started = 0.0
        self.add_callback(_LoopCallback(self))

    def train_from(self, checkpoint: Checkpoint | None) -> None:
        """Train, from where a checkpoint stands or from the beginning."""
        self._started = time.perf_counter()
        if checkpoint is None:
            self.train()
            self._load_best()
            return
        logger.info("going on from step %d in %s", checkpoint.step, escape_text(checkpoint.folder))
        loop = torch.load(checkpoint.folder / LOOP, map_location="cpu", weights_only=True)
        self.resumed, self.seconds_before = checkpoint.step, loop["seconds"]
        self._tokens_seen += loop["tokens"]
        self._micro.rows = loop["micro_batch"]
        if checkpoint.finished:
            self._load_weights(checkpoint.folder)
            self.state = TrainerState.load_from_json(str(checkpoint.folder / STATE))
        else:
            self._resumed_loop = loop
            self.args.eval_on_start = False
            self.train(resume_from_checkpoint=str(checkpoint.folder))
            if self._put_back != {"weights", "random"}:
                raise _build_version_error("went on from a checkpoint in a way of its own")
        self._load_best()

    # Writing: called by transformers.Trainer

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint of the step that has just ended.

        At the end of an epoch or of the training it is put off until what is logged and evaluated then is done: a run
        that goes on from it begins with the next epoch.
        """
        if self._in_epoch and (self.control.should_training_stop or self._is_epoch_over):
            self._is_save_pending = True
            return
        self._is_save_pending = False
        self._check_weights()
        self._run.write(
            self._write_checkpoint_files,
            keep=self.args.save_total_limit,
            step=self.state.global_step,
            best=self._best_step,
            finished=self.control.should_training_stop,
            identity=self._identity,
            setting=self._setting,
        )
        self._stop.obey()

    @property
    def _is_epoch_over(self) -> bool:
        return float(self.state.epoch or 0).is_integer()

    def _check_weights(self) -> None:
        broken = [name for name, tensor in self._get_trained_tensors().items() if not torch.isfinite(tensor).all()]
        if broken:
            raise VerificationError(
                f"{broken[0]} is not finite by step {self.state.global_step}", hint="a lower train.learning_rate"
            )

    def _write_checkpoint_files(self, folder: Path) -> None:
        weights = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                   for name, tensor in self._get_trained_tensors().items()}  # fmt: skip
        save_file(weights, folder / WEIGHTS)
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        torch.save(self.optimizer.state_dict(), folder / OPTIMIZER)
        torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER)
        if self.accelerator.scaler is not None:
            torch.save(self.accelerator.scaler.state_dict(), folder / SCALER)
        told: list[Any] = [*self.callback_handler.callbacks, self.control]
        stateful: list[Any] = [each for each in told if isinstance(each, ExportableState)]
        self.state.stateful_callbacks = TrainerState(stateful_callbacks=stateful).stateful_callbacks
        self.state.save_to_json(str(folder / STATE))
        now = capture_random_states()
        loop = {
            "random": now,
            "epoch_random": now if self._is_epoch_over else self._epoch_random,
            "loss": self._loss_sum.cpu(),
            "logged": self._last_logged_step,
            "micro_batch": self._micro.rows,
            "tokens": self.tokens,
            "seconds": self.seconds_before + time.perf_counter() - self._started - self.evaluating_seconds,
        }
        torch.save(loop, folder / LOOP)

    def _get_trained_tensors(self) -> dict[str, Tensor]:
        model: Any = self.model
        return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}

    # Reading: called by transformers.Trainer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._load_weights(Path(resume_from_checkpoint))
        self._put_back.add("weights")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._resumed_loop is not None:
            restore_random_states(self._resumed_loop["random"])
            self._put_back.add("random")

    def _load_weights(self, folder: Path) -> None:
        trained, kept = self._get_trained_tensors(), load_file(folder / WEIGHTS)
        if {name: tensor.shape for name, tensor in trained.items()} != {key: kept[key].shape for key in kept}:
            raise AdapterError(f"{escape_text(folder)} holds other tensors than are trained")
        with torch.no_grad():
            for name, tensor in trained.items():
                tensor.copy_(kept[name])

    # The best weights

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Our own evaluation; the weights of the best one so far are kept, also where no checkpoint is due."""
        metrics = super().evaluate(*args, **kwargs)
        found_best = self.args.load_best_model_at_end and self._is_best(metrics)
        if found_best or self._stop.asked is not None:
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
        """The step whose weights are kept at the end, where that is not the last one."""
        return self.state.best_global_step if self.args.load_best_model_at_end else None

    def _load_best(self) -> None:
        if self._best_step is not None:
            self._load_weights(self._run.path(self._best_step))

    # Moments of the loop

    def _begin_training(self) -> None:
        if self._resumed_loop is None:
            self._restart_averages(0)
        else:
            self._restart_averages(self._resumed_loop["logged"], self._resumed_loop["loss"])

    def _begin_epoch(self) -> None:
        if self._resumed_loop is not None and not self._epoch_random:
            restore_random_states(self._resumed_loop["epoch_random"])
        self._epoch_random, self._in_epoch = capture_random_states(), True

    def _end_step(self, control: transformers.TrainerControl) -> None:
        control.should_save = control.should_save or self._stop.asked is not None

    def _end_epoch(self, control: transformers.TrainerControl) -> None:
        self._in_epoch = False
        control.should_save = control.should_save or self._is_save_pending or self._stop.asked is not None


class _LoopCallback(transformers.TrainerCallback):
    """Tells a ResumableTrainer where the loop is."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._begin_training()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._begin_epoch()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._end_step(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._end_epoch(control)


def _build_version_error(what: str) -> VerificationError:
    """This version of transformers is not one that checkpoints can be relied on with."""
    hint = "lora_kit is tested with the version in constraints.txt"
    return VerificationError(f"transformers {transformers.__version__} {what}", hint=hint)
