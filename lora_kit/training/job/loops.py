"""The training loop of a job: our own for `sft`, one of TRL's for the other objectives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora_kit.data.answer_ends import find_template_ends
from lora_kit.errors import RecipeError
from lora_kit.generation.prompts import find_end_tokens
from lora_kit.training.job.job import Job
from lora_kit.training.job.methods import TrainableJob
from lora_kit.training.loop.checkpoints import hash_json
from lora_kit.training.loop.learning_rates import LearningRates
from lora_kit.training.loop.world import ALONE, World
from lora_kit.training.prefix.prefix_choice import AUTO, PrefixCache
from lora_kit.training.recipe.objectives import SFT, TRL_OBJECTIVES, generates_answers
from lora_kit.training.recipe.training_arguments import build_training_arguments

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainingArguments

    from lora_kit.training.loop.resumable import ResumableLoop
    from lora_kit.training.loop.run_state import RunContext


def build_job_arguments(job: Job, folder: str, world: World = ALONE) -> TrainingArguments:
    """Return the arguments of a job's `train` section, as of one process that has the rows of all.

    Args:
        folder: the output folder that transformers requires; nothing is written to it.
        world: the processes; all but the first report to no tracker and show no progress.

    Raises:
        RecipeError: the arguments are invalid, or there are fewer prompts than one generation takes.
    """
    recipe = job.recipe
    section = recipe.train if world.is_first else {**recipe.train, "report_to": "none", "disable_tqdm": True}
    args = build_training_arguments(
        section, device=job.base.device, folder=folder, name=recipe.name, objective=recipe.objective
    )
    args.per_device_train_batch_size *= world.size
    if generates_answers(recipe.objective):
        _check_prompts(len(job.train), args)
    return args


def _check_prompts(count: int, args: Any) -> None:
    """Raise RecipeError where there are fewer prompts than one generation takes: no step would be made."""
    needed = args.generation_batch_size // args.num_generations
    if count < needed:
        what = f"one generation takes {needed} prompts, {args.num_generations} answers to each, and there are {count}"
        raise RecipeError(what, hint="a smaller train.per_device_train_batch_size, or more train.num_generations")


def build_loop(
    trainable: TrainableJob, args: TrainingArguments, *, callbacks: Sequence[TrainerCallback], run: RunContext
) -> ResumableLoop:
    """Return the loop that trains a job.

    Raises:
        RecipeError, BankError: the adapter does not go with the objective.
    """
    job = trainable.job
    options: dict[str, Any] = {
        "callbacks": callbacks,
        "rates": LearningRates.of(job.recipe.train, job.recipe.task),
        "run": run,
        "ema_decay": job.recipe.train.get("ema_decay"),
    }
    if job.recipe.objective != SFT:
        return build_preference_loop(trainable, args, train=job.train, validation=job.validation, **options)
    from lora_kit.training.loop.resumable import ResumableTrainer

    return ResumableTrainer(
        job.base.model,
        args,
        train=job.train,
        validation=job.validation,
        collator=job.collator,
        measure_options=job.measure_options,
        class_weights=job.class_weights,
        prefix_cache=build_prefix_cache(job, run),
        **options,
    )


def build_prefix_cache(job: Job, run: RunContext) -> PrefixCache:
    """Return where what a job's frozen layers give is kept, if it is."""
    return PrefixCache(
        folder=run.folder.prefix,
        setting=job.recipe.train.get("prefix_cache", AUTO),
        facts={"run": hash_json(run.identity), "environment": run.setting},
        on_batch=run.stop.obey,
    )


def build_preference_loop(
    trainable: TrainableJob,
    args: TrainingArguments,
    *,
    train: Any,
    validation: Any,
    **options: Any,
) -> ResumableLoop:
    """Return TRL's loop of a job's objective on some samples.

    Args:
        train: a `PreferenceDataset`, or a `PromptDataset` where the model generates; or a selection of its items.
        validation: the same; None without any.
        options: further arguments of a `ResumableLoop`.

    Raises:
        RecipeError, BankError: the adapter does not go with the objective.
    """
    job = trainable.job
    if TRL_OBJECTIVES[job.recipe.objective].needs_reference:
        if trainable.build_reference is None:
            raise RecipeError(f"method {job.recipe.method} keeps no reference for objective {job.recipe.objective}")
        options["ref_model"] = trainable.build_reference()
    options["tokenizer"] = job.base.tokenizer
    if generates_answers(job.recipe.objective):
        from lora_kit.training.loop.grpo_trainer import GrpoLoop

        ends = find_answer_ends(job)
        return GrpoLoop(
            job.base.model, args, train=train, validation=validation, rewards=job.rewards, ends=ends, **options
        )
    from lora_kit.training.loop.preference_trainers import LOOPS

    return LOOPS[job.recipe.objective](job.base.model, args, train=train, validation=validation, **options)


def find_answer_ends(job: Job) -> frozenset[int]:
    """Return the tokens that end an answer in the style of a job's prompts, as in a generation with its adapter."""
    template = job.sample_format.template
    own = find_template_ends(template, job.base.tokenizer) if template is not None else frozenset[int]()
    return find_end_tokens(job.base) | own
