"""TRL's trainers with our checkpoints, evaluations and log: each computes the loss of its objective.

Rows are encoded by `lora_kit.data.preference_samples`, so these trainers are given tokens. The reference is the model
that is trained, without its adapter: no second model is loaded or copied. This module imports TRL.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import datasets  # type: ignore[import-untyped]
import torch
import trl
from torch import Tensor, nn
from torch.utils.data import Dataset

from lora_kit.data.preference_samples import PreferenceDataset
from lora_kit.data.prompt_samples import PromptDataset
from lora_kit.errors import StorageError
from lora_kit.evaluation.measure import Evaluation
from lora_kit.evaluation.peers import average_batches, merge_results, share_work
from lora_kit.torch_utils import is_out_of_memory, use_eval_mode
from lora_kit.training.loop.oom_retry import LabelCount
from lora_kit.training.loop.resumable import ResumableLoop
from lora_kit.training.recipe.objectives import DPO, KTO, ORPO, REWARD, TRL_OBJECTIVES, load_trl_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from lora_kit.models.protocols import Tokenizer


class PreferenceLoop(ResumableLoop):
    """What the loops of all objectives add to a trainer of TRL.

    A batch is not repeated with fewer rows where memory runs out: the loss of some objectives depends on the batch.

    Args:
        train: the training samples.
        validation: the validation samples; None without any.
        tokenizer: of the model.
    """

    objective: str
    """The name of the objective, set by each class."""
    eval_dataset: Any
    _metrics: Any

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        train: Dataset[dict[str, object]],
        validation: PreferenceDataset | PromptDataset | None,
        tokenizer: Tokenizer,
        **options: Any,
    ) -> None:
        with _hide_quantization(model), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, about arguments that TRL sets
            super().__init__(
                model,
                args,
                train_dataset=self.build_dataset(train),
                eval_dataset=None if validation is None else self.build_dataset(validation),
                processing_class=tokenizer,
                **options,
            )
        # In the last batch of an epoch it would cut the rows of any batch, of an evaluation too, to that one's size.
        self.accelerator.gather_for_metrics = self.accelerator.gather
        self._row_shares: list[float] = []
        self._share = 1.0
        self._answer_tokens = 0 if validation is None else validation.num_labels

    def _send_telemetry(self) -> None:
        """Send nothing: TRL would report the class of the model and of the device to its hub."""

    def build_dataset(self, samples: Any) -> datasets.Dataset:
        """Return samples as TRL takes them."""
        rows = [samples[index] for index in range(len(samples))]
        return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]})

    def _prepare_dataset(self, dataset: datasets.Dataset, *args: object, **kwargs: object) -> datasets.Dataset:
        """Return the data set as it is: its rows are tokens."""
        return dataset

    # What TRL counts between two lines of the log

    def _get_metrics(self, mode: str) -> dict[str, list[float]]:
        """Return TRL's own store of metrics, by name, of the mode `train` or `eval`."""
        metrics: dict[str, list[float]] = self._metrics[mode]
        return metrics

    def capture_counts(self) -> dict[str, object]:
        """Return the counts of a checkpoint, with the metrics that the next line of the log is a mean of."""
        metrics = {name: list(values) for name, values in self._get_metrics("train").items()}
        seen = getattr(self, "_total_train_tokens", 0)
        return {**super().capture_counts(), "trl": {"metrics": metrics, "tokens": seen}}

    def restore_counts(self, counts: Mapping[str, Any]) -> None:
        """Continue from the counts of a checkpoint."""
        super().restore_counts(counts)
        self._get_metrics("train").update(counts["trl"]["metrics"])
        if hasattr(self, "_total_train_tokens"):
            self._total_train_tokens = counts["trl"]["tokens"]

    # Steps

    def training_step(
        self, model: nn.Module, inputs: dict[str, object], num_items_in_batch: LabelCount = None
    ) -> Tensor:
        """Run forward and backward of a batch.

        Raises:
            StorageError: there is not enough memory for it.
        """
        share = self._row_shares.pop(0) if self._row_shares else 1.0
        if not inputs:  # of a short last batch other processes have all rows
            loss = torch.zeros_like(self._loss_sum)
            self._end_batch(loss, 0)
            return loss
        try:
            with self._weigh_loss(share):
                loss = super().training_step(model, inputs, num_items_in_batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            hint = "halve train.per_device_train_batch_size and double train.gradient_accumulation_steps"
            what = f"memory ran out with {self.micro_batch} rows at once, which objective {self.objective} cannot split"
            raise StorageError(what, hint=hint) from error
        self._end_batch(loss, self.count_tokens(inputs))
        return loss

    def count_tokens(self, inputs: Any) -> Tensor | int:
        """Return the tokens of a batch that was computed, without padding."""
        return _count_tokens(inputs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the batches of the next step; note how large this process's shares of their rows are."""
        batches, labels = super().get_batch_samples(*args, **kwargs)
        if self.world.size > 1:
            rows = [float(len(batch["input_ids"]) if batch else 0) for batch in batches]
            own = torch.tensor(rows, device=self.args.device)
            self._row_shares = (own / self.world.sum(own)).tolist()
        return batches, labels

    @contextlib.contextmanager
    def _weigh_loss(self, share: float) -> Iterator[None]:
        """Let the loss of a batch count by this process's share of its rows: it is a mean over them."""
        self._share = share
        try:
            yield
        finally:
            self._share = 1.0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss of a batch."""
        loss = super().compute_loss(*args, **kwargs)
        if self._share == 1.0:
            return loss
        return (loss[0] * self._share, *loss[1:]) if isinstance(loss, tuple) else loss * self._share

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log metrics; what TRL has counted is that of all processes."""
        if self.world.size > 1 and "loss" in logs:
            self._merge_metrics()
        super().log(logs, start_time)

    def _merge_metrics(self) -> None:
        metrics = self._get_metrics("train")
        each = self.world.gather({name: list(values) for name, values in metrics.items()})
        for name in {name for values in each for name in values}:
            values = [value for process in each for value in process.get(name, [])]
            metrics[name] = [sum(values)] if name == "num_tokens" else values

    def compute_sample_loss(self, samples: list[dict[str, Tensor]]) -> Tensor:
        """Return the loss of some samples as one batch, with its graph: ()."""
        inputs = self._prepare_inputs(self.data_collator(samples))
        with self.compute_loss_context_manager():
            loss = self.compute_loss(self.model_wrapped, inputs)
        assert isinstance(loss, Tensor)
        return loss

    # Evaluation

    def measure_validation(self, thresholds: Sequence[float] = ()) -> Evaluation | None:
        """Return the loss and the metrics of the objective as means over all validation rows; None without any."""
        if self.eval_dataset is None:
            return None
        started = time.perf_counter()
        measured: dict[int, dict[str, tuple[float, float]]] = {}
        with use_eval_mode(self.model), torch.no_grad(), _preserve_values(self._get_metrics("eval")):
            for number, rows in share_work(self._iterate_validation(), self.world):
                measured[number] = self._measure_batch(rows)
        means = average_batches(merge_results(measured, self.world))
        return Evaluation(
            loss=means.pop("loss"),
            labels=self._answer_tokens,
            samples=len(self.eval_dataset),
            further=self._complete_metrics(means),
            seconds=time.perf_counter() - started,
        )

    def _iterate_validation(self) -> Iterator[list[dict[str, object]]]:
        size = self.args.per_device_eval_batch_size
        for start in range(0, len(self.eval_dataset), size):
            yield [self.eval_dataset[index] for index in range(start, min(start + size, len(self.eval_dataset)))]

    def _measure_batch(self, rows: list[dict[str, object]]) -> dict[str, tuple[float, float]]:
        """Return the loss and the metrics of some rows, each with its weight in the mean over all rows."""
        metrics = self._get_metrics("eval")
        metrics.clear()
        inputs = self.collate_validation(rows)
        loss, _, _ = self.prediction_step(self.model, inputs, prediction_loss_only=True)
        assert loss is not None
        values = {name.removeprefix("eval_"): each[-1] for name, each in metrics.items()}
        known = TRL_OBJECTIVES[self.objective].metrics
        measured = {name: (value, self._weigh(name, rows)) for name, value in values.items() if name in known}
        return {"loss": (float(loss), float(len(rows))), **measured}

    def collate_validation(self, rows: list[dict[str, object]]) -> Any:
        """Return some validation rows as the batch that `prediction_step` takes."""
        return self._prepare_inputs(self.data_collator(rows))

    def _weigh(self, name: str, rows: Sequence[Mapping[str, object]]) -> float:
        """Return how much the metric of a batch counts in the mean over all."""
        return float(len(rows))

    def _complete_metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics of all rows, in the order of the objective's table."""
        return {name: means[name] for name in TRL_OBJECTIVES[self.objective].metrics if name in means}


class DpoLoop(PreferenceLoop, trl.DPOTrainer):
    """Direct preference optimization: Rafailov et al. 2023, arXiv:2305.18290."""

    objective = DPO


class KtoLoop(PreferenceLoop, trl.KTOTrainer):
    """Kahneman-Tversky optimization: Ethayarajh et al. 2024, arXiv:2402.01306."""

    objective = KTO

    def _prepare_dataset(self, dataset: datasets.Dataset, *args: object, **kwargs: object) -> datasets.Dataset:
        """Return the data set with the answers that the KL term is estimated from.

        These are the answers of the same batch, each with the prompt of its neighbor, as in TRL.
        """
        if not self.calculate_KL:
            return dataset
        size = self.args_of_loop.per_device_train_batch_size
        answers = dataset["completion_ids"][:]
        blocks = [answers[start : start + size] for start in range(0, len(answers), size)]
        rotated = [answer for block in blocks for answer in [block[-1], *block[:-1]]]
        return dataset.add_column("KL_completion_ids", rotated)

    def __init__(self, model: PreTrainedModel, args: TrainingArguments, **options: Any) -> None:
        self.args_of_loop = args  # its data sets are prepared before transformers sets `args`
        super().__init__(model, args, **options)

    def _weigh(self, name: str, rows: Sequence[Mapping[str, Any]]) -> float:
        if name == "rewards/chosen":
            return float(sum(row["label"] for row in rows))
        return float(sum(not row["label"] for row in rows)) if name == "rewards/rejected" else float(len(rows))

    def _complete_metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics with the margin of all rows: most batches have too few of both kinds for one."""
        values = {name: value for name, value in means.items() if name != "rewards/margins"}
        if "rewards/chosen" in values and "rewards/rejected" in values:
            values["rewards/margins"] = values["rewards/chosen"] - values["rewards/rejected"]
        return super()._complete_metrics(values)


class RewardLoop(PreferenceLoop, trl.RewardTrainer):
    """A head that scores answers: Bradley and Terry 1952."""

    objective = REWARD

    def _prepare_dataset(self, dataset: datasets.Dataset, *args: object, **kwargs: object) -> datasets.Dataset:
        """Return prompts and answers joined, as the model reads them."""
        columns = {
            f"{side}_ids": [[*row["prompt_ids"], *row[f"{side}_ids"]] for row in dataset]
            for side in ("chosen", "rejected")
        }
        return datasets.Dataset.from_dict(columns)


class OrpoLoop(PreferenceLoop, load_trl_class(ORPO, "ORPOTrainer")):  # type: ignore[misc]
    """Odds ratio preference optimization, which has no reference: Hong et al. 2024, arXiv:2403.07691."""

    objective = ORPO

    def _get_metrics(self, mode: str) -> dict[str, list[float]]:
        metrics: dict[str, list[float]] = self._stored_metrics[mode]
        return metrics

    def tokenize_row(self, feature: Mapping[str, Any], *args: object, **kwargs: object) -> dict[str, object]:
        """Return a row, whose columns are tokens already, in the columns of TRL's collator."""
        prompt = feature["prompt_ids"]
        row: dict[str, object] = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side in ("chosen", "rejected"):
            answer = feature[f"{side}_ids"]
            row[f"{side}_input_ids"] = [*prompt, *answer]
            row[f"{side}_attention_mask"] = [1] * (len(prompt) + len(answer))
            row[f"{side}_labels"] = [-100] * len(prompt) + answer
        return row


LOOPS: Final[Mapping[str, type[PreferenceLoop]]] = {
    loop.objective: loop for loop in (DpoLoop, KtoLoop, OrpoLoop, RewardLoop)
}
"""By the name of the objective."""


def _count_tokens(inputs: Mapping[str, Any]) -> int:
    """Return the tokens of a batch without padding, and without the prompts that ORPO keeps apart once more."""
    masks = [name for name in inputs if name.endswith("attention_mask") and not name.startswith(("prompt_", "KL_"))]
    return int(sum(inputs[name].sum() for name in masks))


@contextlib.contextmanager
def _hide_quantization(model: object) -> Iterator[None]:
    """Have TRL not see that a base is quantized: it would turn the adapter's fp32 parameters into bf16."""
    flags = [name for name in ("is_loaded_in_4bit", "is_loaded_in_8bit") if getattr(model, name, False)]
    for name in flags:
        setattr(model, name, False)
    try:
        yield
    finally:
        for name in flags:
            setattr(model, name, True)


@contextlib.contextmanager
def _preserve_values(metrics: dict[str, list[float]]) -> Iterator[None]:
    """Leave a store of metrics as it was."""
    before = {name: list(values) for name, values in metrics.items()}
    try:
        yield
    finally:
        metrics.clear()
        metrics.update(before)
