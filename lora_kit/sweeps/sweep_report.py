"""The result of a sweep: the best trial's adapter at `out`; all trials as a table, as JSON and as a picture."""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import yaml
from optuna.trial import FrozenTrial, TrialState

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.adapter_record import RECORD
from lora_kit.adapter.folder import CARD, CONFIG, WEIGHTS, is_adapter_folder
from lora_kit.errors import AdapterError, StorageError, VerificationError
from lora_kit.io.atomic_write import check_output, stage_folder, write_file
from lora_kit.io.portable_paths import make_path_portable
from lora_kit.io.read import exists, read_json
from lora_kit.io.text import escape_text
from lora_kit.names import RECIPE_FILE
from lora_kit.runs.sweep_status import SWEEP_RESULTS
from lora_kit.sweeps.space import Params, Value
from lora_kit.sweeps.sweep_page import render_sweep_page
from lora_kit.sweeps.sweep_plan import SweepPlan
from lora_kit.sweeps.trials import SweepStudy
from lora_kit.training.job.output import REPORT_FILE, is_trained_model_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

PICTURE: Final = "results.png"
ORIGIN: Final = "sweep.json"
"""File beside the best trial's result: which sweep and which trial the result is of."""
_FACTS: Final = ("metrics", "steps", "seconds", "error")
"""Attributes of a trial in the journal that its report gives."""
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
        steps: optimizer steps.
        seconds: of the training.
        error: why it failed, or an empty string.
    """

    number: int
    state: str
    params: Params
    value: float | None
    metrics: Mapping[str, float] = field(default_factory=dict)
    steps: int | None = None
    seconds: float | None = None
    error: str = ""

    @classmethod
    def of(cls, trial: FrozenTrial) -> TrialReport:
        facts = {key: trial.user_attrs[key] for key in _FACTS if key in trial.user_attrs}
        return cls(number=trial.number, state=_STATES[trial.state], params=trial.params, value=trial.value, **facts)


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """What a sweep found.

    Attributes:
        out: folder of the best trial's adapter (or model).
        folder: of the sweep, with `results.json`, `results.png` and `report.html`.
        metric: by which trials are compared.
        direction: `minimize` or `maximize`.
        trials: in the order in which they began.
        best: the trial with the best value.
    """

    out: Path
    folder: Path
    metric: str
    direction: str
    trials: tuple[TrialReport, ...]
    best: TrialReport

    @property
    def page(self) -> Path:
        """The page of the sweep."""
        return self.folder / REPORT_FILE

    def to_json(self) -> dict[str, object]:
        trials = [{**vars(trial), "params": dict(trial.params)} for trial in self.trials]
        facts = {"out": str(self.out), "metric": self.metric, "direction": self.direction}
        return {**facts, "best": self.best.number, "trials": trials}


def finish_sweep(study: SweepStudy, *, replace: bool) -> SweepReport:
    """Write the best trial's result to `out`, and the report; a finished sweep is only reported again.

    Raises:
        VerificationError: no trial is complete.
        StorageError: something else is at `out`, and may not be replaced.
    """
    plan = study.plan
    with study.exclusive():
        best = study.best
        if best is None:
            errors = (f"; trial {trial.number}: {trial.user_attrs['error']}" for trial in study.ended
                      if trial.state == TrialState.FAIL)  # fmt: skip
            raise VerificationError(f"none of {plan.trials} trials came through{next(errors, '')}")
        out = Path(plan.out)
        origin = {"sweep": plan.digest, "trial": best.number, plan.metric: best.value, "params": best.params}
        stored = read_origin(out)
        if stored != origin:
            _write_best(plan, best, origin, replace=replace or stored.get("sweep") == plan.digest)
        if plan.keep == "best":
            study.remove_results()
        trials = tuple(map(TrialReport.of, study.ended))
        report = SweepReport(out=out, folder=plan.folder, metric=plan.metric, direction=plan.direction, trials=trials,
                             best=TrialReport.of(best))  # fmt: skip
        _write_report(plan, report)
    return report


def _write_report(plan: SweepPlan, report: SweepReport) -> None:
    results = {"over": plan.over, "method": plan.method, "seed": plan.seed, **report.to_json()}
    write_file(plan.folder / SWEEP_RESULTS, json.dumps(results, indent=1).encode())
    picture = plot_trials(plan, report.trials)
    if picture:
        write_file(plan.folder / PICTURE, picture)
    write_file(report.page, render_sweep_page(plan, report.trials, report.best).encode())


# The best trial's result


def read_origin(out: Path) -> dict[str, object]:
    """Return which sweep and trial the result in a folder is of; an empty mapping if it is of none."""
    if not exists(out / ORIGIN):
        return {}
    try:
        return read_json(out / ORIGIN, limit=2**20)
    except AdapterError:
        return {}


def check_out(plan: SweepPlan, *, replace: bool) -> None:
    """Check that the best result can be written to the plan's `out`.

    Raises:
        StorageError: something else is there, and may not be replaced.
    """
    out = Path(plan.out)
    if read_origin(out).get("sweep") != plan.digest:
        check_output(out, replace=replace, owned=lambda path: is_adapter_folder(path) or is_trained_model_folder(path))


def _write_best(plan: SweepPlan, best: FrozenTrial, origin: Mapping[str, object], *, replace: bool) -> None:
    """Write the best trial's result to `out`, all or nothing, as if it had been trained there.

    Raises:
        StorageError: the result is gone: it was written before, and `out` was removed since.
    """
    source, out = plan.trial_out(best.number), Path(plan.out)
    if not exists(source / RECIPE_FILE):
        what = f"the sweep in {escape_text(plan.folder)} is done, and its best result is neither there nor in"
        raise StorageError(f"{what} {escape_text(out)}", hint="remove that folder to start anew")
    recipe = yaml.safe_load((source / RECIPE_FILE).read_text(encoding="utf-8")) | {"out": make_path_portable(plan.out)}
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120)
    changed = {RECIPE_FILE: text.encode(), ORIGIN: json.dumps(origin, indent=1).encode()}
    if exists(source / RECORD):
        of_adapter = (CARD, CONFIG, WEIGHTS, RECORD)
        files = {path.name: path.read_bytes() for path in source.iterdir() if path.name not in of_adapter}
        Adapter.load(source).save(out, record={"recipe": recipe}, files=files | changed, replace=replace)
        return
    with stage_folder(out, replace=replace, owned=is_trained_model_folder) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        for name, data in changed.items():
            (folder / name).write_bytes(data)


# The picture


def plot_trials(plan: SweepPlan, trials: Sequence[TrialReport]) -> bytes | None:
    """Return a PNG with the metric over trials and over each key; None where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no %s: matplotlib is not installed (pip install 'lora-kit[plot]')", PICTURE)
        return None
    measured = [trial for trial in trials if trial.value is not None]
    figure = Figure(figsize=(4 * (1 + len(plan.space)), 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 1 + len(plan.space), sharey=True, squeeze=False)[0]
    _scatter(panels[0], [trial.number for trial in measured], measured)
    panels[0].set(xlabel="trial", ylabel=plan.metric, title=Path(plan.out).name)
    for panel, (key, distribution) in zip(panels[1:], plan.space.items(), strict=True):
        values = [trial.params[key] for trial in measured]
        numeric = not any(isinstance(value, (str, bool, type(None))) for value in values)
        _scatter(panel, values if numeric else list(map(str, values)), measured)
        panel.set(xlabel=key, xscale="log" if getattr(distribution, "log", False) else "linear")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _scatter(panel: Axes, values: Sequence[Value], trials: Sequence[TrialReport]) -> None:
    for state, marker in (("complete", "o"), ("pruned", "x")):
        points = [(value, trial.value) for value, trial in zip(values, trials, strict=True) if trial.state == state]
        if points:
            panel.scatter(*zip(*points, strict=True), marker=marker, label=state)
    panel.grid(alpha=0.3)
