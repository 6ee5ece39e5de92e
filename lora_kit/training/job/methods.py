"""What the methods of a recipe train and save: the one place where they differ once a training has begun."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from lora_kit.bank.attach import attach
from lora_kit.bank.bank import AdapterBank
from lora_kit.io.atomic_write import stage_folder
from lora_kit.training.job.job import Job, is_trained_model_folder
from lora_kit.training.loop.checkpoints import hash_json
from lora_kit.training.results import TrainedModules, TrainReport, collect_record_metrics

logger = logging.getLogger(__name__)


class ResultSaver(Protocol):
    """Writes the result of a training, all or nothing."""

    def __call__(self, report: TrainReport, files: Mapping[str, bytes], *, replace: bool) -> TrainReport:
        """Write it to the report's `out`.

        Args:
            files: further files of the result, by name.
            replace: an earlier result may be replaced.

        Returns:
            The report, with the digest of what was written where that has one.

        Raises:
            StorageError: the disk refuses; what was there is as it was.
        """


@dataclass(frozen=True, kw_only=True)
class TrainableJob:
    """A job whose model requires gradients where its method trains it.

    Attributes:
        job: with the model that is trained.
        kinds: what is trained.
        count: elements that are trained. parameters: of the whole model.
        save: writes what has been trained.
    """

    job: Job
    kinds: tuple[TrainedModules, ...]
    count: int
    parameters: int
    save: ResultSaver


@contextlib.contextmanager
def make_job_trainable(job: Job) -> Iterator[TrainableJob]:
    """Within, a job is as its method trains it; afterwards a base that was given is as it was.

    Raises:
        TargetError, RecipeError: what is to be trained does not fit the base, which is as it was.
    """
    from transformers import set_seed

    set_seed(job.recipe.seed)
    with _METHODS[job.recipe.method](job) as ready:
        yield ready


def build_training_record(job: Job, report: TrainReport) -> dict[str, Any]:
    """What the record of an adapter says of its training."""
    recipe = job.recipe
    record: dict[str, Any] = {
        "recipe": recipe.to_dict(),
        "seed": recipe.seed,
        "metrics": collect_record_metrics(report),
    }
    record["run"] = hash_json(job.identity)
    if job.labels:
        record["labels"] = list(job.labels)
    return record


@contextlib.contextmanager
def _attach_adapter(job: Job) -> Iterator[TrainableJob]:
    """`lora` and `features`: an adapter in a bank beside the model."""
    recipe = job.recipe
    bank = attach(job.base.model, recipe.lora, name=recipe.name)
    logger.info("%s", bank.coverage(recipe.name))

    def save(report: TrainReport, files: Mapping[str, bytes], *, replace: bool) -> TrainReport:
        record = build_training_record(job, report)
        saved = bank.save(recipe.name, report.out, record=record, files=files, replace=replace)
        return dataclasses.replace(report, digest=saved.digest)

    try:
        yield TrainableJob(
            job=job,
            kinds=_count_trained_modules(bank, recipe.name),
            count=bank.coverage(recipe.name).parameters,
            parameters=job.base.model.num_parameters(),
            save=save,
        )
    finally:
        bank.detach()


def _count_trained_modules(bank: AdapterBank, name: str) -> tuple[TrainedModules, ...]:
    coverage = bank.coverage(name)
    found: dict[str, list[int]] = {}
    for target in coverage.targets:
        found.setdefault(target.path.rpartition(".")[2], []).append(target.parameters)
    kinds = [TrainedModules(name, len(each), sum(each)) for name, each in found.items()]
    if coverage.saved:
        kinds.append(TrainedModules(", ".join(coverage.saved), len(coverage.saved), coverage.saved_parameters))
    kinds += [TrainedModules(f"rows of {rows.path}", len(rows.indices), rows.parameters) for rows in coverage.tokens]
    return tuple(kinds)


@contextlib.contextmanager
def _unfreeze_model(job: Job) -> Iterator[TrainableJob]:
    """`full`: every weight, of a model that nobody else has."""
    model = job.base.model
    model.requires_grad_(True)
    count = model.num_parameters()

    def save(report: TrainReport, files: Mapping[str, bytes], *, replace: bool) -> TrainReport:
        with stage_folder(report.out, replace=replace, owned=is_trained_model_folder) as folder:
            model.save_pretrained(folder)
            job.base.tokenizer.save_pretrained(folder)
            for name, data in files.items():
                (folder / name).write_bytes(data)
        return report

    yield TrainableJob(
        job=job, kinds=(TrainedModules("every weight", 1, count),), count=count, parameters=count, save=save
    )


@contextlib.contextmanager
def _wrap_with_peft(job: Job) -> Iterator[TrainableJob]:
    """`peft`: whatever PEFT makes of a model that nobody else has."""
    from lora_kit.training.job.peft_method import PeftAdapter

    adapter = PeftAdapter(job)

    def save(report: TrainReport, files: Mapping[str, bytes], *, replace: bool) -> TrainReport:
        digest = adapter.save(report.out, record=build_training_record(job, report), files=files, replace=replace)
        return dataclasses.replace(report, digest=digest)

    yield TrainableJob(
        job=job.with_model(adapter.model),
        kinds=adapter.kinds,
        count=adapter.count,
        parameters=adapter.parameters,
        save=save,
    )


_METHODS: Final[Mapping[str, Callable[[Job], contextlib.AbstractContextManager[TrainableJob]]]] = {
    "lora": _attach_adapter,
    "features": _attach_adapter,
    "full": _unfreeze_model,
    "peft": _wrap_with_peft,
}
