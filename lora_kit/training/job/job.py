"""A job: everything that a recipe names, read, checked and ready to be trained."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_kit.adapter.adapter import Adapter
from lora_kit.data.batches import Collator, EncodedDataset
from lora_kit.data.encode import RowCounts, encode_rows
from lora_kit.data.label_problem import count_labels, list_label_names, resolve_problem
from lora_kit.data.messages import ALL
from lora_kit.data.packing import PackedDataset, pack, reason_not_packable
from lora_kit.data.preference_samples import build_preference_dataset
from lora_kit.data.preferences import get_answer_format
from lora_kit.data.prompt_rows import PROMPT_FORMATS
from lora_kit.data.prompt_samples import PromptDataset
from lora_kit.data.rows import Rows
from lora_kit.data.sample_format import SampleFormat
from lora_kit.data.templates import ChatTemplate, chat_template
from lora_kit.errors import BaseModelError, RecipeError, format_list
from lora_kit.evaluation.generation_metrics import GenerationTask, build_generation_task, collect_eval_prompts
from lora_kit.evaluation.metrics import select_generation_metrics
from lora_kit.models.checkpoint_head import find_label_order
from lora_kit.models.heads import describe_head, list_head_labels, order_labels
from lora_kit.models.loading import Base
from lora_kit.models.tasks import CLASSIFY, LABEL_TASKS, REGRESSION, SINGLE_LABEL
from lora_kit.training.job.base_model import BaseLoader, load_recipe_base, prepare_base
from lora_kit.training.job.identity import Samples, build_identity
from lora_kit.training.job.recipe_rows import encode_training_rows, read_recipe_rows
from lora_kit.training.job.resolve import resolve_recipe
from lora_kit.training.job.starting_adapter import check_starting_labels, load_starting_adapter
from lora_kit.training.loop.checkpoints import Identity
from lora_kit.training.loop.reward_functions import RewardFunction, check_reward_columns, load_rewards
from lora_kit.training.loop.run_differences import PROCESSES
from lora_kit.training.recipe.class_weights import compute_class_weights
from lora_kit.training.recipe.objectives import (
    KTO,
    REWARD,
    REWARD_LABEL,
    SFT,
    count_answer_tokens,
    reason_not_shareable,
)
from lora_kit.training.recipe.recipe import Recipe
from lora_kit.training.recipe.sharding_checks import check_processes
from lora_kit.training.recipe.training_arguments import best_metric_of, check_reporting

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a training needs, checked.

    Attributes:
        recipe: with every value that was left open filled in.
        base: the model to train on, with its tokenizer.
        rows: of the training file; the first ones, where they are streamed.
        counts: of all training rows, and of those that were cut or divided.
        sample_format: how the rows become samples.
        train: the training samples.
        validation: the validation samples; None without `data.validation`.
        validation_rows: the rows that they were made from.
        generation_task: the prompts of the validation rows, where the best model is chosen by what it generates.
        class_weights: weight of each class in the loss; empty where each has the weight 1.
        rewards: the functions that reward what the model generates; empty where it generates nothing.
        head: what becomes of the base's head, in words; None where the task has no labels.
        start: the adapter that the training starts from; None for a new one.
        identity: everything that decides the result, see `lora_kit.training.loop.checkpoints`.
        processes: number of processes that share the rows of each batch.
    """

    recipe: Recipe
    base: Base
    rows: Rows
    counts: RowCounts
    sample_format: SampleFormat
    train: Any  # EncodedDataset or PackedDataset; PreferenceDataset or PromptDataset if the objective is not `sft`
    validation: Any
    validation_rows: Rows | None
    generation_task: GenerationTask | None
    class_weights: tuple[float, ...]
    rewards: tuple[RewardFunction, ...]
    head: str | None
    start: Adapter | None
    identity: Identity
    processes: int = 1

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        base: Base | None = None,
        *,
        store: Path | None = None,
        processes: int = 1,
        load: BaseLoader = load_recipe_base,
    ) -> Job:
        """Read, check and encode what a recipe names.

        Args:
            base: a base that is already loaded; None to load the recipe's.
            store: the folder that keeps the samples of streamed rows for the next run; None to keep none.
            processes: number of processes that share the rows of each batch.
            load: loads a base that is not given.

        Raises:
            RecipeError, DataError, BaseModelError: what is wrong, or does not go together.
        """
        check_reporting(recipe.train)
        _check_processes(recipe, processes, is_base_given=base is not None)
        rewards = load_rewards(recipe.rewards)
        start = load_starting_adapter(recipe)
        if start is not None:
            recipe = recipe.replace(lora=dataclasses.replace(start.config, lora_dropout=recipe.lora.lora_dropout))
        found = read_recipe_rows(recipe)
        rows, validation_rows = found.train, found.validation
        recipe = recipe.replace(problem=_find_problem(recipe, rows))
        head_labels, labels = _find_labels(recipe, rows, base)
        check_starting_labels(start, labels)
        label2id = {name: number for number, name in enumerate(labels)}
        class_weights = _weigh_classes(recipe, rows, labels)
        base = prepare_base(recipe, base, label2id, recipe.problem, load=load)
        template = _load_chat_template(recipe, rows, base)
        recipe = resolve_recipe(recipe, rows, base, template)
        sample_format = _build_sample_format(recipe, template, label2id)
        samples, counts = encode_training_rows(found, base.tokenizer, sample_format, folder=store)
        _check_token_ids(base, samples)
        logger.info("%s: %d samples, %d labels", rows.path, len(samples), samples.num_labels)
        train = _arrange_samples(recipe, base, rows, samples)
        validation = _encode_validation(recipe, base, validation_rows, sample_format)
        check_reward_columns(rewards, [train, validation])
        return cls(
            recipe=recipe,
            base=base,
            rows=rows,
            counts=counts,
            sample_format=sample_format,
            train=train,
            validation=validation,
            validation_rows=validation_rows,
            generation_task=_build_generation_task(recipe, validation_rows, base, sample_format),
            class_weights=class_weights,
            rewards=rewards,
            head=describe_head(head_labels, labels) if labels else None,
            start=start,
            identity=build_identity(recipe, base, train, validation, start, processes=processes),
            processes=processes,
        )

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the labels by number; empty where the task has none."""
        return self.sample_format.labels

    @property
    def collator(self) -> Collator:
        """What joins samples into batches."""
        return Collator(self.base.pad_token_id, self.base.decoder_inputs, self.base.takes_token_types)

    @property
    def measure_options(self) -> dict[str, object]:
        """The arguments of `lora_kit.evaluation.measure.measure` for what is measured besides the loss."""
        metrics = (best_metric_of(self.recipe.train),)
        return {"metrics": metrics, "labels": self.labels, "task": self.generation_task}

    @property
    def environment(self) -> dict[str, object]:
        """What may change the last bits of the result: versions, and the number of threads and of processes."""
        packages = ["lora-kit", "torch", "transformers", *(["peft"] if self.recipe.method == "peft" else [])]
        packages += [] if self.recipe.objective == SFT else ["trl"]
        versions = {name: metadata.version(name) for name in packages}
        several = {PROCESSES: self.processes} if self.processes > 1 else {}
        rewards = {reward.__name__: reward.sha256 for reward in self.rewards}
        further = {**several, **({"rewards": rewards} if rewards else {})}
        return {"versions": versions, "threads": torch.get_num_threads(), **further}

    def with_model(self, model: nn.Module) -> Job:
        """Return the same job with another model in its base: one that wraps the model it had."""
        base = dataclasses.replace(self.base, model=model)
        task = self.generation_task and dataclasses.replace(self.generation_task, base=base)
        return dataclasses.replace(self, base=base, generation_task=task)


def _build_sample_format(recipe: Recipe, template: ChatTemplate | None, label2id: Mapping[str, int]) -> SampleFormat:
    """Return how the rows of a recipe whose open values are filled in become samples."""
    assert recipe.data.max_length is not None
    return SampleFormat(
        max_length=recipe.data.max_length,
        separator=recipe.data.separator,
        template=template,
        label2id=label2id,
        learn=recipe.data.learn,
        task=recipe.task,
        problem=recipe.problem or SINGLE_LABEL,
        answer_tokens=count_answer_tokens(recipe.objective, recipe.train, recipe.data.max_length),
    )


def _find_problem(recipe: Recipe, rows: Rows) -> str | None:
    """Return what `classify` predicts, a number for a reward; None for other tasks."""
    if recipe.objective == REWARD:
        return REGRESSION
    return resolve_problem(rows, recipe.problem) if recipe.task == CLASSIFY else None


def _find_labels(recipe: Recipe, rows: Rows, base: Base | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the labels of the base's head, and those that are trained, in the order of the classes.

    A head that knows all labels of the rows keeps its own labels in its own order. Both are empty where the task has no
    labels.
    """
    if recipe.task not in LABEL_TASKS:
        return (), ()
    is_reward = recipe.objective == REWARD
    names = (REWARD_LABEL,) if is_reward else list_label_names(rows, recipe.problem or SINGLE_LABEL)
    if base is None:
        head, labels = find_label_order(recipe.base, names, task=recipe.task)
    else:
        head = list_head_labels(base.model.config)
        labels = order_labels(names, head)
    logger.info("head: %s", describe_head(head, labels))
    return head, labels


def _weigh_classes(recipe: Recipe, rows: Rows, labels: Sequence[str]) -> tuple[float, ...]:
    """Return the weight of each class in the loss; empty where each has the weight 1."""
    if recipe.class_weights is None:
        return ()
    counts = count_labels(rows, labels)
    total = len(rows) if recipe.task == CLASSIFY else sum(counts)
    weights = compute_class_weights(
        recipe.class_weights, labels, counts, problem=recipe.problem or SINGLE_LABEL, total=total
    )
    listed = [f"{label} {weight:.3g}" for label, weight in zip(labels, weights, strict=True)]
    logger.info("weights of the labels: %s", format_list(listed))
    return weights


def _check_token_ids(base: Base, samples: EncodedDataset) -> None:
    """Raise BaseModelError where a token of the samples, or the pad token, has no embedding."""
    rows = base.model.get_input_embeddings().weight.shape[0]
    token = max(base.pad_token_id, int(samples.ids.max()) if len(samples.ids) else 0)
    if token >= rows:
        word = base.tokenizer.convert_ids_to_tokens([token])[0]
        what = f"{base.name}: the tokenizer's token {word!r} has the id {token:,}, and the model {rows:,} embeddings"
        raise BaseModelError(what, hint="the tokenizer is of another model, or its added tokens were never trained")


def _load_chat_template(recipe: Recipe, rows: Rows, base: Base) -> ChatTemplate | None:
    data = recipe.data
    if get_answer_format(rows.format) == "chat":
        return chat_template(
            data.chat_template, base.tokenizer, base=base.name, variables=dict(data.chat_template_kwargs)
        )
    given = {
        "chat_template": data.chat_template is not None,
        "chat_template_kwargs": bool(data.chat_template_kwargs),
        "learn": data.learn != ALL,
    }
    unused = next((key for key, is_given in given.items() if is_given), None)
    if unused:
        raise RecipeError(f"data.{unused} is for conversations; {rows.path} has rows of the format {rows.format}")
    return None


def _arrange_samples(
    recipe: Recipe, base: Base, rows: Rows, samples: EncodedDataset, *, packing: bool | None = None
) -> Samples:
    """Return samples as the loop of the objective takes them: packed, as preferences, or as they are."""
    if rows.format in PROMPT_FORMATS:
        return PromptDataset(samples, rows)
    if recipe.objective != SFT:
        return build_preference_dataset(rows, samples, unpaired=recipe.objective == KTO)
    is_packed = recipe.data.packing if packing is None else packing
    return _pack_samples(recipe, base, samples) if is_packed else samples


def _encode_validation(recipe: Recipe, base: Base, rows: Rows | None, sample_format: SampleFormat) -> Samples | None:
    if rows is None:
        return None
    return _arrange_samples(recipe, base, rows, encode_rows(rows, base.tokenizer, sample_format), packing=False)


def _pack_samples(recipe: Recipe, base: Base, samples: EncodedDataset) -> PackedDataset:
    """Return samples packed into rows of `max_length` tokens."""
    reason = reason_not_packable(base.model)
    if reason:
        raise RecipeError(f"data.packing: {base.name} cannot keep samples apart: {reason}", hint="packing: false")
    assert recipe.data.max_length is not None
    packed = pack(samples, max_length=recipe.data.max_length, seed=recipe.seed)
    message = "%d samples in %d rows of %d tokens, %.1f%% of them filled"
    logger.info(message, len(samples), len(packed), packed.max_length, 100 * packed.filled)
    return packed


def _build_generation_task(
    recipe: Recipe, rows: Rows | None, base: Base, sample_format: SampleFormat
) -> GenerationTask | None:
    """Return the prompts of the validation rows where the best model is chosen by a metric of generated text."""
    if recipe.objective != SFT:
        return None
    if rows is None or not select_generation_metrics([best_metric_of(recipe.train)], recipe.task):
        return None
    return build_generation_task(base, collect_eval_prompts(rows, learn=recipe.data.learn), sample_format.style)


def _check_processes(recipe: Recipe, processes: int, *, is_base_given: bool) -> None:
    """Raise RecipeError where several processes cannot share the rows of a batch, or the base."""
    check_processes(recipe.train, processes=processes, is_base_given=is_base_given)
    reason = reason_not_shareable(recipe.objective, recipe.train) if processes > 1 else None
    if reason:
        raise RecipeError(f"{reason}: {processes} processes cannot share them", hint="train in one process")
