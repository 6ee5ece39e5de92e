"""What each method trains and how it saves that: the one place where methods differ once training has begun."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from torch import nn

from lora_kit.adapter.adapter import encode_adapter
from lora_kit.adapter.folder import CARD
from lora_kit.adapter.model_card import format_labels, format_metrics
from lora_kit.adapter.use_record import MODEL_RECORD, encode_model_record, find_common_use
from lora_kit.bank.attach import attach
from lora_kit.bank.bank import AdapterBank
from lora_kit.data.mixture import has_text_pairs
from lora_kit.generation.end_tokens import add_answer_ends
from lora_kit.io.atomic_write import stage_folder
from lora_kit.io.strict_json import parse_object
from lora_kit.models.model_folder_card import render_model_card
from lora_kit.models.rope_fields import add_older_rope_fields
from lora_kit.training.job.job import Job
from lora_kit.training.job.output import is_trained_model_folder
from lora_kit.training.job.starting_adapter import fill_from_start, name_start
from lora_kit.training.loop.checkpoints import hash_json
from lora_kit.training.recipe.objectives import TRL_OBJECTIVES
from lora_kit.training.recipe.portable_recipe import make_recipe_portable
from lora_kit.training.results import TrainedModules, TrainReport, collect_record_metrics

logger = logging.getLogger(__name__)


class AdapterEncoder(Protocol):
    """Returns what is trained, as it is now, as the files of an adapter's folder."""

    def __call__(self, facts: Mapping[str, object]) -> Mapping[str, bytes]:
        """Return the contents of the files by name, in the order in which they are written.

        Args:
            facts: of the training so far, to be recorded beside what describes it.
        """


class ResultSaver(Protocol):
    """Writes the result of a training, all or nothing."""

    def __call__(self, report: TrainReport, files: Mapping[str, bytes], *, replace: bool) -> TrainReport:
        """Write the result to the report's `out`.

        Args:
            files: contents of the further files, by name.
            replace: whether an earlier result may be replaced.

        Returns:
            The report, with the digest of an adapter.

        Raises:
            StorageError: the result cannot be written; an earlier one is unchanged.
        """


@dataclass(frozen=True, kw_only=True)
class TrainableJob:
    """A job whose trained parameters require gradients, and no others.

    Attributes:
        job: with the model that is trained.
        kinds: the trained modules by name.
        count: number of trained parameters.
        parameters: number of parameters of the whole model.
        save: writes what was trained.
        encode_adapter: returns the adapter as it is now, for a checkpoint; None where whole weights are trained.
        build_reference: returns the model as it was before the training, computed by the same model, for objectives
            that compare the two; raises BankError where it cannot. None where the method has none.
    """

    job: Job
    kinds: tuple[TrainedModules, ...]
    count: int
    parameters: int
    save: ResultSaver
    encode_adapter: AdapterEncoder | None = None
    build_reference: Callable[[], nn.Module] | None = None


@contextlib.contextmanager
def make_job_trainable(job: Job) -> Iterator[TrainableJob]:
    """Make a job trainable by its method until the block ends; then its base is as before.

    Raises:
        TargetError, RecipeError: the adapter does not fit the base, which is unchanged.
    """
    from transformers import set_seed

    set_seed(job.recipe.seed)
    with _METHODS[job.recipe.method](job) as ready:
        yield ready


def describe_training(job: Job) -> dict[str, object]:
    """Return what an adapter's record says about its training from the first step on, as JSON values."""
    record: dict[str, object] = {"recipe": make_recipe_portable(job.recipe).to_dict(), "seed": job.recipe.seed}
    if job.labels:
        record["labels"] = list(job.labels)
    if job.recipe.problem is not None:
        record["problem"] = job.recipe.problem
        record["text_pairs"] = has_text_pairs(job.rows)
    return record


def build_training_record(job: Job, report: TrainReport) -> dict[str, object]:
    """Return what an adapter's record says about a finished training, as JSON values."""
    record = describe_training(job) | {"metrics": collect_record_metrics(report), "run": hash_json(job.identity)}
    record |= {"frozen_layers": report.frozen} if report.frozen else {}
    return record | ({"thresholds": list(report.thresholds)} if report.thresholds else {})


@contextlib.contextmanager
def _attach_adapter(job: Job) -> Iterator[TrainableJob]:
    """Attach an adapter in a bank: methods `lora` and `features`."""
    recipe = job.recipe
    bank = attach(job.base.model, recipe.lora, name=recipe.name)
    logger.info("%s", bank.coverage(recipe.name))
    is_compared = recipe.objective in TRL_OBJECTIVES and TRL_OBJECTIVES[recipe.objective].needs_reference
    if job.start is not None:
        try:
            fill_from_start(bank, recipe.name, job.start, keep=is_compared)
        except BaseException:
            bank.detach()
            raise

    def save(report: TrainReport, files: Mapping[str, bytes], *, replace: bool) -> TrainReport:
        record = build_training_record(job, report)
        saved = bank.save(recipe.name, report.out, record=record, files=files, replace=replace)
        return dataclasses.replace(report, digest=saved.digest)

    def encode(facts: Mapping[str, object]) -> Mapping[str, bytes]:
        return encode_adapter(bank.snapshot(recipe.name), recipe.name, record=describe_training(job) | dict(facts))

    try:
        yield TrainableJob(
            job=job,
            kinds=_count_trained_modules(bank, recipe.name),
            count=bank.coverage(recipe.name).parameters,
            parameters=job.base.model.num_parameters(),
            save=save,
            encode_adapter=encode,
            build_reference=functools.partial(
                bank.reference, name_start(recipe.name) if job.start is not None else None
            ),
        )
    finally:
        bank.detach()


def _count_trained_modules(bank: AdapterBank, name: str) -> tuple[TrainedModules, ...]:
    coverage = bank.coverage(name)
    sizes_by_name: dict[str, list[int]] = {}
    for target in coverage.targets:
        sizes_by_name.setdefault(target.path.rpartition(".")[2], []).append(target.parameters)
    kinds = [TrainedModules(name, len(sizes), sum(sizes)) for name, sizes in sizes_by_name.items()]
    if coverage.saved:
        kinds.append(TrainedModules(", ".join(coverage.saved), len(coverage.saved), coverage.saved_parameters))
    kinds += [TrainedModules(f"rows of {rows.path}", len(rows.indices), rows.parameters) for rows in coverage.tokens]
    return tuple(kinds)


@contextlib.contextmanager
def _unfreeze_model(job: Job) -> Iterator[TrainableJob]:
    """Let every weight require a gradient: method `full`. The model is a copy, or was loaded for this training."""
    model = job.base.model
    model.requires_grad_(True)
    count = model.num_parameters()

    def save(report: TrainReport, files: Mapping[str, bytes], *, replace: bool) -> TrainReport:
        needed = sum(parameter.nbytes for parameter in model.parameters())
        with stage_folder(report.out, replace=replace, owned=is_trained_model_folder, needed=needed) as folder:
            model.save_pretrained(folder)
            _complete_config(folder / "config.json")
            job.base.tokenizer.save_pretrained(folder)
            (folder / CARD).write_text(_render_model_card(job, report), "utf-8")
            use = find_common_use([build_training_record(job, report)])
            (folder / MODEL_RECORD).write_bytes(encode_model_record(use))
            add_answer_ends(folder, use, job.base.tokenizer)
            for name, data in files.items():
                (folder / name).write_bytes(data)
        return report

    kinds = (TrainedModules("every weight", 1, count),)
    yield TrainableJob(job=job, kinds=kinds, count=count, parameters=count, save=save)


def _render_model_card(job: Job, report: TrainReport) -> str:
    """Return the card of a model of which every weight was trained."""
    recipe = make_recipe_portable(job.recipe)
    facts = [
        ("base", recipe.base),
        ("task", recipe.task),
        *format_labels(list(job.labels)),
        ("parameters", f"{report.parameters:,}"),
        *format_metrics(collect_record_metrics(report)),
    ]
    return render_model_card(
        recipe.name,
        "A model of which lora_kit trained every weight (`method: full`).",
        name=recipe.name,
        task=recipe.task,
        base=recipe.base,
        tag="fine-tuned",
        facts=facts,
    )


def _complete_config(file: Path) -> None:
    """Add to a model's config what other programs read of it, and older versions of transformers."""
    config = parse_object(file.read_text("utf-8"))
    add_older_rope_fields(config)
    file.write_text(f"{json.dumps(config, indent=2)}\n", "utf-8")


@contextlib.contextmanager
def _wrap_with_peft(job: Job) -> Iterator[TrainableJob]:
    """Wrap the model in a PeftModel: method `peft`. The model is a copy, or was loaded for this training."""
    from lora_kit.training.job.peft_method import PeftAdapter

    adapter = PeftAdapter(job)

    def save(report: TrainReport, files: Mapping[str, bytes], *, replace: bool) -> TrainReport:
        digest = adapter.save(report.out, record=build_training_record(job, report), files=files, replace=replace)
        return dataclasses.replace(report, digest=digest)

    def encode(facts: Mapping[str, object]) -> Mapping[str, bytes]:
        contents, _ = adapter.encode(job.recipe.name, record=describe_training(job) | dict(facts), files={})
        return contents

    yield TrainableJob(
        job=job.with_model(adapter.model),
        kinds=adapter.kinds,
        count=adapter.count,
        parameters=adapter.parameters,
        save=save,
        encode_adapter=encode,
    )


_METHODS: Final[Mapping[str, Callable[[Job], contextlib.AbstractContextManager[TrainableJob]]]] = {
    "lora": _attach_adapter,
    "features": _attach_adapter,
    "full": _unfreeze_model,
    "peft": _wrap_with_peft,
}
