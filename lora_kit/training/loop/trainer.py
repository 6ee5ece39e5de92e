"""A thin subclass of transformers.Trainer: our loss, our evaluation, our log."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import transformers
from torch import Tensor

from lora_kit.data.batches import Collator, EncodedDataset
from lora_kit.data.packing import PackedDataset
from lora_kit.errors import VerificationError
from lora_kit.evaluation.loss import LossHead, probe_head
from lora_kit.evaluation.measure import Evaluation, measure
from lora_kit.torch_utils import read_peak_bytes, use_autocast
from lora_kit.training.loop.learning_rates import ONE_RATE, LearningRates
from lora_kit.training.loop.length_buckets import count_batch_tokens, split_by_length
from lora_kit.training.loop.oom_retry import Batch, MicroBatches, sum_losses
from lora_kit.training.loop.progress import Progress

logger = logging.getLogger(__name__)


class Trainer(transformers.Trainer):
    """Trains whatever parameters of a model require a gradient.

    The loss of a step is the sum over all labels of its accumulation window, divided by their number: neither padding
    nor the size of a micro-batch changes it, nor a last window that is short. It is computed here, since not every
    model's own loss divides by that number, and a frozen head needs no logits of the whole batch. So it is for the log:
    what it says is the mean over the steps since the last line.

    Args:
        rates: of what does not learn at `args.learning_rate`.
        measured: what `lora_kit.evaluation.measure.measure` is asked for besides the loss.

    Attributes:
        tokens: tokens trained on so far, padding left out.
        evaluations: (step, Evaluation) of the evaluations made during training.
        evaluating_seconds: wall time spent in them.
    """

    model: transformers.PreTrainedModel

    def __init__(
        self,
        model: Any,
        args: transformers.TrainingArguments,
        *,
        train: EncodedDataset | PackedDataset,
        validation: EncodedDataset | None,
        collator: Collator,
        callbacks: list[transformers.TrainerCallback],
        rates: LearningRates = ONE_RATE,
        measured: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.autocast_dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        # Accelerate would replace the model's forward and turn all logits into fp32; autocast is entered here instead.
        # For fp16 it must, since its gradient scaler hangs on that.
        args.mixed_precision = "fp16" if args.fp16 else "no"
        if getattr(model, "is_quantized", False):
            # How transformers knows that a quantised base has adapters on it; `borrowed` takes the mark off again.
            model._hf_peft_config_loaded = True
        self._progress = Progress()
        self._train, self._validation, self._collator = train, validation, collator
        self._head, self._rates, self._measure_options = LossHead(None), rates, measured
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train,
            eval_dataset=validation,
            compute_loss_func=self._compute_label_loss,
            callbacks=[self._progress, *callbacks],
        )
        # Both print to standard output.
        self.remove_callback(transformers.ProgressCallback)
        self.remove_callback(transformers.PrinterCallback)
        self._tokens_seen = torch.zeros((), dtype=torch.int64, device=args.device)
        self._loss_sum, self._last_logged_step = torch.zeros((), device=args.device), 0
        self._speed_baseline = 0, 0.0
        self._micro = MicroBatches(
            args.train_batch_size, work=self._forward_and_backward, clear=model.zero_grad, said=self._log_halved_batch
        )
        self.evaluations: list[tuple[int, Evaluation]] = []
        self.evaluating_seconds = 0.0

    @property
    def tokens(self) -> int:
        return int(self._tokens_seen)

    @property
    def micro_batch(self) -> int:
        """Rows that go through the model at once."""
        return self._micro.rows

    def close(self) -> None:
        """Take the progress bar off the terminal."""
        self._progress.close()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, after it has been found out how the loss is to be taken."""
        self._head = self._find_head()
        return super().train(*args, **kwargs)

    def _find_head(self) -> LossHead:
        sample = {name: tensor.to(self.args.device) for name, tensor in self._collator([self._train[0]]).items()}
        del sample["labels"]
        with self.compute_loss_context_manager():
            head = probe_head(self.model, sample, kind=self._train.kind)
        if head.linear is None:
            logger.info("the loss is taken from the model's logits: %s", head.reason)
        else:
            logger.info("the head is frozen: the loss is taken in chunks of its logits")
        return head

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with self._head.left_out():
            return super().compute_loss(*args, **kwargs)

    def _compute_label_loss(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if num_items_in_batch is None:
            raise RuntimeError("transformers.Trainer did not count the labels of the accumulation window")
        smoothing = self.args.label_smoothing_factor
        return self._head.loss(outputs.logits, labels, smoothing=smoothing) / num_items_in_batch

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of the next step."""
        self._micro.begin()
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a batch; where memory runs out, the step is done again with fewer rows at once."""
        loss = self._micro.run_batch(inputs, num_items_in_batch)
        self._tokens_seen += count_batch_tokens(inputs).to(self._tokens_seen.device)
        self._loss_sum += loss
        return loss

    def _forward_and_backward(self, batch: Batch, count: Any) -> Tensor:
        step, model = super().training_step, self.model_wrapped
        return sum_losses([step(model, part, count) for part in split_by_length(batch)])

    def loss_of(self, samples: list[dict[str, Tensor]]) -> Tensor:
        """The loss of some samples as one micro-batch has it, summed over labels, with its graph."""
        batch = {name: tensor.to(self.args.device) for name, tensor in self._collator(samples).items()}
        with self.compute_loss_context_manager():
            return sum_losses(
                [self.compute_loss(self.model_wrapped, part, num_items_in_batch=1) for part in split_by_length(batch)]
            )

    def _log_halved_batch(self, rows: int) -> None:
        step, times = self.state.global_step + 1, -(-self.args.train_batch_size // rows)
        accumulation = self.args.gradient_accumulation_steps * times
        logger.warning(
            "step %d: memory ran out; it is done again with %d rows at once (accumulation %d)", step, rows, accumulation
        )
        self.state.log_history.append({"step": step, "micro_batch": rows, "accumulation": accumulation})

    def autocast_smart_context_manager(
        self, cache_enabled: bool | None = True
    ) -> contextlib.AbstractContextManager[Any]:
        return use_autocast(self.args.device, self.autocast_dtype)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Matrices decay, vectors (norms, biases) do not: by shape, since an adapter may be called anything."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """transformers' own, with rates of their own for what the recipe gives one."""
        made_before = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if not made_before:
            self._rates.apply_to(optimizer, self.model)
        return optimizer

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Our own evaluation: the mean over labels, no logits kept, no random number drawn."""
        dataset = self._validation if eval_dataset is None else eval_dataset
        assert dataset is not None
        found = measure(
            self.model,
            dataset,
            self._collator,
            batch_size=self.args.eval_batch_size,
            autocast=self.autocast_dtype,
            **self._measure_options,
        )
        self.evaluations.append((self.state.global_step, found))
        self.evaluating_seconds += found.seconds
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in found.metrics().items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and stop where a loss is not finite: nothing that could be saved would be worth it.

        Raises:
            VerificationError: the loss or the gradient is NaN or infinite.
        """
        if "loss" in logs:
            logs["loss"] = self._loss_sum.item() / (self.state.global_step - self._last_logged_step)
            logs |= self._compute_speed()
            self._restart_averages(self.state.global_step)
        broken = [key for key in ("loss", "grad_norm", "train_loss") if not math.isfinite(logs.get(key, 0.0))]
        # fp16 scales the loss: an infinite gradient is expected there, and skipped by the scaler.
        if broken and not (broken == ["grad_norm"] and self.args.fp16):
            raise VerificationError(
                f"{broken[0]} became {logs[broken[0]]} by step {self.state.global_step}",
                hint="a lower train.learning_rate, a warm-up, or bf16 instead of fp16",
            )
        super().log(logs, start_time)

    def _compute_speed(self) -> dict[str, float]:
        """How fast it went since the last line, evaluations left out, and the most memory so far."""
        tokens, seconds = self.tokens, time.perf_counter() - self.evaluating_seconds
        since_tokens, since_seconds = self._speed_baseline
        return {
            "tokens_per_second": round((tokens - since_tokens) / (seconds - since_seconds), 1),
            "peak_bytes": read_peak_bytes(self.args.device),
        }

    def _restart_averages(self, step: int, loss: Tensor | None = None) -> None:
        """Begin the mean of the loss anew after a step; `loss`: what has come together since."""
        self._loss_sum = torch.zeros_like(self._loss_sum) if loss is None else loss.to(self._loss_sum.device)
        self._last_logged_step = step
        self._speed_baseline = self.tokens, time.perf_counter() - self.evaluating_seconds
