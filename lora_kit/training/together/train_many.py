"""`train_many`: several recipes over one base, in one pass, each to the result that it has alone."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lora_kit.errors import RecipeError
from lora_kit.io.atomic_write import lock_output
from lora_kit.io.text import escape_text
from lora_kit.layers.experts import EXPERT_MATRICES
from lora_kit.models.loading import Base
from lora_kit.models.silence import silence_libraries
from lora_kit.runs.run_files import find_run_folder
from lora_kit.training.job.job import Job
from lora_kit.training.job.output import check_output_available, check_output_writable
from lora_kit.training.loop.checkpoints import RunFolder
from lora_kit.training.loop.signals import SharedStopRequest, StopRequest, TrainingStopped
from lora_kit.training.loop.world import World, join_world
from lora_kit.training.prefix.prefix_cache import SamplesWithStates
from lora_kit.training.recipe.coerce import Section
from lora_kit.training.recipe.load import RecipeSource, load_recipe
from lora_kit.training.recipe.objectives import SFT
from lora_kit.training.recipe.recipe import Recipe
from lora_kit.training.recipe.sharding_checks import is_base_sharded
from lora_kit.training.results import PartialTrainingError, TrainReport
from lora_kit.training.together.body_stand_in import Ask, BodyStandIn
from lora_kit.training.together.driver import JointDriver, TellBody, Work
from lora_kit.training.together.joint_model import JointModel, reason_no_joint_body
from lora_kit.training.together.process_state import TurnState
from lora_kit.training.together.shared_weights import SharedBase, freeze_weights
from lora_kit.training.train import StartedRun, train, train_job

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from lora_kit.training.loop.training_loop import TrainingLoop

logger = logging.getLogger(__name__)

MOST_TOGETHER: Final = 8
"""Adapters that are trained at once, unless the caller says another number."""


def train_many(
    recipes: Sequence[RecipeSource],
    *,
    base: Base | None = None,
    overrides: Section | None = None,
    replace: bool = False,
    together: int = MOST_TOGETHER,
) -> list[TrainReport]:
    """Train what several recipes describe over one base, and write each result to its `out`.

    Each adapter keeps its own order of samples, loss, clipping, schedule, dropout, early stopping, metrics and
    checkpoints: on one CPU it gets the bytes that `train` gives, elsewhere the same up to rounding. The frozen layers
    are computed for several adapters at once, as many as a measurement finds quickest. Memory holds one base, and the
    adapters. A training that was stopped resumes, with the same recipes, with others, or alone.

    Args:
        recipes: as `train` takes them, with one base, task, dtype and `quantize`, and outputs of their own.
        base: a base that is already loaded, unchanged afterwards; None to load the recipes'.
        overrides: values by dotted key, which win over every recipe.
        replace: as in `train`.
        together: adapters that are trained at once, at most; where one has finished, the next begins.

    Returns:
        The reports, in the order of the recipes.

    Raises:
        RecipeError: the recipes do not go together; nothing was trained.
        PartialTrainingError: some trainings failed, and the others were saved; it has the reports of these.
        LoraKitError: as `train`, where there is one recipe; or an output is not available, and nothing was trained.
    """
    loaded = [_load_one_of(recipes, number, overrides) for number in range(len(recipes))]
    if together < 1:
        raise RecipeError(f"together is {together}; at least one adapter is trained at once")
    if len(loaded) < 2:
        return [train(recipe, base=base, replace=replace) for recipe in loaded]
    trainings = [JointTraining(recipe) for recipe in loaded]
    train_together(trainings, base=base, replace=replace, together=together)
    errors = {training.recipe.out: training.error for training in trainings if training.error is not None}
    reports = [training.report for training in trainings if training.report is not None]
    if errors:
        raise PartialTrainingError(errors, reports)
    return reports


def _load_one_of(recipes: Sequence[RecipeSource], number: int, overrides: Section | None) -> Recipe:
    """Return one of several recipes; an error names the file, or says which recipe it is."""
    source = recipes[number]
    try:
        return load_recipe(source, overrides=overrides)
    except RecipeError as error:
        if len(recipes) < 2 or isinstance(source, (str, Path)):
            raise
        message = error.message.removeprefix("the recipe: ")
        raise RecipeError(f"recipe {number + 1} of {len(recipes)}: {message}", hint=error.hint) from None


def train_together(
    trainings: Sequence[JointTraining], *, base: Base | None, replace: bool, together: int = MOST_TOGETHER
) -> None:
    """Run several trainings in one pass, as `train_many`; each ends with its report or its error.

    Raises:
        RecipeError: they do not go together; nothing was trained.
        LoraKitError: an output is not available; nothing was trained.
    """
    check_recipes_together([training.recipe for training in trainings])
    with contextlib.ExitStack() as stack:
        if stack.enter_context(join_world()).size > 1:
            raise RecipeError("several recipes are trained by one process", hint="without torchrun, or one recipe")
        for training in trainings:
            stack.enter_context(training.hold_output(replace=replace))
        stack.enter_context(silence_libraries())
        _run_trainings(trainings, base, replace=replace, together=together)


def check_recipes_together(recipes: Sequence[Recipe]) -> None:
    """Check that recipes can be trained in one pass.

    Raises:
        RecipeError: names the recipe by its output, and what is different.
    """
    first = recipes[0]
    for recipe in recipes:
        if recipe.method not in ("lora", "features"):
            raise _build_refusal(recipe, f"method {recipe.method} changes the base, or wraps it")
        if recipe.objective != SFT:
            raise _build_refusal(recipe, f"objective {recipe.objective} has a loop of its own")
        if is_base_sharded(recipe.train):
            raise _build_refusal(recipe, "train.fsdp divides the base among processes")
        for key in ("base", "task", "dtype", "quantize"):
            own, other = getattr(recipe, key), getattr(first, key)
            if own != other:
                raise _build_refusal(recipe, f"its {key} is {own or 'none'}, that of {first.out} is {other or 'none'}")
    _check_outputs_apart([recipe.out for recipe in recipes])


def _check_outputs_apart(outs: Sequence[str]) -> None:
    """Raise RecipeError where an output is another one or lies in it, or in the folder of its checkpoints."""
    hint = "each adapter needs an out of its own"
    folders = [(out, Path(out).resolve()) for out in outs]
    for (one, first), (other, second) in itertools.combinations(folders, 2):
        if first == second:
            raise RecipeError(f"two recipes write to {escape_text(other)}", hint=hint)
        for inner, outer in ((first, second), (second, first)):
            if any(inner.is_relative_to(folder) for folder in (outer, find_run_folder(outer))):
                both = f"{escape_text(one)} and {escape_text(other)}"
                raise RecipeError(f"one of the outputs {both} lies in what is written for the other", hint=hint)


def _build_refusal(recipe: Recipe, reason: str) -> RecipeError:
    return RecipeError(f"{recipe.out} cannot be trained with others: {reason}", hint="train it by itself")


@dataclass
class JointTraining:
    """One of several trainings.

    Attributes:
        recipe: of it.
        callbacks: further callbacks of transformers.
        on_end: called with this training as soon as it has a report or an error, while others may go on.
        job: None where it could not be read.
        report: None until it has ended, and where it failed.
        error: that ended it.
    """

    recipe: Recipe
    callbacks: tuple[TrainerCallback, ...] = ()
    on_end: Callable[[JointTraining], None] | None = None
    job: Job | None = None
    report: TrainReport | None = None
    error: Exception | None = None

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.recipe.out)

    @contextlib.contextmanager
    def note_end(self) -> Iterator[None]:
        """Note the error of the block, which opens the job or trains; call `on_end` unless it has more to do."""
        try:
            yield
        except Exception as error:
            self.error = error
        if self.on_end is not None and (self.report or self.error):
            self.on_end(self)

    @contextlib.contextmanager
    def hold_output(self, *, replace: bool) -> Iterator[None]:
        """Keep other processes from the output, which must be available.

        Raises:
            RecipeError, StorageError: it is not.
        """
        check_output_writable(self.recipe)
        with lock_output(self.folder.folder):
            self.folder.remove_if_done()
            check_output_available(self.recipe, replace=replace)
            yield


def _run_trainings(trainings: Sequence[JointTraining], base: Base | None, *, replace: bool, together: int) -> None:
    """Run all trainings, and note the report or the error of each."""
    before, shared = TurnState.capture(), SharedBase(base)
    for training in trainings:
        with training.note_end():
            training.job = _open_job(training, shared)
    ready = [training for training in trainings if training.job is not None]
    if not ready or shared.source is None:
        return
    refuse_experts(shared.source)
    stop = StopRequest()
    with freeze_weights([training.job.base.model for training in ready if training.job]), stop:
        reason = reason_no_joint_body(shared.source.model)
        if reason is not None:
            logger.warning("the adapters are trained one after another: %s", reason)
        model = JointModel(shared.source.model) if reason is None else None
        is_joint = model is not None
        works = [
            (training.recipe.name, _make_work(training, stop, is_joint=is_joint, replace=replace)) for training in ready
        ]
        members = JointDriver(model, slots=together).run(works, may_begin=lambda: stop.signal_number is None)
        for training, member in zip(ready, members, strict=True):
            error = member.thread.error
            if isinstance(error, Exception):
                training.error = error
            elif error is not None and not isinstance(error, TrainingStopped):
                raise error
    before.restore()


def _open_job(training: JointTraining, shared: SharedBase) -> Job:
    """Return a training's job.

    Raises:
        LoraKitError: what is wrong with it.
    """
    recipe, store = training.recipe, training.folder.samples
    if shared.given is not None:
        return Job.open(recipe, shared.copy_source(), store=store)
    return Job.open(recipe, load=shared.load, store=store)


def refuse_experts(base: Base) -> None:
    """Raise RecipeError for a base with routed experts, which mix the tokens of all adapters."""
    for path, module in base.model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if any(name in EXPERT_MATRICES and tensor.ndim == 3 for name, tensor in own.items()):
            raise RecipeError(
                f"{base.name} has routed experts ({path}), which do not see which adapter a token belongs to",
                hint="train its recipes one after another",
            )


def _make_work(training: JointTraining, stop: StopRequest, *, is_joint: bool, replace: bool) -> Work:
    """Return what a training does in its thread.

    Args:
        is_joint: whether its frozen layers may be computed with those of others.
    """

    def work(ask: Ask, set_body: TellBody) -> None:
        job = training.job
        assert job is not None
        join = functools.partial(_join_loop, job.recipe, ask, set_body) if is_joint else contextlib.nullcontext
        folder = training.folder
        with training.note_end():
            checkpoint = folder.find_resumable(job.identity, job.environment, replace=replace)
            stop_request = SharedStopRequest(stop)
            run = StartedRun(
                folder, World(), checkpoint, stop_request, callbacks=training.callbacks, join=join, shows_bar=False
            )
            training.report = train_job(job, run, replace=replace)

    return work


@contextlib.contextmanager
def _join_loop(recipe: Recipe, ask: Ask, set_body: TellBody, trainer: TrainingLoop) -> Iterator[None]:
    """Let the body of a loop's model be computed with those of others until the block ends."""

    def log_alone(reason: str) -> None:
        logger.warning("%s is computed by itself: %s", escape_text(recipe.out), reason)

    def reason_alone_now() -> str | None:
        keeps_states = isinstance(trainer.train_dataset, SamplesWithStates)
        return "its frozen layers are computed once for each sample" if keeps_states else None

    reason = _reason_alone(recipe)
    if reason is not None:
        log_alone(reason)
        yield
        return
    body = trainer.model.base_model
    set_body(body)
    with BodyStandIn(body, ask, log_alone, reason_alone_now).install(trainer.accelerator):
        yield


def _reason_alone(recipe: Recipe) -> str | None:
    """Return what in a recipe needs forwards of its own; None where nothing does."""
    for key in ("gradient_checkpointing", "activation_checkpointing", "neftune_noise_alpha"):
        if recipe.train.get(key):
            return f"train.{key} changes the forward"
    if recipe.compile:
        return "compile: true compiles its own layers"
    return "method features trains no layer of the body" if recipe.method == "features" else None
