"""Keep a checkpoint of a training as its result, as if the training had ended there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.adapter_record import check_files, read_record
from lora_kit.adapter.folder import CONFIG, WEIGHTS, is_adapter_folder
from lora_kit.errors import AdapterError, format_list
from lora_kit.evaluation.measure import Evaluation
from lora_kit.io.atomic_write import lock_output, write_folder
from lora_kit.io.given_values import parse_path
from lora_kit.io.read import folder_exists, read_json, read_text
from lora_kit.io.strict_json import JsonObject
from lora_kit.io.text import escape_text
from lora_kit.names import RUN_SUFFIX
from lora_kit.training.job.output import check_output_available, check_output_writable
from lora_kit.training.loop.checkpoints import LOOP, Checkpoint, RunFolder
from lora_kit.training.loop.resumable import STATE
from lora_kit.training.recipe.load import load_recipe
from lora_kit.training.recipe.recipe import Recipe
from lora_kit.training.report.artifacts import build_result_files
from lora_kit.training.results import TrainReport, build_history, collect_record_metrics

_STATE_LIMIT: Final = 2**28


def keep(
    run: str | Path, *, out: str | Path | None = None, step: int | None = None, replace: bool = False
) -> TrainReport:
    """Write the adapter of a checkpoint as the result of its training, all or nothing; the checkpoints stay.

    The base is not loaded: what was measured is what the training had measured by then. Thresholds of labels, and
    samples for the report, are not there, since only the end of a training makes them.

    Args:
        run: the folder of the checkpoints, `<out>.run`, or the `out` of the recipe.
        out: the folder to write; None for the `out` beside the checkpoints.
        step: of the checkpoint; None for what the training would keep if it ended at the newest one that is whole.
        replace: whether an adapter that is there may be replaced.

    Returns:
        The report of the training up to the checkpoint.

    Raises:
        AdapterError: there is no such checkpoint, or it holds no adapter.
        StorageError: the training is running, or the output exists or cannot be written.
    """
    folder = _find_run(parse_path(run, name="run"))
    target = folder.out if out is None else parse_path(out, name="out")
    with lock_output(folder.folder):
        newest, kept = _choose_checkpoints(folder, step)
        _check_holds_adapter(kept)
        record = read_record(kept.folder, allow=()) or {}
        check_files(kept.folder, record)
        recipe = _read_recipe(record, target)
        check_output_writable(recipe)
        check_output_available(recipe, replace=replace)
        report = _build_report(newest, kept, record, recipe)
        return _write_result(kept, record, report, replace=replace)


def _find_run(path: Path) -> RunFolder:
    """Return the run that a path names: the folder of its checkpoints, or its output."""
    folder = RunFolder(path.with_name(path.name.removesuffix(RUN_SUFFIX)))
    if not folder_exists(folder.folder):
        what = f"{escape_text(path)} has no checkpoints"
        raise AdapterError(what, hint="a run is the folder <out>.run; it goes when its training has ended")
    return folder


def _choose_checkpoints(folder: RunFolder, step: int | None) -> tuple[Checkpoint, Checkpoint]:
    """Return the checkpoint at which the training ends, and the one whose weights are kept.

    Raises:
        AdapterError: no checkpoint is whole, or none has this step.
    """
    complete = {checkpoint.step: checkpoint for checkpoint in folder.list_complete()}
    if not complete:
        raise AdapterError(f"{escape_text(folder.folder)} has no checkpoint that is whole")
    if step is None:
        newest = complete[max(complete)]
        best = newest.step if newest.best is None else newest.best
        return newest, complete[best] if best in complete else folder.read(best)
    if step not in complete:
        known = format_list([str(number) for number in complete])
        what = f"{escape_text(folder.folder)} has no whole checkpoint of step {step}"
        raise AdapterError(what, hint=f"it has those of step {known}")
    return complete[step], complete[step]


def _check_holds_adapter(checkpoint: Checkpoint) -> None:
    if not is_adapter_folder(checkpoint.folder):
        what = f"{escape_text(checkpoint.folder)} holds no adapter: it is of `method: full`, or an old one"
        raise AdapterError(what, hint="the same recipe goes on from it, and saves its result at the end")


def _read_recipe(record: JsonObject, out: Path) -> Recipe:
    """Return the recipe in the record of a checkpoint, with another output. What it starts from is not read."""
    fields = dict(record["recipe"])
    start = fields.pop("from", None)
    return load_recipe(fields).replace(out=str(out), start_from=start)


@dataclass(frozen=True)
class _TrainingSoFar:
    """What a checkpoint holds of its training, besides the adapter.

    Attributes:
        state: as transformers writes it.
        loop: as `lora_kit.training.loop.resumable` writes it.
    """

    state: Mapping[str, Any]
    loop: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> _TrainingSoFar:
        state = read_json(folder / STATE, limit=_STATE_LIMIT)
        return cls(state, torch.load(folder / LOOP, map_location="cpu", weights_only=True))

    @property
    def before(self) -> Evaluation | None:
        """The metrics before training; None without validation rows."""
        return None if self.loop["before"] is None else Evaluation(**self.loop["before"])

    @property
    def train_loss(self) -> float:
        """The mean loss since the last line of the log, or that of the line where it is of this step."""
        steps = self.state["global_step"] - self.loop["logged"]
        if steps:
            return float(self.loop["loss"]) / steps
        return float([entry["loss"] for entry in self.state["log_history"] if "loss" in entry][-1])

    def find_evaluation(self, step: int) -> Evaluation | None:
        """Return the metrics at a step; None where nothing was measured then."""
        entries = [entry for entry in self.state["log_history"] if entry["step"] == step and "eval_loss" in entry]
        if not entries or self.before is None:
            return None
        values = {key.removeprefix("eval_"): value for key, value in entries[-1].items() if key.startswith("eval_")}
        return Evaluation(
            loss=values.pop("loss"),
            labels=self.before.labels,
            samples=self.before.samples,
            perplexity=values.pop("perplexity", None),
            accuracy=values.pop("accuracy", None),
            further=values,
        )


def _build_report(newest: Checkpoint, kept: Checkpoint, record: JsonObject, recipe: Recipe) -> TrainReport:
    training = _TrainingSoFar.read(newest.folder)
    log = training.state["log_history"]
    report = TrainReport(
        out=Path(recipe.out),
        method=recipe.method,
        task=recipe.task,
        steps=newest.step,
        planned=training.state["max_steps"],
        kept=kept.step,
        resumed=0,
        seconds=training.loop["seconds"],
        tokens=training.loop["tokens"],
        peak_bytes=max((entry.get("peak_bytes", 0) for entry in log), default=0),
        micro_batch=training.loop["micro_batch"],
        trainable=training.loop["trainable"],
        parameters=training.loop["parameters"],
        train_loss=training.train_loss,
        before=training.before,
        after=training.find_evaluation(kept.step),
        text_pairs=record.get("text_pairs") is True,
        history=(),
        digest=None,
        recipe=recipe,
    )
    return dataclasses.replace(report, history=tuple(build_history(report, log)))


def _write_result(kept: Checkpoint, record: JsonObject, report: TrainReport, *, replace: bool) -> TrainReport:
    files = build_result_files(report, outcomes=None, num_labels=len(record.get("labels") or ()))
    facts = {"metrics": collect_record_metrics(report)}
    if record.get("method") != "peft":
        adapter = Adapter.load(kept.folder)
        adapter.save(report.out, record=facts, files=files, replace=replace)
        return dataclasses.replace(report, digest=adapter.digest)
    from lora_kit.training.job.peft_method import encode_peft_adapter

    fields = json.loads(read_text(kept.folder / CONFIG, limit=2**20))
    weights = (kept.folder / WEIGHTS).read_bytes()
    contents, digest = encode_peft_adapter(report.recipe.name, fields, weights, record={**record, **facts}, files=files)
    write_folder(report.out, contents, replace=replace, owned=is_adapter_folder)
    return dataclasses.replace(report, digest=digest)
