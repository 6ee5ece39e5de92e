"""What every training loop shares, whoever computes its loss: optimizer groups, counts, evaluations and the log."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers.integrations.neftune import deactivate_neftune

from lora_kit.errors import VerificationError
from lora_kit.evaluation.measure import Evaluation
from lora_kit.evaluation.peers import NO_PEERS, Peers
from lora_kit.torch_utils import read_peak_bytes, use_eval_mode
from lora_kit.training.loop.dealt_batches import deal_batches
from lora_kit.training.loop.learning_rates import ONE_RATE, LearningRates
from lora_kit.training.loop.progress import TrainingProgress
from lora_kit.training.loop.sharded_base import is_sharded
from lora_kit.training.loop.world import ALONE, World

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_EXACT: Final = 4096
"""Tokens are added up in fp32 as multiples of this number and the rest, each of which is exact."""


class TrainingLoop(transformers.Trainer):
    """A transformers.Trainer with our optimizer groups, evaluations and log; a subclass computes the loss.

    The logged loss is the mean over the steps since the last line of the log. A subclass passes the loss and the tokens
    of each batch to `_end_batch`.

    Args:
        args: of one process that has the rows of all.
        rates: learning rates that differ from `args.learning_rate`.
        world: the processes that share the rows of each batch; their gradients are summed before they are clipped.

    Attributes:
        world: the processes.
        evaluations: (step, Evaluation) of each evaluation during training.
        evaluating_seconds: wall time of these evaluations.
        frozen: what became of the frozen layers below the trained ones, in words; None before that is known, and where
            the loop has nothing to choose.
    """

    model: PreTrainedModel
    train_dataset: Any
    autocast_dtype: torch.dtype | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        args: transformers.TrainingArguments,
        *,
        callbacks: Sequence[transformers.TrainerCallback],
        rates: LearningRates = ONE_RATE,
        world: World = ALONE,
        **options: Any,
    ) -> None:
        if getattr(model, "is_quantized", False):
            # Tells transformers that a quantized base has adapters; `preserve_model_settings` removes the mark.
            model._hf_peft_config_loaded = True
        self._progress, self._rates, self.world = TrainingProgress(), rates, world
        super().__init__(model=model, args=args, callbacks=[self._progress, *callbacks], **options)
        # Both callbacks print to standard output.
        self.remove_callback(transformers.ProgressCallback)
        self.remove_callback(transformers.PrinterCallback)
        self._tokens_seen = torch.zeros((), dtype=torch.int64, device=args.device)
        self._loss_sum, self._last_logged_step = torch.zeros((), device=args.device), 0
        self._step_tokens, self._step_loss = torch.zeros_like(self._tokens_seen), torch.zeros_like(self._loss_sum)
        self._speed_baseline = 0, 0.0
        self.evaluations: list[tuple[int, Evaluation]] = []
        self.evaluating_seconds = 0.0
        self.frozen: str | None = None

    @property
    def peers(self) -> Peers:
        """The processes that share an evaluation; of a sharded base each has to run every forward."""
        return NO_PEERS if is_sharded(self.model) else self.world

    @property
    def tokens(self) -> int:
        """Number of tokens that all processes have trained on so far, without padding."""
        return int(self._tokens_seen)

    @property
    def micro_batch(self) -> int:
        """Rows of a forward pass, at most."""
        return -(-self.args.train_batch_size // self.world.size)

    def close(self) -> None:
        """Remove the progress bar from the terminal, and the noise of NEFTune, which a training that failed leaves."""
        self._progress.close()
        handle = getattr(self, "neftune_hook_handle", None)
        if handle is not None:
            deactivate_neftune(self.model, handle)

    def capture_counts(self) -> dict[str, object]:
        """Return what a checkpoint keeps of this loop's own counts, as values that torch.save and a safe load know."""
        return {"micro_batch": self.micro_batch, "tokens": self.tokens}

    def restore_counts(self, counts: Mapping[str, Any]) -> None:
        """Continue from the counts of a checkpoint; see `capture_counts`."""
        self._tokens_seen += counts["tokens"]

    def measure_validation(self, thresholds: Sequence[float] = ()) -> Evaluation | None:
        """Return the metrics of the model as it is on the validation samples; None without any.

        Args:
            thresholds: of labels of which any number may apply; empty for 0.5.
        """
        raise NotImplementedError

    def compute_sample_loss(self, samples: list[dict[str, Tensor]]) -> Tensor:
        """Return the loss of some samples as one micro-batch, with its graph: ()."""
        raise NotImplementedError

    @functools.cached_property
    def _weight_count(self) -> int:
        return self.model.num_parameters(exclude_embeddings=True)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return transformers' estimate for a batch; weights are counted once, not in every step."""
        ids = inputs.get(self.model.main_input_name)
        return 0 if ids is None else 6 * ids.numel() * self._weight_count

    # Several processes

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the batches of the training, of which each process takes its share."""
        loader = super().get_train_dataloader()
        return loader if self.world.size == 1 else deal_batches(loader, self.world)

    def _end_batch(self, loss: Tensor, tokens: Tensor | int) -> None:
        """Count a batch after its backward; after the last one of a step, add up what the processes have."""
        if self.world.size == 1:
            self._loss_sum += loss
            self._tokens_seen += tokens
            return
        self._step_loss += loss
        self._step_tokens += tokens
        if self.accelerator.sync_gradients:
            self._sum_over_processes()

    def _sum_over_processes(self) -> None:
        """Add up the gradients, the loss, the tokens and the notes of a step."""
        loss, tokens = self._step_loss, self._step_tokens
        notes = [torch.tensor(float(note)) for note in self._collect_notes()]
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        numbers = [loss, tokens // _EXACT, tokens % _EXACT, *notes]
        total, high, low, *sums = self.world.sum_gradients(parameters, numbers)
        self._loss_sum += total
        self._tokens_seen += high.long() * _EXACT + low.long()
        self._step_loss, self._step_tokens = torch.zeros_like(loss), torch.zeros_like(tokens)
        self._take_notes([int(note) for note in torch.stack(sums).tolist()] if sums else [])

    def _collect_notes(self) -> list[int]:
        """Return numbers that all processes add up after each step, besides their gradients."""
        return []

    def _take_notes(self, sums: Sequence[int]) -> None:
        """Act on the sums over several processes of what `_collect_notes` returned."""

    # Optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of parameters with weight decay: matrices, not vectors (norms, biases).

        Decided by shape, since an adapter may have any name.
        """
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return transformers' optimizer, with the separate learning rates of the recipe."""
        existed = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if not existed:
            self._rates.apply_to(optimizer, self.model)
        return optimizer

    def evaluate(
        self,
        eval_dataset: Dataset[object] | dict[str, Dataset[object]] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate the validation samples: keep no logits, draw no random number."""
        evaluation = self.measure_validation()
        assert evaluation is not None
        self.evaluations.append((self.state.global_step, evaluation))
        self.evaluating_seconds += evaluation.seconds
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in evaluation.metrics().items()}
        with use_eval_mode(self.model):  # TRL adds the metrics of training to what is logged in training mode
            self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log metrics, and stop the training where a loss is not finite: its result would be useless.

        Raises:
            VerificationError: the loss or the gradient is NaN or infinite.
        """
        if "loss" in logs:
            logs["loss"] = self._loss_sum.item() / (self.state.global_step - self._last_logged_step)
            logs |= self._compute_speed()
            self._restart_averages(self.state.global_step)
        not_finite = [key for key in ("loss", "grad_norm", "train_loss") if not math.isfinite(logs.get(key, 0.0))]
        # fp16 scales the loss: infinite gradients are expected, and the scaler skips their steps.
        if not_finite and not (not_finite == ["grad_norm"] and self.args.fp16):
            raise VerificationError(
                f"{not_finite[0]} became {logs[not_finite[0]]} by step {self.state.global_step}",
                hint="a lower train.learning_rate, a warm-up, or bf16 instead of fp16",
            )
        super().log(logs, start_time)

    def _compute_speed(self) -> dict[str, float]:
        """Return the speed since the last line of the log, without evaluations, and the peak memory so far."""
        tokens, seconds = self.tokens, time.perf_counter() - self.evaluating_seconds
        since_tokens, since_seconds = self._speed_baseline
        return {
            "tokens_per_second": round((tokens - since_tokens) / (seconds - since_seconds), 1),
            "peak_bytes": max(self.world.gather(read_peak_bytes(self.args.device))),
        }

    def _restart_averages(self, step: int, loss: Tensor | None = None) -> None:
        """Restart the means of the log after a step; `loss`: the sum of the losses since then, for a resumed run."""
        self._loss_sum = torch.zeros_like(self._loss_sum) if loss is None else loss.to(self._loss_sum.device)
        self._last_logged_step = step
        self._speed_baseline = self.tokens, time.perf_counter() - self.evaluating_seconds
