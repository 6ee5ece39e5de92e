"""The Trainer that writes checkpoints and goes on from one, to the same bytes as a run that was never stopped."""

from __future__ import annotations

import logging
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer_callback import ExportableState, TrainerState

from lora_kit.errors import AdapterError, VerificationError
from lora_kit.files import printable
from lora_kit.train.checkpoints import Checkpoint, Identity, RunFolder
from lora_kit.train.trainer import Trainer

logger = logging.getLogger(__name__)

WEIGHTS, LOOP, STATE = "weights.safetensors", "loop.pt", "trainer_state.json"


class ResumableTrainer(Trainer):
    """A Trainer whose checkpoints hold the trained tensors and everything else that decides how training goes on.

    What transformers leaves out is added: the loss since the last line of the log, the random states at the beginning
    of the epoch, from which the order of the samples follows, the counts of the report, and a moment to save at which
    nothing of the epoch is left to do.

    Args:
        run: where the checkpoints are.
        identity, setting: of the run, see `lora_kit.train.checkpoints`.

    Attributes:
        seconds_before: wall time of the training up to the checkpoint it went on from.
        resumed: step of that checkpoint; 0 for a run from the beginning.
    """

    def __init__(self, *args: Any, run: RunFolder, identity: Identity, setting: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._run, self._identity, self._setting = run, identity, setting
        self.args.restore_callback_states_from_checkpoint = True
        self.seconds_before, self.resumed = 0.0, 0
        self._went_on_from: dict[str, Any] | None = None
        self._epoch_random: dict[str, Any] = {}
        self._in_epoch = self._owed = False
        self._started = 0.0
        self.add_callback(_Moments(self))

    def train_from(self, checkpoint: Checkpoint | None) -> None:
        """Train, from where a checkpoint stands or from the beginning."""
        self._started = time.perf_counter()
        if checkpoint is None:
            self.train()
            return
        logger.info("going on from step %d in %s", checkpoint.step, printable(checkpoint.folder))
        loop = torch.load(checkpoint.folder / LOOP, map_location="cpu", weights_only=True)
        self.resumed, self.seconds_before = checkpoint.step, loop["seconds"]
        self._seen += loop["tokens"]
        if checkpoint.finished:
            self._load_weights(checkpoint.folder)
            self.state = TrainerState.load_from_json(str(checkpoint.folder / STATE))
            if self._best is not None:
                self._load_best_model()
            return
        self._went_on_from = loop
        self.args.eval_on_start = False
        self.train(resume_from_checkpoint=str(checkpoint.folder))

    # Writing: called by transformers.Trainer

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint of the step that has just ended.

        At the end of an epoch or of the training it is put off until what is logged and evaluated then is done: a run
        that goes on from it begins with the next epoch.
        """
        if self._in_epoch and (self.control.should_training_stop or self._epoch_is_over):
            self._owed = True
            return
        self._owed = False
        self._check_weights()
        self._find_best()
        self._run.write(
            self._fill,
            keep=self.args.save_total_limit,
            step=self.state.global_step,
            best=self._best,
            finished=self.control.should_training_stop,
            identity=self._identity,
            setting=self._setting,
        )

    @property
    def _epoch_is_over(self) -> bool:
        return float(self.state.epoch or 0).is_integer()

    def _check_weights(self) -> None:
        broken = [name for name, tensor in self._trained().items() if not torch.isfinite(tensor).all()]
        if broken:
            raise VerificationError(
                f"{broken[0]} is not finite by step {self.state.global_step}", hint="a lower train.learning_rate"
            )

    def _fill(self, folder: Path) -> None:
        weights = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                   for name, tensor in self._trained().items()}  # fmt: skip
        save_file(weights, folder / WEIGHTS)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        told: list[Any] = [*self.callback_handler.callbacks, self.control]
        stateful: list[Any] = [each for each in told if isinstance(each, ExportableState)]
        self.state.stateful_callbacks = TrainerState(stateful_callbacks=stateful).stateful_callbacks
        self.state.save_to_json(str(folder / STATE))
        now = random_states()
        loop = {
            "random": now,
            "epoch_random": now if self._epoch_is_over else self._epoch_random,
            "loss": self._tr_loss.detach().cpu(),
            "logged": self._globalstep_last_logged,
            "tokens": self.tokens,
            "seconds": self.seconds_before + time.perf_counter() - self._started - self.evaluating_seconds,
        }
        torch.save(loop, folder / LOOP)

    def _trained(self) -> dict[str, Tensor]:
        model: Any = self.model
        return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}

    # Reading: called by transformers.Trainer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._load_weights(Path(resume_from_checkpoint))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether an evaluation is the best so far; then it is kept, also where no checkpoint is due."""
        better = super()._determine_best_metric(metrics, trial)
        if better and self.args.load_best_model_at_end:
            self.control.should_save = True
        return better

    def _load_best_model(self) -> None:
        assert self._best is not None
        self._load_weights(self._run.path(self._best))

    def _load_weights(self, folder: Path) -> None:
        trained, kept = self._trained(), load_file(folder / WEIGHTS)
        if {name: tensor.shape for name, tensor in trained.items()} != {key: kept[key].shape for key in kept}:
            raise AdapterError(f"{printable(folder)} holds other tensors than are trained")
        with torch.no_grad():
            for name, tensor in trained.items():
                tensor.copy_(kept[name])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._went_on_from is not None:
            set_random_states(self._went_on_from["random"])

    @property
    def kept(self) -> int:
        """The step whose weights the model has after training."""
        return self.state.global_step if self._best is None else self._best

    @property
    def _best(self) -> int | None:
        """The step whose weights are kept at the end, where that is not the last one."""
        return self.state.best_global_step if self.args.load_best_model_at_end else None

    def _find_best(self) -> None:
        """Tell transformers where the best checkpoint is; a run folder may have moved since the state was written."""
        self.state.best_model_checkpoint = None if self._best is None else str(self._run.path(self._best))

    # Moments of the loop

    def _begin_training(self) -> None:
        if self._went_on_from is not None:
            self._tr_loss = self._went_on_from["loss"].to(self.args.device)
            self._globalstep_last_logged = self._went_on_from["logged"]
            self._find_best()

    def _begin_epoch(self) -> None:
        if self._went_on_from is not None and not self._epoch_random:
            set_random_states(self._went_on_from["epoch_random"])
        self._epoch_random, self._in_epoch = random_states(), True

    def _end_epoch(self, control: transformers.TrainerControl) -> None:
        self._in_epoch = False
        control.should_save = control.should_save or self._owed


class _Moments(transformers.TrainerCallback):
    """Tells a ResumableTrainer where the loop is."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._begin_training()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._begin_epoch()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._end_epoch(control)


def random_states() -> dict[str, Any]:
    """The states of the global generators of torch, its CUDA devices, numpy and Python, as plain values and tensors."""
    state: Any = np.random.get_state()
    name, keys, *rest = state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put all generators into states that `random_states` gave."""
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
