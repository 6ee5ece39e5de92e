"""The report beside an adapter, the live line, and what is reported elsewhere."""

from __future__ import annotations

import dataclasses
import functools
import io
import logging
import math
import re
import sys
import types
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kit.adapter.adapter import Adapter
from lora_kit.errors import RecipeError
from lora_kit.generation.decoding import Sampling
from lora_kit.generation.generate import generate
from lora_kit.reporting.plots import Curve, Mark, plot_curves
from lora_kit.training.recipe.portable_recipe import make_recipe_portable
from lora_kit.training.report.samples import MAX_ANSWER_TOKENS, _choose_different
from lora_kit.training.results import TrainReport
from lora_kit.training.train import train
from tests.support.memory import narrow
from tests.support.training import LABELED, PAIRS, At, base_of, recipe_of, weights_of

pytestmark = pytest.mark.report

_CELL = re.compile(r'<td data-name="([^"]*)"[^>]*>(.*?)</td>', re.DOTALL)
NASTY = "<script>alert('x')</script> & \"quotes\" \x1b[31m \u202e"


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_kit.training.report.artifacts.plot_loss_curve", lambda *_, **__: None)


class Reader(HTMLParser):
    """Checks that every tag is closed, and keeps the tags, their attributes and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data + "\n"


def page_of(report: TrainReport) -> str:
    return (report.out / "report.html").read_text(encoding="utf-8")


def test_the_report_says_what_was_done_and_how_to_load_it(tmp_path: Path) -> None:
    section = {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1}
    report = train(recipe_of(tmp_path, steps=6, train=section, lora={"r": 4}), base=base_of())
    read = Reader(page_of(report))
    captions = re.findall(r"<figcaption>([^<]*)", page_of(report))
    assert captions == ["loss, nats per label", "learning rate", "gradient norm", "tokens per second",
                        "peak memory so far"]  # fmt: skip
    assert report.before is not None
    assert report.after is not None
    out = report.out.name  # what travels names no folder outside the working directory
    for told in ("Answers side by side", "How to load it", "Record", f"{report.trainable:,} of {report.parameters:,}",
                 f"{report.after.loss:.4g}", f"{report.before.loss:.4g} before"):  # fmt: skip
        assert told in read.text
    assert f"bank.load('out', '{out}')" in read.text
    assert f"lora-kit generate --base tiny --adapter {out}" in read.text
    for line in make_recipe_portable(report.recipe).to_yaml().splitlines():
        assert line in read.text
    # Every step of the loss, and every evaluation with the one before the training.
    loss = page_of(report).partition("</figure>")[0]
    training, validation = (re.search(rf'<path d="([^"]*)"[^>]*stroke: var\(--{name}\)', loss) for name in ("c0", "c1"))
    assert training is not None
    assert validation is not None
    assert len(points_of(training[1])) == 6
    assert len(points_of(validation[1])) == 4


def test_the_report_needs_no_network_and_no_script(tmp_path: Path) -> None:
    page = page_of(train(recipe_of(tmp_path), base=base_of()))
    read = Reader(page)
    assert not {tag for tag, _ in read.tags} & {"script", "link", "img", "iframe", "object", "form"}
    assert not [name for _, attributes in read.tags for name in attributes if name.startswith("on") or name == "src"]
    assert "http:" not in page
    assert "https:" not in page
    assert "url(" not in page
    assert "default-src 'none'" in page


def test_everything_in_the_report_is_escaped(tmp_path: Path) -> None:
    rows = [{"prompt": NASTY + str(number), "completion": NASTY} for number in range(3)]
    out = tmp_path / "<b>bold 'name' \u202e"
    base = dataclasses.replace(base_of(), name="<img src=x>")
    report = train({**recipe_of(tmp_path, rows=rows), "base": "<img src=x>", "out": str(out)}, base=base)
    page = page_of(report)
    read = Reader(page)
    assert not {tag for tag, _ in read.tags} & {"script", "b", "img"}
    assert "<b>bold 'name'" in read.text
    assert "<img src=x>" in read.text
    assert r"\u202e" in read.text
    assert "\x1b" not in page
    assert "\u202e" not in page


def rows_of(page: str, title: str) -> list[dict[str, str]]:
    """The rows of the table in a section of a page, by the names of their columns."""
    section = page.partition(f"<h2>{title}</h2>")[2].partition("</section>")[0]
    return [
        {name: unescape(re.sub("<[^>]*>", "", cell)) for name, cell in _CELL.findall(row)}
        for row in re.findall(r"<tr[^>]*>(.*?)</tr>", section, re.S)
        if "<td" in row
    ]  # fmt: skip


def test_the_samples_are_what_base_and_adapter_say(tmp_path: Path) -> None:
    base = base_of()
    report = train(recipe_of(tmp_path, steps=20), base=base)
    asked = rows_of(page_of(report), "Answers side by side")
    # The rows as they were written: the tokenizer puts a space between its tokens, which are characters.
    assert [(row["prompt"], row["expected"]) for row in asked] == [(p["prompt"], p["completion"]) for p in PAIRS]
    changed = 0
    for row in asked:
        sampling = Sampling(max_new_tokens=MAX_ANSWER_TOKENS)
        before, after = generate(base, [None, report.out], row["prompt"], sampling=sampling)
        # The rows were padded to the longest of the batch, so a context may end a little earlier there.
        assert before.text.strip().startswith("" if row["before"] == "nothing" else row["before"])
        assert after.text.strip().startswith("" if row["after"] == "nothing" else row["after"])
        changed += row["before"] != row["after"]
    assert changed


def test_the_samples_differ_from_each_other() -> None:
    texts = ["the cat sat", "the cat sat down", "a dog runs", "the cat sat up", "birds sing", "the cat", "one", "two"]
    assert {0, 2, 4} <= set(_choose_different(texts))
    assert len(_choose_different(["same"] * 20)) == 6
    assert _choose_different([]) == []


def test_what_is_expected_of_labels_is_shown_before_and_after(tmp_path: Path) -> None:
    rows = [*LABELED, *({"text": "prüfen", "label": label} for label in ("yes", "no"))]  # one of two must be wrong
    report = train(recipe_of(tmp_path, rows=rows, task="classify", steps=30), base=base_of("bert", labels=2))
    page = page_of(report)
    text = Reader(page).text
    assert report.after is not None
    right = round(report.after.accuracy * len(rows))
    assert f"{right} of {len(rows)}" in text
    wrong = rows_of(page, "The mistakes, worst first")
    assert len(wrong) == len(rows) - right
    assert "prüfen" in {row["text"] for row in wrong}
    assert all(row["expected"] != row["after"] for row in wrong)
    assert "confusion matrix" in text
    assert {row["label"]: row["rows"] for row in rows_of(page, "Label by label")} == {"yes": "4", "no": "4"}
    assert "num_labels=2" in page
    assert "validation accuracy" in page


def test_preferences_are_shown_with_what_was_rejected(tmp_path: Path) -> None:
    rows = [{"prompt": p["prompt"], "chosen": p["completion"], "rejected": "no"} for p in PAIRS]
    pytest.importorskip("trl")
    report = train(recipe_of(tmp_path, rows=rows, objective="dpo"), base=base_of())
    shown = rows_of(page_of(report), "Answers side by side")
    assert [(row["expected"], row["rejected"]) for row in shown] == [(p["completion"], "no") for p in PAIRS]


def test_early_stopping_and_the_kept_step_are_said_and_marked(tmp_path: Path) -> None:
    section = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
               "early_stopping_patience": 1, "learning_rate": 3.0, "logging_steps": 1}  # fmt: skip
    report = train(recipe_of(tmp_path, steps=40, train=section), base=base_of())
    assert report.is_stopped_early
    assert report.steps < report.max_steps == 40
    page = page_of(report)
    said = re.search(
        r"Stopped early at step (\d+) of 40; step (\d+) was kept, with the best validation loss: ([\d.]+)", page
    )
    assert said is not None
    assert (int(said[1]), int(said[2])) == (report.steps, report.kept)
    assert report.after is not None
    assert said[3] == f"{report.after.loss:.4g}"
    assert {"kept", "stopped early"} <= set(re.findall(r">([a-z ]+)</text>", page))


def test_without_validation_there_are_no_samples(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    report = train({**recipe, "data": recipe["data"]["train"]}, base=base_of())
    assert "Answers side by side" not in page_of(report)
    assert "loss, nats per label" in page_of(report)


def test_a_model_that_cannot_answer_is_trained_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("lora_kit.training.report.samples.generate_batch", fails)
    report = train(recipe_of(tmp_path), base=base_of())
    assert "Answers side by side" not in page_of(report)
    assert "no samples in the report: OutOfMemoryError: CUDA out of memory" in caplog.text


def test_the_report_changes_neither_the_bytes_nor_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(tmp_path, lora={"lora_dropout": 0.2})
    first = train({**recipe, "out": str(tmp_path / "first")}, base=base_of("gpt2"))
    (first.out / "report.html").unlink()
    # Neither is it part of the adapter: with no sample drawn the same bytes come out.
    monkeypatch.setattr("lora_kit.training.report.samples.SAMPLE_COUNT", 0)
    second = train({**recipe, "out": str(tmp_path / "second")}, base=base_of("gpt2"))
    assert weights_of(first) == weights_of(second)
    assert first.digest == second.digest == Adapter.load(second.out).digest


@pytest.mark.slow
def test_what_did_not_go_straight_on_is_told(tmp_path: Path) -> None:
    section = {"logging_steps": 1, "save_steps": 2, "per_device_train_batch_size": 4}
    recipe = recipe_of(tmp_path, steps=6, train=section)
    with pytest.raises(KeyboardInterrupt):
        train(
            recipe,
            base=narrow("llama", 2, calls=1)(),
            callbacks=[At(3, lambda _: (_ for _ in ()).throw(KeyboardInterrupt))],
        )
    report = train(recipe, base=narrow("llama", 2)())
    text = Reader(page_of(report)).text
    assert "resumed from the checkpoint of step 2" in text
    assert "2 rows at once and accumulation 2" in text
    assert page_of(report).count("stroke-dasharray") == 2


# Charts


def points_of(path: str) -> list[tuple[float, float]]:
    numbers = [float(word) for word in path.split() if word not in ("M", "L")]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def test_a_curve_goes_through_its_points() -> None:
    drawn = plot_curves("loss", [Curve("a", [(0, 1.0), (5, 3.0), (10, 2.0)])], marks=[Mark(5, "half way")])
    curve = re.search(r'<path d="([^"]*)"[^>]*stroke: var\(--c0\)', drawn)
    mark = re.search(r'<path d="([^"]*)"[^>]*stroke-dasharray[^>]*stroke: var\(--mark\)', drawn)
    assert curve is not None
    assert mark is not None
    (x0, y0), (x1, y1), (x2, y2) = points_of(curve[1])
    assert x0 < x1 < x2
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 < y2 < y0  # up is less
    assert y0 - y2 == pytest.approx(y2 - y1, abs=0.2)
    assert points_of(mark[1])[0][0] == pytest.approx(x1, abs=0.2)
    assert "half way" in drawn


def test_a_chart_draws_whatever_values_a_training_logs() -> None:
    for points in ([(1, 0.0)], [(1, 2.0), (2, 2.0)], [(1, math.nan), (2, 1.0), (3, math.inf)], [(3, -1e9), (4, 1e-9)]):
        drawn = plot_curves("x", [Curve("", points)])
        Reader(drawn)
        assert "nan" not in drawn
        assert "inf" not in drawn
        assert "var(--c0)" in drawn


def test_a_chart_has_the_colors_of_the_page_and_the_same_bytes_each_time() -> None:
    curves = [Curve("training", [(1, 2.0), (2, 1.0)]), Curve("validation", [(2, 1.5)], dots=True)]
    drawn = plot_curves("loss", curves, marks=[Mark(2, "kept")])
    assert drawn == plot_curves("loss", curves, marks=[Mark(2, "kept")])
    assert not re.search(r"#[0-9a-f]{6}|font-family|url\(", drawn)
    assert {"var(--c0)", "var(--c1)", "var(--soft)", "var(--line)", "var(--mark)"} <= set(
        re.findall(r"var\(.*?\)", drawn)
    )


def test_a_long_training_gives_a_small_chart_that_keeps_its_extremes() -> None:
    points = [(float(step), math.sin(step) + (50 if step == 7777 else 0)) for step in range(20_000)]
    drawn = plot_curves("x", [Curve("", points)])
    assert len(drawn) < 150_000
    curve = re.search(r'<path d="([^"]*)"[^>]*stroke: var\(--c0\)', drawn)
    assert curve is not None
    heights = sorted(y for _, y in points_of(curve[1]))
    assert heights[0] < heights[10] - 50


def test_without_matplotlib_the_report_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = page_of(train(recipe_of(tmp_path), base=base_of()))
    assert "Without pictures: matplotlib is not installed" in Reader(page).text
    assert "<svg" not in page


# While it runs


def test_without_a_terminal_there_is_a_line_now_and_then(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 4}
    with caplog.at_level(logging.INFO, logger="lora_kit"):
        train(recipe_of(tmp_path, steps=6, train=section), base=base_of())
        said = [message for message in caplog.messages if re.match(r"step \d+ of 6: ", message)]
        assert [message.partition(":")[0] for message in said if " loss" in message.partition("eval")[0]] == [
            "step 1 of 6", "step 6 of 6"]  # fmt: skip
        assert re.search(r"loss 4\.\d+, .*tokens/s, \d+\.\d\d GB, 0:00:0\d left$", said[0])
        assert sum("eval_loss" in message for message in said) == 2
        caplog.clear()
        monkeypatch.setattr("lora_kit.training.loop.progress.MIN_LOG_SECONDS", 0)
        train(recipe_of(tmp_path, steps=6, train=section, out=str(tmp_path / "b")), base=base_of())
        assert sum(bool(re.match(r"step \d+ of 6: loss", message)) for message in caplog.messages) == 6


def test_on_a_terminal_there_is_a_live_line_on_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import rich.console

    screen = io.StringIO()
    console = functools.partial(rich.console.Console, file=screen, force_terminal=True, width=140)

    def made(*, stderr: bool) -> Any:
        assert stderr
        return console()

    monkeypatch.setattr("rich.console.Console", made)
    train(recipe_of(tmp_path, steps=6, train={"logging_steps": 1}), base=base_of())
    shown = screen.getvalue()
    assert "6/6" in shown
    assert "tokens/s" in shown
    assert "GB" in shown
    assert capsys.readouterr().out == ""


# Reported elsewhere


@pytest.mark.parametrize(
    ("name", "message"),
    [("wandb", "requires wandb to be installed"), ("tensorbord", "tensorbord is not supported")],
)
def test_what_cannot_be_reported_to_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    with pytest.raises(RecipeError, match=f"train.report_to {name}: .*{message}"):
        train({**recipe_of(tmp_path), "base": "never-loaded", "train": {"report_to": [name]}})


def test_tensorboard_is_written_beside_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, float, int]] = []
    folders: list[str] = []

    class SummaryWriter:
        def __init__(self, log_dir: str) -> None:
            folders.append(log_dir)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def add_text(self, *_: Any) -> None: ...

        def flush(self) -> None: ...

        def close(self) -> None: ...

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: True)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    section = {"report_to": "tensorboard", "logging_steps": 1}
    report = train(recipe_of(tmp_path, train=section), base=base_of())
    assert folders == [f"{report.out}.tensorboard"]
    losses = [(step, value) for name, value, step in written if name == "train/loss"]
    assert losses == [(entry["step"], entry["loss"]) for entry in report.history if "loss" in entry]
    assert {"train/tokens_per_second", "train/learning_rate"} <= {name for name, _, _ in written}
