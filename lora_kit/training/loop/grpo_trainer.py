"""TRL's GRPO with our checkpoints, evaluations and log: the model answers prompts, and functions reward the answers.

Prompts are encoded by `lora_kit.data.prompt_samples`, so that the model is given the tokens that `generate` gives it.
A checkpoint holds the answers that are still to be learned from, where one generation serves several steps. This module
imports TRL.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import datasets  # type: ignore[import-untyped]
import torch
import transformers
import trl
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.utils import RepeatSampler, add_fused_lm_head

from lora_kit.data.prompt_samples import PROMPT_IDS, PromptDataset
from lora_kit.errors import RecipeError
from lora_kit.evaluation.measure import Evaluation
from lora_kit.torch_utils import capture_random_states, restore_random_states, use_eval_mode
from lora_kit.training.loop.preference_trainers import PreferenceLoop
from lora_kit.training.loop.reward_functions import RewardFunction
from lora_kit.training.recipe.objectives import GRPO

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class GrpoLoop(PreferenceLoop, trl.GRPOTrainer):
    """Group relative policy optimization: Shao et al. 2024, arXiv:2402.03300.

    Args:
        rewards: the functions; their weights are those of the recipe.
        ends: tokens that end an answer, besides those of the model.
        ref_model: the model as it was before, which is asked where `beta` is above 0.
    """

    objective = GRPO
    # Of TRL, whose annotations are wider than what is there:
    args: Any
    ref_model: Any
    reward_funcs: Any
    num_generations_eval: Any
    max_completion_length: Any
    _buffered_inputs: Any

    def __init__(
        self,
        model: PreTrainedModel,
        args: Any,
        *,
        train: PromptDataset,
        validation: PromptDataset | None,
        rewards: Sequence[RewardFunction],
        ends: Collection[int],
        ref_model: Any,
        **options: Any,
    ) -> None:
        beta, args.beta = args.beta, 0.0  # else TRL would load a second model as the reference
        args.reward_weights = [reward.spec.weight for reward in rewards]
        super().__init__(model, args, train=train, validation=validation, reward_funcs=list(rewards), **options)
        args.beta = self.beta = beta
        if beta:
            self.ref_model = ref_model
            add_fused_lm_head(ref_model, temperature=self.temperature)
        # TRL takes a datasets.Dataset only, which would convert the values of the columns.
        self.train_dataset, self.eval_dataset = train, validation
        self._answer_by(ends)
        self._prompt_ids: list[list[int]] = []
        self._scores = torch.zeros(0, len(rewards))
        self._batch_tokens = torch.zeros((), dtype=torch.int64)

    def build_dataset(self, samples: Any) -> datasets.Dataset:
        """Return so many rows for TRL's constructor."""
        return datasets.Dataset.from_dict({"prompt": [""] * len(samples)})

    def _answer_by(self, ends: Collection[int]) -> None:
        """Have an answer end at these tokens, too."""
        self.eos_token_ids = [*self.eos_token_ids, *sorted({*ends} - {*self.eos_token_ids})]
        self.generation_config.eos_token_id = self.eos_token_ids
        self.generation_kwargs["eos_token_id"] = self.eos_token_ids

    # Answers and their rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._prompt_ids = [row[PROMPT_IDS] for row in inputs]
        rows = [{key: value for key, value in row.items() if key != PROMPT_IDS} for row in inputs]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing", FutureWarning)  # a name that TRL uses
            answers: dict[str, Any] = super()._generate_and_score_completions(rows)
        return answers

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return self._prompt_ids, None, {}

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the adapter will: without dropout, and with a cache where layers are checkpointed."""
        with use_eval_mode(self.model):
            return super()._generate_single_turn(*args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._scores = super()._calculate_rewards(*args, **kwargs)
        return self._scores

    # The order of the prompts

    def _get_train_sampler(self, dataset: Any = None) -> RepeatSampler:
        sampler: Any = super()._get_train_sampler(dataset)
        sampler.__class__ = _SeededSampler
        seeded: RepeatSampler = sampler
        return seeded

    # Counts

    def count_tokens(self, inputs: Any) -> Tensor | int:
        """Return the tokens of the prompts and answers of the batch that was computed last."""
        return self._batch_tokens

    def _compute_loss(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        self._batch_tokens = inputs["prompt_mask"].sum() + inputs["completion_mask"].sum()
        loss: Tensor = super()._compute_loss(model, inputs)
        return loss

    def floating_point_ops(self, inputs: Any) -> int:
        """Return transformers' estimate for the batch that was computed last."""
        return 6 * int(self._batch_tokens) * self._weight_count

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log metrics, without TRL's own clock."""
        self._get_metrics("train").pop("step_time", None)
        super().log(logs, start_time)

    @property
    def _is_buffer_used_up(self) -> bool:
        """Whether the next batch begins with a generation."""
        return bool(self._step % (self.args.steps_per_generation * self.num_iterations) == 0)

    def capture_counts(self) -> dict[str, object]:
        """Return the counts of a checkpoint, with the answers that further steps learn from."""
        batches: list[dict[str, Any]] = [] if self._is_buffer_used_up else self._buffered_inputs
        state = {
            "step": self._step,
            "answers": [{key: _copy_to(value, "cpu") for key, value in batch.items()} for batch in batches],
            "entropy": [self.entropy_coef, self._last_world_entropy],
        }
        return {**super().capture_counts(), "grpo": state}

    def restore_counts(self, counts: Mapping[str, Any]) -> None:
        """Continue from the counts of a checkpoint."""
        super().restore_counts(counts)
        state, device = counts["grpo"], self.args.device
        self._step = state["step"]
        batches = [{key: _copy_to(value, device) for key, value in batch.items()} for batch in state["answers"]]
        self._buffered_inputs = batches or None
        self.entropy_coef, self._last_world_entropy = state["entropy"]

    # Evaluation

    def measure_validation(self, thresholds: Sequence[float] = ()) -> Evaluation | None:
        """Return the rewards of answers to all validation prompts, drawn with the same seed each time."""
        before = capture_random_states()
        try:
            transformers.set_seed(self.args.seed)
            return super().measure_validation(thresholds)
        finally:
            restore_random_states(before)

    def _iterate_validation(self) -> Iterator[list[dict[str, object]]]:
        """Yield batches of whole groups: each prompt as often as it is answered."""
        each, prompts = self.num_generations_eval, len(self.eval_dataset)
        size = max(1, self.args.per_device_eval_batch_size // each)
        for start in range(0, prompts, size):
            rows = [self.eval_dataset[index] for index in range(start, min(start + size, prompts))]
            yield [row for row in rows for _ in range(each)]

    def collate_validation(self, rows: list[dict[str, object]]) -> Any:
        """Return the rows: their answers are generated where they are measured."""
        return rows

    def _measure_batch(self, rows: list[dict[str, object]]) -> dict[str, tuple[float, float]]:
        measured = super()._measure_batch(rows)
        for column, reward in enumerate(self.reward_funcs):
            scores = self._scores[:, column]
            scores = scores[~scores.isnan()]
            measured[f"rewards/{reward.__name__}"] = float(scores.mean()), float(len(scores))
        return {name: (value, weight) for name, (value, weight) in measured.items() if weight}

    def _weigh(self, name: str, rows: Sequence[Mapping[str, object]]) -> float:
        if name == "reward":  # where no function applies there is none
            return float((~self._scores.isnan().all(dim=1)).sum())
        return float(len(rows))

    def _complete_metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics of all rows; of several functions each reward, too.

        Raises:
            RecipeError: no answer has a reward.
        """
        if "reward" not in means:
            raise RecipeError("no function rewards any answer to the validation rows: each returns None for all")
        own = {name: value for name, value in means.items() if name.startswith("rewards/")}
        return {**super()._complete_metrics(means), **(own if len(self.reward_funcs) > 1 else {})}

    # The dry run

    def compute_sample_loss(self, samples: list[dict[str, Any]]) -> Tensor:
        """Return the loss of some prompts with the longest answers that there may be: ()."""
        prompts = [torch.tensor(sample[PROMPT_IDS], device=self.args.device) for sample in samples]
        pad = functools.partial(pad_sequence, batch_first=True, padding_side="left")
        answers = torch.full((len(samples), self.max_completion_length), self.eos_token_ids[0], device=self.args.device)
        inputs = {
            "prompt_ids": pad(prompts, padding_value=self.eos_token_ids[0]),
            "prompt_mask": pad([torch.ones_like(prompt) for prompt in prompts]),
            "completion_ids": answers,
            "completion_mask": torch.ones_like(answers),
            "advantages": torch.ones(len(samples), device=self.args.device),
            "num_items_in_batch": torch.tensor(answers.numel(), device=self.args.device),
            **({"ref_per_token_logps": torch.zeros(answers.shape, device=self.args.device)} if self.beta else {}),
        }
        with self.compute_loss_context_manager():
            loss: Tensor = self.compute_loss(self.model_wrapped, inputs)
        return loss


class _SeededSampler(RepeatSampler):
    """TRL's order of the prompts, which depends on the seed and on the epoch, and not on what was drawn before it."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of this epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            assert self.seed is not None
            self.generator.manual_seed(self.seed)
            for _ in range(self.epoch):
                torch.randperm(self.num_samples, generator=self.generator)
        yield from super().__iter__()


def _copy_to(value: Any, device: Any) -> Any:
    """Return a tensor with memory of its own on a device; any other value as it is."""
    return value.detach().clone().to(device) if isinstance(value, Tensor) else value
