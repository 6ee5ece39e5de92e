"""The training loop with a loss of our own: labels counted over the window, memory that runs out survived."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import transformers
from torch import Tensor, nn

from lora_kit.data.batches import PREFIX_STATES, SAMPLE_WEIGHTS, Collator, EncodedDataset
from lora_kit.data.packing import PackedDataset
from lora_kit.evaluation.loss import LossHead, probe_head
from lora_kit.evaluation.measure import Evaluation, measure
from lora_kit.models.frozen_prefix import PrefixStates, estimate_saved_share
from lora_kit.torch_utils import translate_out_of_memory, use_autocast
from lora_kit.training.loop.frozen_modules import find_modules_without_gradient
from lora_kit.training.loop.length_buckets import count_batch_tokens, split_by_length, trim_batch
from lora_kit.training.loop.oom_retry import Batch, LabelCount, MicroBatches, sum_losses
from lora_kit.training.loop.sharded_base import is_sharded
from lora_kit.training.loop.training_loop import TrainingLoop
from lora_kit.training.prefix.prefix_cache import SamplesWithStates
from lora_kit.training.prefix.prefix_choice import TRAIN, VALIDATION, PrefixCache, PrefixChoice

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.trainer_utils import TrainOutput

logger = logging.getLogger(__name__)

Samples: TypeAlias = EncodedDataset | PackedDataset
"""What can be trained on."""


class Trainer(TrainingLoop):
    """Trains the parameters of a model that require a gradient.

    The loss of a step is the sum over all labels of its accumulation window, divided by their number. Padding, the size
    of a micro-batch and a short last window do not change it. It is computed here, since not every model's own loss
    divides by that number, and since a frozen head needs no logits of the whole batch.

    Args:
        measure_options: arguments of `lora_kit.evaluation.measure.measure` for metrics besides the loss.
        class_weights: of labels that are no tokens; empty where each class has the weight 1.
        prefix_cache: where what frozen layers give is kept; None to compute them in every step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: transformers.TrainingArguments,
        *,
        train: Samples,
        validation: EncodedDataset | None,
        collator: Collator,
        callbacks: Sequence[transformers.TrainerCallback],
        measure_options: Mapping[str, Any] = MappingProxyType({}),
        class_weights: Sequence[float] = (),
        prefix_cache: PrefixCache | None = None,
        **options: Any,
    ) -> None:
        self.autocast_dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        # With a mixed precision accelerate would replace the model's forward and cast all logits to fp32, so autocast
        # is entered here instead. For fp16 accelerate needs to know, since its gradient scaler depends on it.
        args.mixed_precision = "fp16" if args.fp16 else "no"
        self._train, self._validation, self._collator = train, validation, collator
        self._head, self._measure_options = LossHead(None), measure_options
        self._class_weights = class_weights
        self._sample_weights: Tensor | None = None
        self._frozen_modules: list[nn.Module] = []
        self._in_training: _ModelInTraining | None = None
        self._prefix_cache = prefix_cache
        self._prefix_states: dict[str, PrefixStates] = {}
        self._computed_share = 1.0
        self._has_halved = False
        super().__init__(
            model,
            args,
            callbacks=callbacks,
            data_collator=collator,
            train_dataset=train,
            eval_dataset=validation,
            compute_loss_func=self._compute_label_loss,
            **options,
        )
        self._micro = MicroBatches(
            super().micro_batch,
            run=self._forward_and_backward,
            clear_gradients=model.zero_grad,
            on_halved=self._log_halved_batch,
        )

    @property
    def micro_batch(self) -> int:
        """Rows of a forward pass, at most."""
        return self._micro.rows

    def restore_counts(self, counts: Mapping[str, Any]) -> None:
        """Continue from the counts of a checkpoint, with as many rows at once as it had."""
        super().restore_counts(counts)
        self._micro.rows = counts["micro_batch"]

    def measure_validation(self, thresholds: Sequence[float] = ()) -> Evaluation | None:
        """Measure as `lora_kit.evaluation.measure` does; None without validation samples."""
        if self._validation is None:
            return None
        return measure(
            self.model,
            self._validation,
            self._collator,
            batch_size=self.args.per_device_eval_batch_size,
            autocast=self.autocast_dtype,
            thresholds=thresholds,
            peers=self.peers,
            frozen=self._prefix_states.get(VALIDATION),
            **self._measure_options,
        )

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as transformers.Trainer does, after probes of how the loss is computed and what no gradient reaches."""
        self._head = self._find_head()
        with self.compute_loss_context_manager(), self._head.skip():
            self._frozen_modules = find_modules_without_gradient(self.model, self._make_sample())
        self._open_prefix_states()
        return super().train(*args, **kwargs)

    def _open_prefix_states(self) -> None:
        """Have what frozen layers give for each sample computed once, where that pays."""
        if self._prefix_cache is None:
            return
        splits = {TRAIN: self._train, **({} if self._validation is None else {VALIDATION: self._validation})}
        steps, batch = self.args.max_steps, self.args.train_batch_size * self.args.gradient_accumulation_steps
        passes = steps * batch / len(self._train) if steps > 0 else self.args.num_train_epochs
        choice = self.choose_prefix(self._prefix_cache, splits, passes=passes)
        self.frozen = str(choice)
        self._prefix_states = self._prefix_cache.open_states(choice, splits)
        if TRAIN in self._prefix_states:
            self.train_dataset = SamplesWithStates(self._train, self._prefix_states[TRAIN])
            self._computed_share = 1 - estimate_saved_share(self.model, self._prefix_states[TRAIN].prefix)

    def choose_prefix(self, cache: PrefixCache, splits: Mapping[str, Samples], *, passes: float) -> PrefixChoice:
        """Decide whether frozen layers are computed once; `train` finds out which are frozen before its first step.

        Args:
            splits: the samples, by the name of their file.
            passes: how often the training goes through its samples.
        """
        if self.world.size > 1:
            return PrefixChoice(None, "several processes share the rows")
        if self.args.neftune_noise_alpha:
            return PrefixChoice(None, "the noise on the embeddings is another in every step")
        model, autocast = self.model, self.compute_loss_context_manager
        with self._head.skip():  # the probe compares states: all logits of the longest sample take more than a step
            return cache.choose(model, self._frozen_modules, splits, self._collator, passes=passes, autocast=autocast)

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
        states = inputs.pop(PREFIX_STATES, None)
        for module in self._frozen_modules:  # transformers has put the whole model into training mode
            # NEFTune adds its noise behind the embedding, in training mode only. Past `Module.__setattr__`, which takes
            # as long as a small model's forward.
            vars(module)["training"] = hasattr(module, "neftune_noise_alpha")
        handed_on = contextlib.nullcontext() if states is None else self._prefix_states[TRAIN].hand_on(states)
        with self._head.skip(), handed_on:
            return super().compute_loss(self.model_wrapped, inputs, *args, **kwargs)

    def _compute_label_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: LabelCount = None) -> Tensor:
        if num_items_in_batch is None:
            raise RuntimeError("transformers.Trainer did not count the labels of the accumulation window")
        smoothing = self.args.label_smoothing_factor
        loss = self._head.loss(outputs.logits, labels, weights=self._sample_weights, smoothing=smoothing)
        return loss / num_items_in_batch

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> LabelCount:
        """Return what the loss of a step is divided by: the number of labels of all processes, or their weights."""
        count = self._count_labels([batch for batch in batch_samples if batch], device)
        if self.world.size == 1:
            return count
        total = torch.as_tensor(0 if count is None else count, dtype=torch.float64, device=device)
        return self.world.sum(total).float()

    def _count_labels(self, batch_samples: list[Any], device: torch.device) -> LabelCount:
        if self._head.label_loss is None:
            number: LabelCount = super()._get_num_items_in_batch(batch_samples, device)
            return number
        count = self._head.label_loss.count
        counts = [count(batch["labels"], batch.get(SAMPLE_WEIGHTS)) for batch in batch_samples]
        return torch.stack(counts).sum().to(device) if counts else None

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the batches of the next step."""
        self._micro.begin_step()
        return super().get_batch_samples(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: LabelCount = None
    ) -> Tensor:
        """Run forward and backward of a batch; where memory runs out, repeat the step with fewer rows at once."""
        if is_sharded(self.model):
            loss, tokens = self._run_with_others(inputs, num_items_in_batch)
        elif not inputs:  # of a short last batch other processes have all rows
            loss, tokens = torch.zeros_like(self._loss_sum), torch.zeros_like(self._tokens_seen)
        else:
            loss = self._micro.run_batch(inputs, num_items_in_batch)
            tokens = count_batch_tokens(inputs).to(self._tokens_seen.device)
        self._end_batch(loss, tokens)
        return loss

    def _forward_and_backward(self, batch: Batch, label_count: LabelCount) -> Tensor:
        step: Any = super().training_step
        if self._in_training is None or self._in_training.model is not self.model_wrapped:
            self._in_training = _ModelInTraining(self.model_wrapped, but=self._frozen_modules)
        model = self._in_training
        return sum_losses([step(model, part, label_count) for part in self._split(batch)])

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip the gradients of what is trained; to look through the whole model would take as long as a small step."""
        if is_sharded(self.model):
            norm: Tensor = super()._clip_grad_norm(model)
            return norm
        optimizer = self.optimizer
        assert optimizer is not None
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        clipped: Tensor = self.accelerator.clip_grad_norm_(trained, self.args.max_grad_norm)
        return clipped

    def _split(self, batch: Batch) -> list[dict[str, Tensor]]:
        """Return a batch in parts of similar lengths; whole where every forward needs those of all processes."""
        if is_sharded(self.model):
            return [trim_batch(batch)]
        return split_by_length(batch, computed=self._computed_share)

    def _run_with_others(self, inputs: Batch, label_count: LabelCount) -> tuple[Tensor, Tensor]:
        """Run one forward and backward, as every process does; without rows, on one that counts for nothing."""
        hint = "halve train.per_device_train_batch_size and double train.gradient_accumulation_steps"
        what = (
            f"memory ran out with {self.micro_batch} rows at once, which train.fsdp cannot split in one process alone"
        )
        with translate_out_of_memory(what, hint=hint):
            if inputs:
                loss = self._forward_and_backward(inputs, label_count)
                return loss, count_batch_tokens(inputs).to(self._tokens_seen.device)
            loss = self._forward_and_backward(self._collator([self._train[0]]), torch.tensor(math.inf))
            return loss, torch.zeros_like(self._tokens_seen)

    def compute_sample_loss(self, samples: list[dict[str, Tensor]]) -> Tensor:
        """Return the loss of some samples as one micro-batch, summed over labels, with its graph: ()."""
        batch = {name: tensor.to(self.args.device) for name, tensor in self._collator(samples).items()}
        with self.compute_loss_context_manager():
            return sum_losses(
                [self.compute_loss(self.model_wrapped, part, num_items_in_batch=1) for part in self._split(batch)]
            )

    def _log_halved_batch(self, rows: int) -> None:
        """Log it at once, or, where other processes do not know of it yet, when the step is done."""
        self._has_halved = True
        if self.world.size == 1:
            self._log_halving(rows, "memory ran out; it is repeated with")

    def _collect_notes(self) -> list[int]:
        return [*super()._collect_notes(), int(self._has_halved)]

    def _take_notes(self, sums: Sequence[int]) -> None:
        *before, halved = sums
        super()._take_notes(before)
        self._has_halved = False
        if halved:
            rows = min(self.world.gather(self.micro_batch))
            self._log_halving(rows, f"memory ran out in {halved} of {self.world.size} processes; one continues with")

    def _log_halving(self, rows: int, what: str) -> None:
        step, times = self.state.global_step + 1, -(-super().micro_batch // rows)
        accumulation = self.args.gradient_accumulation_steps * times
        logger.warning("step %d: %s %d rows at once (accumulation %d)", step, what, rows, accumulation)
        self.state.log_history.append({"step": step, "micro_batch": rows, "accumulation": accumulation})

    def autocast_smart_context_manager(
        self, cache_enabled: bool | None = True
    ) -> contextlib.AbstractContextManager[object]:
        return use_autocast(self.args.device, self.autocast_dtype)


class _ModelInTraining:
    """Stands for the model in a step of transformers, which puts it into training mode each time, module by module.

    Args:
        model: which is put into training mode where a module is not in it that was after the last time.
        but: modules whose mode is another matter.
    """

    def __init__(self, model: nn.Module, *, but: Sequence[nn.Module]) -> None:
        self.model, self._but = model, but
        self._modules: list[nn.Module] = []

    def train(self) -> None:
        """Put the model into training mode unless it is."""
        if self._modules and all(module.training for module in self._modules):
            return
        self.model.train()
        others = set(self._but)
        self._modules = [module for module in self.model.modules() if module.training and module not in others]
