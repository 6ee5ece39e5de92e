"""Sweeps: what is tried, that nothing is lost or done twice however it is stopped and shared, and what is kept."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from lora_kit.adapter.adapter import Adapter
from lora_kit.cli.main import main
from lora_kit.errors import AdapterError, ConfigError, DataError, RecipeError, StorageError, VerificationError
from lora_kit.io.portable_paths import make_path_portable
from lora_kit.models.loading import Base
from lora_kit.training.train import train
from tests.support import texts
from tests.support.processes import die, in_child
from tests.support.training import LABELED, PAIRS, base_of, recipe_of

pytest.importorskip("optuna", reason="optuna is not installed (pip install 'lora-kit[sweep]')")

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.pruners import MedianPruner

from lora_kit.sweeps import worker as working
from lora_kit.sweeps.space import format_space, parse_space
from lora_kit.sweeps.sweep import sweep
from lora_kit.sweeps.sweep_plan import SweepPlan, propose_params, read_plan
from lora_kit.sweeps.sweep_report import SweepReport, TrialReport, plot_trials
from lora_kit.sweeps.trials import SweepStudy, open_study

RATES = "train.learning_rate=1e-3..1e-1:log"
RANKS = "lora.r=2,4,8"


@pytest.fixture(autouse=True)
def _nothing_beside_the_trials(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("lora_kit.sweeps.sweep_report.plot_trials", lambda *_: None)
    monkeypatch.setattr("lora_kit.sweeps.sweep_page.can_plot", lambda: False)
    monkeypatch.setattr(working._ReportEvaluations, "on_step_end", TrainerCallback.on_step_end, raising=False)
    monkeypatch.setattr(working, "train", train)
    gc.freeze()  # every training looks for garbage
    yield
    gc.unfreeze()


def swept(folder: Path, **train: Any) -> dict[str, Any]:
    """A recipe of a few steps, each of them evaluated and saved."""
    section = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, **train}
    return recipe_of(folder, steps=3, train=section)


def told(report: SweepReport) -> list[dict[str, Any]]:
    """What a sweep found, without what a clock said."""
    return [{**vars(trial), "seconds": None} for trial in report.trials]


def weights(report: SweepReport) -> bytes:
    return (report.out / "adapter_model.safetensors").read_bytes()


def adapters(report: SweepReport) -> list[str]:
    """The trials whose results are still there."""
    return sorted(path.parent.parent.name for path in report.folder.glob("trials/*/*/adapter_config.json"))


def at_step(number: int, step: int, act: Callable[[], None]) -> None:
    """In this process, act after a step of a trial."""

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (self._trial.number, state.global_step) == (number, step):
            act()

    working._ReportEvaluations.on_step_end = on_step_end  # type: ignore[method-assign]


def counted(file: Path) -> None:
    """In this process and its children, note every training that is begun."""

    def noted(recipe: Any, **how: Any) -> Any:
        with open(file, "a") as notes:
            notes.write(Path(recipe.out).parent.name + "\n")
        return train(recipe, **how)

    working.train = noted


@pytest.fixture
def begun(tmp_path: Path) -> Callable[[], Counter[str]]:
    """How often each trial was begun."""
    file = tmp_path / "begun"
    counted(file)
    return lambda: Counter(file.read_text().split())


# What is tried


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora.r=4,8,16", CategoricalDistribution((4, 8, 16))),
        ("train.learning_rate=1e-4,2e-4", CategoricalDistribution((1e-4, 2e-4))),
        ("train.learning_rate=1e-4..1e-2:log", FloatDistribution(1e-4, 1e-2, log=True)),
        ("lora.lora_dropout=0.0..0.5", FloatDistribution(0.0, 0.5)),
        ("lora.lora_dropout=0..0.5", FloatDistribution(0.0, 0.5)),
        ("train.warmup_steps=0..100", IntDistribution(0, 100)),
        ("lora.use_dora=true,false", CategoricalDistribution((True, False))),
        (
            "lora.target_modules=all-linear,[q_proj, v_proj]",
            CategoricalDistribution(("all-linear", '["q_proj", "v_proj"]')),
        ),
        ("data.train=../a.jsonl,../b.jsonl", CategoricalDistribution(("../a.jsonl", "../b.jsonl"))),
        ("--lora.r=4", CategoricalDistribution((4,))),
    ],
)
def test_a_space_is_read_as_it_is_meant(text: str, expected: BaseDistribution) -> None:
    space = parse_space([text])
    assert list(space.values()) == [expected]
    (found,) = space.values()
    assert list(map(type, getattr(found, "choices", ()))) == list(map(type, getattr(expected, "choices", ())))
    assert parse_space(format_space(space)) == space


@pytest.mark.parametrize(
    ("over", "how", "message"),
    [
        (["learning_rate=1,2"], {}, "no key 'learning_rate'.*did you mean 'train.learning_rate'"),
        (["lora.rr=1,2"], {}, "no key 'lora.rr'.*did you mean 'lora.r'"),
        (["train.output_dir=a,b"], {}, "train.output_dir cannot be set"),
        (["lora.r=4,x"], {}, "lora.r must be a whole number; 'x' was given"),
        (["lora.r=0..8"], {}, "lora.r"),
        (["lora.r=8..4"], {}, "lora.r=8..4 is invalid.*low"),
        (["train.learning_rate=0..1:log"], {}, "train.learning_rate=0..1:log is invalid.*log"),
        (["lora.r=4,4"], {}, "a value twice"),
        (["lora.r=4", "lora.r=8"], {}, "swept twice"),
        (["lora.r"], {}, "not KEY=VALUES"),
        ([], {}, "at least one recipe key"),
        (["out=a,b"], {}, "out cannot be swept"),
        (["task=causal-lm,classify"], {}, "task cannot be swept"),
        (["data.validation=a,b"], {}, "compared on the same rows"),
        ([RATES], {"method": "grid"}, "a range was given"),
        ([RANKS], {"method": "bayes"}, "method 'bayes' is not known"),
        ([RANKS], {"metric": "los"}, "did you mean 'loss'"),
        ([RANKS], {"metric": "accuracy"}, "does not fit task causal-lm"),
        ([RANKS], {"prune": "median", "overrides": {"train.eval_strategy": "no"}}, "eval_strategy is no"),
        ([RANKS], {"overrides": {"data.validation": None, "train.eval_strategy": "no"}}, "data.validation"),
        ([RANKS], {"trials": 0}, "trials must be at least 1"),
        ([RANKS], {"workers": 0}, "workers must be at least 1"),
        ([RANKS], {"workers": 2}, "cannot be shared by several workers"),
        ([RANKS], {"together": 0}, "together must be at least 1"),
        (["data.max_length=32,64"], {"together": 2}, "data.max_length cannot be swept with trials trained together"),
        ([RATES], {"together": 2, "overrides": {"method": "full"}}, "method full changes the base"),
        ([RANKS], {"keep": "some"}, "keep 'some' is not known"),
        (["base=a,b"], {}, "base is swept"),
        ([RANKS], {"overrides": {"lora.rx": 1}}, "unknown key lora.rx"),
        (["data.train=no.jsonl"], {}, "no.jsonl"),
    ],
)
def test_what_is_wrong_is_refused_before_any_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, over: list[str], how: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(working, "train", lambda *_, **__: pytest.fail("a trial ran"))
    with pytest.raises((ConfigError, DataError), match=message):
        sweep(swept(tmp_path), over, base=base_of(), **how)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_rows_that_are_wrong_and_an_output_that_exists_are_refused_before_any_trial(tmp_path: Path) -> None:
    recipe = swept(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    for replace in (False, True):
        with pytest.raises(StorageError, match=r"exists already|holds something else"):
            sweep(recipe, [RANKS], base=base_of(), replace=replace)
    (tmp_path / "rows.jsonl").write_text("{")
    with pytest.raises(DataError):
        sweep({**recipe, "out": str(tmp_path / "other")}, [RANKS], base=base_of())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.jsonl"]


def plan_of(folder: Path, over: list[str], method: str, trials: int = 12, seed: int = 0) -> SweepPlan:
    return SweepPlan(
        out=str(folder / "out"),
        fields={},
        over=format_space(parse_space(over)),
        method=method,
        metric="loss",
        trials=trials,
        seed=seed,
        prune=None,
        keep="best",
        identity={},
    )


@pytest.mark.parametrize("method", ["grid", "random", "tpe"])
def test_of_a_finite_space_everything_is_tried_once(tmp_path: Path, method: str) -> None:
    from optuna.trial import TrialState

    study = open_study(plan_of(tmp_path, [RANKS, "train.seed=0,1,2"], method, trials=9), replace=False)
    for _ in range(9):
        with study.claim_trials() as (trial,):
            study.end_trial(trial, TrialState.COMPLETE, value=float(trial.params["lora.r"]), facts={})
    with study.claim_trials() as trials:
        assert not trials
    tried = [(trial.params["lora.r"], trial.params["train.seed"]) for trial in study.ended]
    assert sorted(tried) == [(rank, seed) for rank in (2, 4, 8) for seed in (0, 1, 2)]
    assert (tried == sorted(tried)) == (method == "grid")


@pytest.mark.parametrize("method", ["random", "tpe"])
def test_what_is_tried_follows_from_the_seed_and_the_trials_before(tmp_path: Path, method: str) -> None:
    from optuna.trial import TrialState

    found = []
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        study = open_study(plan_of(tmp_path / name, [RATES, RANKS], method, trials=14, seed=seed), replace=False)
        for number in range(14):
            if name == "same":  # every trial in a study of its own, as if the process were a new one each time
                study = SweepStudy(study.plan)
                assert propose_params(study.plan, study.trials) == propose_params(study.plan, study.trials)
            with study.claim_trials() as (trial,):
                assert trial.number == number
                study.end_trial(trial, TrialState.COMPLETE, value=float(trial.params["train.learning_rate"]), facts={})
        found.append([trial.params for trial in study.ended])
    assert found[0] == found[1]
    assert all(one != other for one, other in zip(found[0], found[2], strict=True))
    rates = [params["train.learning_rate"] for params in found[0]]
    assert all(1e-3 <= rate <= 1e-1 for rate in rates)
    assert len(set(rates)) == 14


# What comes out


def test_a_grid_keeps_the_best_adapter_as_if_it_had_been_trained_alone(
    tmp_path: Path, begun: Callable[[], Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the recipe beside the adapter names files relative to the project
    base = base_of()
    before = {key: tensor.clone() for key, tensor in base.model.state_dict().items()}
    over = {"lora.r": [2, 4], "train.learning_rate": "1e-3,3e-2"}
    report = sweep(swept(tmp_path), over, base=base)
    assert begun() == Counter("0123")
    values = [trial.value for trial in report.trials]
    assert len(set(values)) == 4
    assert report.best.value == min(values)  # type: ignore[type-var]
    assert report.best.params["train.learning_rate"] == 3e-2
    assert [trial.number for trial in report.trials] == [0, 1, 2, 3]
    assert report.best.metrics["loss"] == report.best.value
    assert not adapters(report)
    adapter = Adapter.load(report.out)
    assert adapter.config.r == report.best.params["lora.r"]
    assert adapter.record["recipe"]["out"] == make_path_portable(str(report.out))
    assert "# out" in (report.out / "README.md").read_text()
    alone = train(report.out / "recipe.yaml", base=base_of(), overrides={"out": str(tmp_path / "alone")})
    assert alone.digest == adapter.digest
    assert (alone.out / "adapter_model.safetensors").read_bytes() == weights(report)
    assert json.loads((report.folder / "results.json").read_text())["best"] == report.best.number
    assert f"trial {report.best.number} of 4" in report.page.read_text("utf-8")
    after = base.model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "begun", "out", "out.sweep", "rows.jsonl"]


def test_all_adapters_stay_where_that_is_asked_for(tmp_path: Path) -> None:
    report = sweep(swept(tmp_path), [RANKS], base=base_of(), keep="all")
    assert adapters(report) == ["0", "1", "2"]


def test_a_model_trained_whole_is_kept_like_an_adapter(tmp_path: Path) -> None:
    recipe = {**swept(tmp_path), "method": "full"}
    report = sweep(recipe, ["train.learning_rate=1e-4,1e-2"], base=base_of())
    kept = json.loads((report.out / "sweep.json").read_text())
    assert (kept["trial"], kept["loss"]) == (report.best.number, report.best.value)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in report.out.iterdir()}
    assert f"out: {make_path_portable(str(report.out))}\n" in (report.out / "recipe.yaml").read_text()
    assert not list((report.folder / "trials").iterdir())


def test_the_picture_shows_numbers_names_and_trials_without_a_value(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, [RATES, "lora.use_dora=true,false", "lora.r=2,4"], "tpe")

    def trial(number: int, state: str, value: float | None) -> TrialReport:
        params = {"train.learning_rate": 1e-2, "lora.use_dora": True, "lora.r": 2 + number}
        facts: dict[str, Any] = {"metrics": {}, "steps": None, "seconds": None, "error": ""}
        return TrialReport(number=number, state=state, params=params, value=value, **facts)

    found = [trial(0, "complete", 1.0), trial(1, "pruned", 2.0), trial(2, "failed", None)]
    image = plot_trials(plan, found)
    assert image is not None
    assert image.startswith(b"\x89PNG")
    assert image != plot_trials(plan, found[:1])


def test_a_metric_that_grows_is_made_as_large_as_it_can_be(tmp_path: Path) -> None:
    recipe = {**swept(tmp_path), "task": "classify"}
    texts.write(tmp_path / "rows.jsonl", LABELED)
    over = ["train.learning_rate=1e-6,5e-2"]
    steps = {"train.max_steps": 20, "train.eval_strategy": "no", "train.save_strategy": "no"}
    report = sweep(recipe, over, base=base_of("bert", labels=2), metric="f1", overrides=steps)
    assert report.direction == "maximize"
    one, other = (trial.value for trial in report.trials)
    assert one is not None
    assert other == 1.0
    assert one < other
    assert report.best.number == 1


def test_the_base_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(name: str, **_: Any) -> Base:
        loaded.append(name)
        return base_of()

    monkeypatch.setattr("lora_kit.training.job.base_model.load_base", load)
    report = sweep(swept(tmp_path), [RANKS], trials=2)
    assert loaded == ["tiny"]
    assert len(report.trials) == 2
    own = sweep({**swept(tmp_path), "dtype": "fp32", "out": str(tmp_path / "own")}, [RANKS], trials=2)
    assert loaded == ["tiny"] * 4  # a dtype that is asked for is one that each training asks for
    assert told(own) == told(report)


def test_a_trial_that_fails_is_a_result_and_the_others_go_on(tmp_path: Path) -> None:
    over = ["train.learning_rate=1e-2,1e38"]
    report = sweep(swept(tmp_path), over, base=base_of(), overrides={"train.max_grad_norm": 0, "train.optim": "sgd"})
    assert [trial.state for trial in report.trials] == ["complete", "failed"]
    assert "became" in report.trials[1].error or "not finite" in report.trials[1].error
    assert report.best.number == 0
    assert not adapters(report)
    with pytest.raises(VerificationError, match="none of 1 trials came through; trial 0"):
        sweep(
            {**swept(tmp_path), "out": str(tmp_path / "none")},
            ["train.learning_rate=1e38"],
            base=base_of(),
            overrides={"train.max_grad_norm": 0, "train.optim": "sgd"},
        )
    assert not (tmp_path / "none").exists()


def test_more_trials_may_be_asked_for_later(tmp_path: Path, begun: Callable[[], Counter[str]]) -> None:
    recipe = swept(tmp_path)
    first = sweep(recipe, [RATES], base=base_of(), trials=2)
    again = sweep(recipe, [RATES], base=base_of(), trials=2)
    assert told(again) == told(first)
    assert begun() == Counter("01")
    more = sweep(recipe, [RATES], base=base_of(), trials=3)
    assert begun() == Counter("012")
    assert told(more)[:2] == told(first)
    assert weights(more) == weights(
        sweep({**recipe, "out": str(tmp_path / "at once")}, [RATES], base=base_of(), trials=3)
    )


# Several at once


def test_trials_trained_together_are_those_of_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, over = swept(tmp_path), [RANKS, "train.learning_rate=1e-3,1e30"]
    alone = sweep({**recipe, "out": str(tmp_path / "alone")}, over, base=base_of(), keep="all", prune="median")
    monkeypatch.setattr(working, "train", lambda *_, **__: pytest.fail("a trial was trained alone"))
    together = sweep(recipe, over, base=base_of(), keep="all", together=3, prune="median")
    assert told(together) == told(alone)
    assert {trial.state for trial in alone.trials} == {"complete", "failed"}
    for trial in (trial for trial in alone.trials if trial.state == "complete"):
        one, other = (report.folder / "trials" / str(trial.number) for report in (alone, together))
        paths = (one / "alone" / "adapter_model.safetensors", other / "out" / "adapter_model.safetensors")
        assert paths[0].read_bytes() == paths[1].read_bytes()
    assert weights(together) == weights(alone)


def test_killed_while_trials_are_trained_together_it_finds_what_an_unbroken_sweep_finds(tmp_path: Path) -> None:
    recipe = swept(tmp_path)
    unbroken = sweep({**recipe, "out": str(tmp_path / "unbroken")}, [RANKS], base=base_of(), together=3)

    def work() -> None:
        at_step(1, 2, die)
        sweep(recipe, [RANKS], base=base_of(), together=3)

    assert in_child(work) == -signal.SIGKILL
    study = SweepStudy(read_plan(tmp_path / "out.sweep"))
    assert [trial.state.name for trial in study.trials] == ["RUNNING"] * 3
    resumed = []
    at_step(0, 3, lambda: resumed.append(0))
    report = sweep(recipe, [RANKS], base=base_of(), together=2)
    assert told(report) == told(unbroken)
    assert resumed == [0]
    assert weights(report) == weights(unbroken)


def test_a_trial_that_is_pruned_among_others_changes_none_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before it is recorded that it was pruned, too: it is not trained again."""
    monkeypatch.setattr("lora_kit.sweeps.trials.MedianPruner", lambda: MedianPruner(n_startup_trials=1))
    recipe, rates = swept(tmp_path), {"train.learning_rate": [1e-3, 2e-3, 1e-6, 5e-2]}
    how: dict[str, Any] = {"together": 2, "keep": "all", "prune": "median"}
    alone = train({**recipe, "out": str(tmp_path / "alone")}, overrides={"train.learning_rate": 5e-2}, base=base_of())

    def work() -> None:
        end = SweepStudy.end_trial

        def dies(self: SweepStudy, trial: Any, *given: Any, **facts: Any) -> None:
            die() if trial.number == 2 else end(self, trial, *given, **facts)

        SweepStudy.end_trial = dies  # type: ignore[method-assign]
        sweep(recipe, rates, base=base_of(), **how)

    assert in_child(work) == -signal.SIGKILL
    assert [trial.state.name for trial in SweepStudy(read_plan(tmp_path / "out.sweep")).trials[2:]] == ["RUNNING"] * 2
    again: list[int] = []
    at_step(2, 1, lambda: again.append(2))
    report = sweep(recipe, rates, base=base_of(), **how)
    assert not again
    assert (report.trials[2].state, report.trials[2].steps) == ("pruned", 1)
    assert alone.after is not None
    assert report.trials[3].metrics == alone.after.metrics()
    assert [trial.state for trial in report.trials] == ["complete", "complete", "pruned", "complete"]
    assert weights(report) == (alone.out / "adapter_model.safetensors").read_bytes()


def test_an_error_of_the_machine_ends_a_sweep_of_trials_together_and_leaves_its_trial(tmp_path: Path) -> None:
    def fail() -> None:
        raise StorageError("no space left on the device")

    at_step(1, 2, fail)
    with pytest.raises(StorageError, match="no space left"):
        sweep(swept(tmp_path), [RANKS], base=base_of(), together=3)
    states = [trial.state.name for trial in SweepStudy(read_plan(tmp_path / "out.sweep")).trials]
    assert states == ["COMPLETE", "RUNNING", "COMPLETE"]


# Stopped and started again


@pytest.mark.slow
def test_killed_twice_and_started_again_it_finds_what_an_unbroken_sweep_finds(
    tmp_path: Path, begun: Callable[[], Counter[str]]
) -> None:
    recipe = swept(tmp_path)
    how: dict[str, Any] = {"trials": 12, "prune": "median", "seed": 3}
    over = [RATES, RANKS]
    unbroken = sweep({**recipe, "out": str(tmp_path / "unbroken")}, over, base=base_of(), **how)
    once = begun()
    assert once == Counter(map(str, range(12)))
    states = Counter(trial.state for trial in unbroken.trials)
    assert states["pruned"]
    assert states["complete"] > 1
    pruned = next(trial.number for trial in unbroken.trials if trial.state == "pruned")

    def killed(number: int, step: int) -> None:
        def work() -> None:
            at_step(number, step, die)
            sweep(recipe, over, base=base_of(), **how)

        assert in_child(work) == -signal.SIGKILL

    killed(2, 2)
    assert SweepStudy(read_plan(tmp_path / "out.sweep")).trials[2].state.name == "RUNNING"
    killed(pruned, 1)
    report = sweep(recipe, over, base=base_of(), **how)
    assert told(report) == told(unbroken)
    assert report.best.number == unbroken.best.number
    assert weights(report) == weights(unbroken)
    assert begun() - once == once + Counter(["2", str(pruned)])
    assert not adapters(report)


def test_killed_after_it_was_decided_to_prune_the_trial_is_pruned_and_not_run_again(
    tmp_path: Path, begun: Callable[[], Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, values = swept(tmp_path), {"train.learning_rate": [0.1, 0.09, 0.08, 0.07, 0.06, 1e-6]}

    def work() -> None:
        end = SweepStudy.end_trial

        def dies(self: SweepStudy, trial: Any, *given: Any, **facts: Any) -> None:
            die() if trial.number == 5 else end(self, trial, *given, **facts)

        SweepStudy.end_trial = dies  # type: ignore[method-assign]
        sweep(recipe, values, base=base_of(), prune="median")

    assert in_child(work) == -signal.SIGKILL
    report = sweep(recipe, values, base=base_of(), prune="median")
    assert begun() == Counter("012345")
    assert report.trials[5].state == "pruned"
    assert report.trials[5].steps == 1
    assert report.trials[5].value is not None


def test_killed_before_the_best_was_in_its_place_it_is_put_there(tmp_path: Path) -> None:
    def work() -> None:
        import lora_kit.sweeps.sweep_report as reporting

        reporting._write_best = lambda *_, **__: die()
        sweep(swept(tmp_path), [RANKS], base=base_of())

    assert in_child(work) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    working.train = lambda *_, **__: pytest.fail("a trial ran again")
    report = sweep(swept(tmp_path), [RANKS], base=base_of())
    assert Adapter.load(report.out).config.r == report.best.params["lora.r"]


def test_a_journal_that_ends_within_a_line_is_gone_on_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = swept(tmp_path)
    first = sweep(recipe, [RANKS], base=base_of(), trials=2)
    with open(first.folder / "journal.log", "ab") as journal:
        journal.write(b'{"op_code":4,"worker')
    report = sweep(recipe, [RANKS], base=base_of(), trials=3)
    assert "unfinished line" in caplog.text
    assert told(report)[:2] == told(first)
    assert len(report.trials) == 3


def test_an_interrupt_of_the_command_exits_with_130_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lora_kit.training.job.base_model.load_base", lambda *_, **__: base_of())
    (tmp_path / "recipe.yaml").write_text(json.dumps(swept(tmp_path)))
    command = ["sweep", str(tmp_path / "recipe.yaml"), "--over", RANKS, "--over", RATES, "--trials", "3"]
    at_step(1, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert main(command) == 130
    at_step(-1, 0, die)
    interrupted = capsys.readouterr().err
    assert "trial 0: loss" in interrupted
    assert "the same command continues" in interrupted
    assert main([*command, "--json"]) == 0
    captured = capsys.readouterr()
    assert "continuing trial 1" in captured.err
    assert "3 of 3 done, best: trial" in captured.err
    assert "trial 0:" not in captured.err
    found = json.loads(captured.out)
    assert [trial["state"] for trial in found["trials"]] == ["complete"] * 3
    assert main(command) == 0
    table = capsys.readouterr().out
    assert table.split()[:4] == ["trial", "loss", "lora.r", "train.learning_rate"]
    assert f"best     trial {found['best']}" in table
    assert main(["sweep", str(tmp_path / "recipe.yaml"), "--over", "lora.rr=1,2"]) == 2
    assert "did you mean --over lora.r?" in capsys.readouterr().err


# Another sweep


def test_another_recipe_space_or_data_is_refused_with_the_difference(tmp_path: Path) -> None:
    recipe = swept(tmp_path)
    first = sweep(recipe, [RANKS], base=base_of(), trials=1)
    kept = Adapter.load(first.out).digest
    changes: list[tuple[Mapping[str, Any], list[str], dict[str, Any], str]] = [
        (recipe, [RANKS], {"overrides": {"train.max_steps": 4}}, r"train.max_steps was 3, is 4"),
        (recipe, ["lora.r=2,4"], {}, r"over.lora.r was \[2, 4, 8\], is \[2, 4\]"),
        (recipe, [RANKS], {"seed": 1}, r"sweep.seed was 0, is 1"),
        (recipe, [RANKS], {"method": "random", "prune": "median"}, r'(?s)method was "grid".*prune was not set'),
    ]
    for given, over, how, message in changes:
        with pytest.raises(RecipeError, match=message) as caught:
            sweep(given, over, base=base_of(), replace=False, **how)
        assert "--replace" in caught.value.hint
    texts.write(tmp_path / "rows.jsonl", PAIRS[:4])
    with pytest.raises(RecipeError, match=r"sha256.rows.train was"):
        sweep(recipe, [RANKS], base=base_of())
    assert Adapter.load(first.out).digest == kept
    replaced = sweep(recipe, [RANKS], base=base_of(), trials=1, replace=True)
    assert replaced.best.value != first.best.value
    assert len(replaced.trials) == 1


def test_a_plan_that_is_damaged_is_not_overwritten_unasked(tmp_path: Path) -> None:
    recipe = swept(tmp_path)
    sweep(recipe, [RANKS], base=base_of(), trials=1)
    (tmp_path / "out.sweep" / "plan.json").write_text('{"out": "x"}')
    with pytest.raises(RecipeError, match=r"plan.json is damaged"):
        sweep(recipe, [RANKS], base=base_of(), trials=1)
    assert len(sweep(recipe, [RANKS], base=base_of(), trials=1, replace=True).trials) == 1


def test_a_journal_that_is_damaged_is_an_error_that_names_it(tmp_path: Path) -> None:
    recipe = swept(tmp_path)
    first = sweep(recipe, [RANKS], base=base_of(), trials=1)
    (first.folder / "journal.log").write_text("{\n{\n")
    with pytest.raises(AdapterError, match=r"journal.log is damaged: .*remove the folder"):
        sweep(recipe, [RANKS], base=base_of(), trials=2)


def test_without_optuna_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"needs optuna") as caught:
        sweep(swept(tmp_path), [RANKS], base=base_of())
    assert "lora-kit[sweep]" in caught.value.hint


# Several processes


def forked(work: Callable[[], Any]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        signal.alarm(300)  # who waits for a trial that nobody runs does not wait for ever
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_two_processes_share_a_sweep_and_no_trial_is_run_twice(
    tmp_path: Path, begun: Callable[[], Counter[str]]
) -> None:
    recipe, over = swept(tmp_path), ["lora.r=2,3,4,5"]

    def work() -> None:
        report = sweep(recipe, over, base=base_of())
        assert len(report.trials) == 4
        assert Adapter.load(report.out).config.r == report.best.params["lora.r"]

    children = [forked(work), forked(work)]
    assert [ended(child) for child in children] == [0, 0]
    assert begun() == Counter("0123")
    alone = sweep({**recipe, "out": str(tmp_path / "alone")}, over, base=base_of())
    shared = sweep(recipe, over, base=base_of())
    assert told(shared) == told(alone)
    assert weights(shared) == weights(alone)


def test_a_trial_whose_process_was_killed_is_run_by_the_other(
    tmp_path: Path, begun: Callable[[], Counter[str]]
) -> None:
    recipe, over = swept(tmp_path), ["lora.r=2,3,4"]

    def dies() -> None:
        at_step(0, 2, die)
        sweep(recipe, over, base=base_of())

    def works() -> None:
        while not (tmp_path / "out.sweep" / "locks" / "0").exists():
            time.sleep(0.01)
        report = sweep(recipe, over, base=base_of())
        assert [trial.state for trial in report.trials] == ["complete"] * 3

    first, second = forked(dies), forked(works)
    assert (ended(first), ended(second)) == (-signal.SIGKILL, 0)
    found = begun()
    assert found.pop("0") == 2
    assert found == Counter("12")
    alone = sweep({**recipe, "out": str(tmp_path / "alone")}, over, base=base_of())
    assert told(sweep(recipe, over, base=base_of())) == told(alone)


def test_a_sweep_that_somebody_works_on_is_not_replaced_by_another(tmp_path: Path) -> None:
    recipe, told = swept(tmp_path), []

    def other() -> None:
        at_step(-1, 0, die)  # once
        with pytest.raises(StorageError, match="another process works on") as caught:
            sweep(recipe, [RATES], base=base_of(), replace=True)
        told.append(str(caught.value))

    at_step(1, 1, other)
    report = sweep(recipe, [RANKS], base=base_of())
    assert len(told) == 1
    assert len(report.trials) == 3


@pytest.mark.slow
def test_workers_share_a_sweep_and_end_with_what_started_them(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    base_of().model.save_pretrained(folder)
    texts.tokenizer().save_pretrained(folder)
    recipe = {**swept(tmp_path), "base": str(folder)}
    over = ["lora.r=2,3,4,5,6,7"]
    shared = sweep(recipe, over, workers=2)
    alone = sweep({**recipe, "out": str(tmp_path / "alone")}, over)
    assert told(shared) == told(alone)
    assert weights(shared) == weights(alone)
    logs = [(shared.folder / f"worker-{number}.log").read_text() for number in range(2)]
    assert all("trial" in log for log in logs)

    again = {**recipe, "out": str(tmp_path / "stopped")}
    child = forked(lambda: sweep(again, over, workers=2))
    journal = tmp_path / "stopped.sweep" / "journal.log"
    while not (journal.exists() and journal.read_text().count('"op_code":6')):
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    deadline = time.monotonic() + 60
    study = SweepStudy(read_plan(tmp_path / "stopped.sweep"))
    while any(study._lock_of(trial.number).is_held for trial in study.trials):
        assert time.monotonic() < deadline, "workers outlive what started them"
        time.sleep(0.2)
    assert told(sweep(again, over)) == told(alone)


def test_a_sweep_whose_folder_is_taken_away_ends(tmp_path: Path) -> None:
    recipe = swept(tmp_path)
    at_step(1, 1, lambda: shutil.rmtree(tmp_path / "out.sweep"))
    with pytest.raises(StorageError, match="was removed while its trials ran"):
        sweep(recipe, [RANKS], base=base_of())


def test_a_process_that_only_waits_ends_when_the_folder_is_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study: Any = open_study(plan_of(tmp_path, [RANKS], "grid"), replace=False)
    log = working._TrialLog(study)
    shutil.rmtree(study.plan.folder)
    # Another process runs the last trial; nobody will ever see it end.
    study.claim_trials = lambda most: contextlib.nullcontext([])
    monkeypatch.setattr(working, "load_recipe", lambda fields: None)
    monkeypatch.setattr(working, "_TrialLog", lambda study: log)
    monkeypatch.setattr(working, "_start_workers", lambda plan, count: contextlib.nullcontext([]))
    for work in (working.Worker(study).run, lambda: working.run_workers(study, 2)):
        with pytest.raises(StorageError, match="was removed while its trials ran"):
            work()
