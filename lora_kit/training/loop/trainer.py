"""A thin subclass of transformers.Trainer with our own loss, evaluation and log."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset

from lora_kit.data.batches import SAMPLE_WEIGHTS, Collator, EncodedDataset
from lora_kit.data.packing import PackedDataset
from lora_kit.errors import VerificationError
from lora_kit.evaluation.loss import LossHead, probe_head
from lora_kit.evaluation.measure import Evaluation, measure
from lora_kit.torch_utils import read_peak_bytes, use_autocast
from lora_kit.training.loop.frozen_modules import find_modules_without_gradient
from lora_kit.training.loop.learning_rates import ONE_RATE, LearningRates
from lora_kit.training.loop.length_buckets import count_batch_tokens, split_by_length
from lora_kit.training.loop.oom_retry import Batch, LabelCount, MicroBatches, sum_losses
from lora_kit.training.loop.progress import TrainingProgress

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.trainer_utils import TrainOutput

logger = logging.getLogger(__name__)

Samples: TypeAlias = EncodedDataset | PackedDataset
"""What can be trained on."""


class Trainer(transformers.Trainer):
    """Trains the parameters of a model that require a gradient.

    The loss of a step is the sum over all labels of its accumulation window, divided by their number. Padding, the size
    of a micro-batch and a short last window do not change it. It is computed here, since not every model's own loss
    divides by that number, and since a frozen head needs no logits of the whole batch. The logged loss is the mean over
    the steps since the last line of the log.

    Args:
        rates: learning rates that differ from `args.learning_rate`.
        measure_options: arguments of `lora_kit.evaluation.measure.measure` for metrics besides the loss.
        class_weights: of labels that are no tokens; empty where each class has the weight 1.

    Attributes:
        tokens: number of tokens trained on so far, without padding.
        evaluations: (step, Evaluation) of each evaluation during training.
        evaluating_seconds: wall time of these evaluations.
    """

    model: PreTrainedModel

    def __init__(
        self,
        model: PreTrainedModel,
        args: transformers.TrainingArguments,
        *,
        train: Samples,
        validation: EncodedDataset | None,
        collator: Collator,
        callbacks: Sequence[transformers.TrainerCallback],
        rates: LearningRates = ONE_RATE,
        measure_options: Mapping[str, Any] = MappingProxyType({}),
        class_weights: Sequence[float] = (),
    ) -> None:
        self.autocast_dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        # With a mixed precision accelerate would replace the model's forward and cast all logits to fp32, so autocast
        # is entered here instead. For fp16 accelerate needs to know, since its gradient scaler depends on it.
        args.mixed_precision = "fp16" if args.fp16 else "no"
        if getattr(model, "is_quantized", False):
            # Tells transformers that a quantized base has adapters; `preserve_model_settings` removes the mark.
            model._hf_peft_config_loaded = True
        self._progress = TrainingProgress()
        self._train, self._validation, self._collator = train, validation, collator
        self._head, self._rates, self._measure_options = LossHead(None), rates, measure_options
        self._class_weights = class_weights
        self._sample_weights: Tensor | None = None
        self._frozen_modules: list[nn.Module] = []
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train,
            eval_dataset=validation,
            compute_loss_func=self._compute_label_loss,
            callbacks=[self._progress, *callbacks],
        )
        # Both callbacks print to standard output.
        self.remove_callback(transformers.ProgressCallback)
        self.remove_callback(transformers.PrinterCallback)
        self._tokens_seen = torch.zeros((), dtype=torch.int64, device=args.device)
        self._loss_sum, self._last_logged_step = torch.zeros((), device=args.device), 0
        self._speed_baseline = 0, 0.0
        self._micro = MicroBatches(
            args.train_batch_size,
            run=self._forward_and_backward,
            clear_gradients=model.zero_grad,
            on_halved=self._log_halved_batch,
        )
        self.evaluations: list[tuple[int, Evaluation]] = []
        self.evaluating_seconds = 0.0

    @property
    def tokens(self) -> int:
        return int(self._tokens_seen)

    @property
    def micro_batch(self) -> int:
        """Rows of a forward pass, at most."""
        return self._micro.rows

    def close(self) -> None:
        """Remove the progress bar from the terminal."""
        self._progress.close()

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as transformers.Trainer does, after probes of how the loss is computed and what no gradient reaches."""
        self._head = self._find_head()
        with self.compute_loss_context_manager():
            self._frozen_modules = find_modules_without_gradient(self.model, self._make_sample())
        return super().train(*args, **kwargs)

    def _make_sample(self) -> dict[str, Tensor]:
        """Return the first row as inputs of the model, without labels."""
        batch = self._collator([self._train[0]]).items()
        return {name: tensor.to(self.args.device) for name, tensor in batch if name not in ("labels", SAMPLE_WEIGHTS)}

    def _find_head(self) -> LossHead:
        with self.compute_loss_context_manager():
            sample, weights = self._make_sample(), self._class_weights
            head = probe_head(self.model, sample, kind=self._train.kind, class_weights=weights)
        if head.linear is None:
            logger.info("the loss is computed from the model's logits: %s", head.reason)
        else:
            logger.info("the head is frozen: the loss is computed in chunks of its logits")
        return head

    def compute_loss(self, model: nn.Module, inputs: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        inputs = dict(inputs)
        self._sample_weights = inputs.pop(SAMPLE_WEIGHTS, None)
        for module in self._frozen_modules:  # transformers has put the whole model into training mode
            module.training = False
        with self._head.skip():
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _compute_label_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: LabelCount = None) -> Tensor:
        if num_items_in_batch is None:
            raise RuntimeError("transformers.Trainer did not count the labels of the accumulation window")
        smoothing = self.args.label_smoothing_factor
        loss = self._head.loss(outputs.logits, labels, weights=self._sample_weights, smoothing=smoothing)
        return loss / num_items_in_batch

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> LabelCount:
        """Return what the loss of an accumulation window is divided by: the number of its labels, or their weights."""
        if self._head.label_loss is None:
            count: LabelCount = super()._get_num_items_in_batch(batch_samples, device)
            return count
        counts = [self._head.label_loss.count(batch["labels"], batch.get(SAMPLE_WEIGHTS)) for batch in batch_samples]
        return torch.stack(counts).sum().to(device) if counts else None

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the batches of the next step."""
        self._micro.begin_step()
        return super().get_batch_samples(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: LabelCount = None
    ) -> Tensor:
        """Run forward and backward of a batch; where memory runs out, repeat the step with fewer rows at once."""
        loss = self._micro.run_batch(inputs, num_items_in_batch)
        self._tokens_seen += count_batch_tokens(inputs).to(self._tokens_seen.device)
        self._loss_sum += loss
        return loss

    def _forward_and_backward(self, batch: Batch, label_count: LabelCount) -> Tensor:
        step, model = super().training_step, self.model_wrapped
        return sum_losses([step(model, part, label_count) for part in split_by_length(batch)])

    def compute_sample_loss(self, samples: list[dict[str, Tensor]]) -> Tensor:
        """Return the loss of some samples as one micro-batch, summed over labels, with its graph: ()."""
        batch = {name: tensor.to(self.args.device) for name, tensor in self._collator(samples).items()}
        with self.compute_loss_context_manager():
            return sum_losses(
                [self.compute_loss(self.model_wrapped, part, num_items_in_batch=1) for part in split_by_length(batch)]
            )

    def _log_halved_batch(self, rows: int) -> None:
        step, times = self.state.global_step + 1, -(-self.args.train_batch_size // rows)
        accumulation = self.args.gradient_accumulation_steps * times
        message = "step %d: memory ran out; it is repeated with %d rows at once (accumulation %d)"
        logger.warning(message, step, rows, accumulation)
        self.state.log_history.append({"step": step, "micro_batch": rows, "accumulation": accumulation})

    def autocast_smart_context_manager(
        self, cache_enabled: bool | None = True
    ) -> contextlib.AbstractContextManager[Any]:
        return use_autocast(self.args.device, self.autocast_dtype)

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
        eval_dataset: Dataset[Any] | dict[str, Dataset[Any]] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate as `lora_kit.evaluation.measure` does: keep no logits, draw no random number."""
        dataset = self._validation if eval_dataset is None else eval_dataset
        assert isinstance(dataset, EncodedDataset)
        evaluation = measure(
            self.model,
            dataset,
            self._collator,
            batch_size=self.args.eval_batch_size,
            autocast=self.autocast_dtype,
            **self._measure_options,
        )
        self.evaluations.append((self.state.global_step, evaluation))
        self.evaluating_seconds += evaluation.seconds
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in evaluation.metrics().items()}
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
            "peak_bytes": read_peak_bytes(self.args.device),
        }

    def _restart_averages(self, step: int, loss: Tensor | None = None) -> None:
        """Restart the means of the log after a step; `loss`: the sum of the losses since then, for a resumed run."""
        self._loss_sum = torch.zeros_like(self._loss_sum) if loss is None else loss.to(self._loss_sum.device)
        self._last_logged_step = step
        self._speed_baseline = self.tokens, time.perf_counter() - self.evaluating_seconds
