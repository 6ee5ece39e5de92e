"""What a sweep found: its trials in a table, as JSON and as a picture; the best one's result in its place."""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from optuna.trial import FrozenTrial, TrialState

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.folder import CARD, CONFIG, RECORD, WEIGHTS, is_adapter_folder
from lora_kit.errors import AdapterError, VerificationError
from lora_kit.io.atomic_write import stage_folder, write_file
from lora_kit.io.read import exists, folder_exists, read_json
from lora_kit.names import RECIPE_FILE
from lora_kit.sweeps.space import Params
from lora_kit.sweeps.study import Study
from lora_kit.sweeps.sweep_plan import Plan, over_of
from lora_kit.training.job.output import is_trained_model_folder

logger = logging.getLogger(__name__)

RESULTS: Final = "results.json"
PICTURE: Final = "results.png"
MARK: Final = "sweep.json"
"""Beside the best trial's result: which sweep and which trial it is of."""
_STATES: Final = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}


@dataclass(frozen=True, kw_only=True)
class TrialReport:
    """What a trial did.

    Attributes:
        number: from 0.
        state: `complete`, `pruned` or `failed`.
        params: recipe keys and their values.
        value: of the metric; of the last evaluation where it was pruned; None where it failed.
        metrics: on the validation rows, after the training.
        steps: optimiser steps. seconds: of the training.
        error: why it failed, or an empty string.
    """

    number: int
    state: str
    params: Params
    value: float | None
    metrics: Mapping[str, float]
    steps: int | None
    seconds: float | None
    error: str

    @classmethod
    def of(cls, trial: FrozenTrial) -> TrialReport:
        facts = trial.user_attrs
        return cls(
            number=trial.number,
            state=_STATES[trial.state],
            params=trial.params,
            value=trial.value,
            metrics=facts.get("metrics", {}),
            steps=facts.get("steps"),
            seconds=facts.get("seconds"),
            error=facts.get("error", ""),
        )


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """What a sweep found.

    Attributes:
        out: folder of the best trial's adapter (or model).
        folder: of the sweep, with `results.json` and `results.png`.
        metric: that trials are compared by. direction: `minimize` or `maximize`.
        trials: in the order in which they began.
        best: the trial with the best value.
    """

    out: Path
    folder: Path
    metric: str
    direction: str
    trials: tuple[TrialReport, ...]
    best: TrialReport

    def to_json(self) -> dict[str, Any]:
        trials = [{**vars(trial), "params": dict(trial.params)} for trial in self.trials]
        facts = {"out": str(self.out), "metric": self.metric, "direction": self.direction}
        return {**facts, "best": self.best.number, "trials": trials}


def finished(study: Study, *, replace: bool) -> SweepReport:
    """Put the best trial's result in its place and write what was found; the same again where that was done before.

    Raises:
        VerificationError: no trial came through.
        StorageError: something else is in that place, and may not be replaced.
    """
    plan = study.plan
    with study.alone():
        best = study.best
        if best is None:
            failed = next((trial for trial in study.done if "error" in trial.user_attrs), None)
            why = "" if failed is None else f"; trial {failed.number}: {failed.user_attrs['error']}"
            raise VerificationError(f"none of {plan.trials} trials came through{why}")
        mark = {"sweep": plan.digest, "trial": best.number, plan.metric: best.value, "params": best.params}
        if mark_of(plan.out) != mark:
            _place(plan, best, mark, replace=replace or mark_of(plan.out).get("sweep") == plan.digest)
        if plan.keep == "best" and folder_exists(plan.home(best.number)):
            shutil.rmtree(plan.home(best.number))
        trials = tuple(map(TrialReport.of, study.done))
        shared: dict[str, Any] = {"metric": plan.metric, "direction": plan.direction}
        report = SweepReport(out=plan.out, folder=plan.folder, trials=trials, best=trials[best.number], **shared)
        found = {"over": over_of(plan.space), "method": plan.method, "seed": plan.seed, **report.to_json()}
        write_file(plan.folder / RESULTS, json.dumps(found, indent=1).encode())
        image = picture(plan, trials)
        if image:
            write_file(plan.folder / PICTURE, image)
    return report


def mark_of(out: Path) -> dict[str, Any]:
    """Which sweep and trial a folder is of; empty where it is of none."""
    if not exists(out / MARK):
        return {}
    try:
        return read_json(out / MARK, limit=2**20)
    except AdapterError:
        return {}


def _place(plan: Plan, best: FrozenTrial, mark: Mapping[str, Any], *, replace: bool) -> None:
    """The best trial's folder at `out`, as if it had been trained there."""
    source = plan.result(best.number)
    recipe = yaml.safe_load((source / RECIPE_FILE).read_text(encoding="utf-8")) | {"out": str(plan.out)}
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120)
    changed = {RECIPE_FILE: text.encode(), MARK: json.dumps(dict(mark), indent=1).encode()}
    if exists(source / RECORD):
        own = (CARD, CONFIG, WEIGHTS, RECORD)
        files = {path.name: path.read_bytes() for path in source.iterdir() if path.name not in own}
        adapter = Adapter.load(source)
        adapter.save(plan.out, record={"recipe": recipe}, files=files | changed, replace=replace)
        return
    with stage_folder(plan.out, replace=replace, owned=is_trained_model_folder) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        for name, data in changed.items():
            (folder / name).write_bytes(data)


def owned(out: Path) -> bool:
    """Whether a folder is an adapter or a model of ours, which may be replaced."""
    return is_adapter_folder(out) or is_trained_model_folder(out)


def picture(plan: Plan, trials: Sequence[TrialReport]) -> bytes | None:
    """A PNG: the metric trial by trial, and over each key; None where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no %s: matplotlib is not installed (pip install 'lora-kit[plot]')", PICTURE)
        return None
    shown = [trial for trial in trials if trial.value is not None]
    figure = Figure(figsize=(4 * (1 + len(plan.space)), 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 1 + len(plan.space), sharey=True, squeeze=False)[0]
    _points(panels[0], [trial.number for trial in shown], shown)
    panels[0].set(xlabel="trial", ylabel=plan.metric, title=plan.out.name)
    for panel, (key, values) in zip(panels[1:], plan.space.items(), strict=True):
        numeric = not any(isinstance(trial.params[key], (str, bool, type(None))) for trial in shown)
        _points(panel, [trial.params[key] if numeric else str(trial.params[key]) for trial in shown], shown)
        panel.set(xlabel=key, xscale="log" if getattr(values, "log", False) else "linear")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _points(panel: Any, places: Sequence[Any], trials: Sequence[TrialReport]) -> None:
    for state, marker in (("complete", "o"), ("pruned", "x")):
        chosen = [(at, trial.value) for at, trial in zip(places, trials, strict=True) if trial.state == state]
        if chosen:
            panel.scatter(*zip(*chosen, strict=True), marker=marker, label=state)
    panel.grid(alpha=0.3)
