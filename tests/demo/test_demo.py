"""The demo: its data and checkers, a run of a few steps, and the adapters that ship with the kit."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

import lora_kit as lk
from lora_kit.cli.main import main
from lora_kit.demo import demo_training, ship
from lora_kit.demo.demo import run
from lora_kit.demo.demo_report import DemoReport
from lora_kit.demo.demo_screen import DemoScreen
from lora_kit.demo.demo_tasks import TASKS, DemoRow, DemoTask, as_pirate
from lora_kit.errors import DataError, StorageError, VerificationError
from lora_kit.models.loading import Base
from lora_kit.names import SHIPPED_ADAPTERS

ADAPTERS = Path(__file__).resolve().parents[2] / "adapters"
TINY = dict.fromkeys(TASKS, 2)
GOLDEN_ROWS = 24
GOLDEN_LEAST = 0.8
"""Below what they were shipped with, for machines that round otherwise."""

every_task = pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)


def words(rows: list[DemoRow]) -> set[str]:
    return {word for row in rows for word in re.findall(r"[a-z]+", row.prompt.lower())}


# The data


@every_task
def test_the_same_seed_gives_the_same_rows(task: DemoTask) -> None:
    first, second = (task.split(train=50, held_out=20, seed=3) for _ in range(2))
    assert first == second
    assert first != task.split(train=50, held_out=20, seed=4)


def test_rows_are_the_same_on_every_machine() -> None:
    """The shipped adapters were trained on these rows: other rows could have their held-out ones among them."""
    rows = [row for task in TASKS.values() for row in task.split(train=200, held_out=20)[0]]
    text = json.dumps([row.to_json() for row in rows])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "5533023d52193c62"


@every_task
def test_no_combination_is_both_trained_on_and_held_out(task: DemoTask) -> None:
    train, held_out = task.split(train=1500, held_out=100)
    assert len({row.combination for row in (*train, *held_out)}) == 1600
    assert not {row.prompt for row in train} & {row.prompt for row in held_out}


@every_task
def test_more_training_rows_leave_the_held_out_rows_as_they_are(task: DemoTask) -> None:
    assert task.split(train=10, held_out=20)[1] == task.split(train=500, held_out=20)[1]


@every_task
def test_every_single_word_of_the_held_out_rows_occurs_in_training(task: DemoTask) -> None:
    count = demo_training.BATCH * demo_training.STEPS[task.name]
    train, held_out = task.split(train=count, held_out=demo_training.HELD_OUT)
    assert words(held_out) <= words(train)


@every_task
def test_asking_for_more_rows_than_there_are_is_an_error(task: DemoTask) -> None:
    few = dataclasses.replace(task, draw=lambda source: DemoRow("a", "b", (str(source.randrange(10)),)))
    assert len(few.split(train=8, held_out=2)[0]) == 8
    with pytest.raises(DataError, match="10 combinations"):
        few.split(train=9, held_out=2)


def test_both_moods_are_about_as_frequent_and_half_the_rows_hold_both() -> None:
    rows, _ = TASKS["mood"].split(train=1000, held_out=1)
    assert 430 < sum(row.completion == "happy" for row in rows) < 570
    assert 430 < sum(row.prompt.startswith("At first") for row in rows) < 570


@pytest.mark.parametrize(
    ("plain", "pirate"),
    [
        ("The king is looking for gold.", "Th' cap'n be lookin' fer booty, arr!"),
        ("Hello, my friend, are you the boy?", "Ahoy, me matey, be ye th' lad, eh?"),
        ("I am the king of the sea!", "I be th' cap'n o' th' sea, yo ho!"),
        ("Bring a ring to your house.", "Bring a ring t' yer ship, arr!"),
    ],
)
def test_pirates_speak_by_rules(plain: str, pirate: str) -> None:
    assert as_pirate(plain) == pirate


# A run


@dataclasses.dataclass(frozen=True)
class Tiny:
    out: Path
    printed: str
    error: VerificationError
    report: DemoReport


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A demo of two steps per task: nothing is learned, everything else happens. It prints to a stream of ASCII."""
    out, stream, reports = tmp_path_factory.mktemp("demo") / "out", io.BytesIO(), []
    console = Console(file=io.TextIOWrapper(stream, encoding="ascii", write_through=True), width=100, markup=False)

    class Keeping(DemoScreen):
        def show_summary(self, report: DemoReport) -> None:
            reports.append(report)
            super().show_summary(report)

    with pytest.raises(VerificationError, match="the demo is not what it should be") as caught:
        run(out, steps=TINY, held_out=2, screen=Keeping(console))
    return Tiny(out, stream.getvalue().decode("ascii"), caught.value, reports[0])


@pytest.mark.slow
def test_a_demo_whose_adapters_learned_nothing_fails_and_says_so(tiny: Tiny) -> None:
    assert tiny.error.exit_code == 4
    assert len(tiny.report.failures) == 3
    assert all(f"{name}: adapter " in str(tiny.error) for name in TASKS)


def test_a_demo_leaves_adapters_with_reports_rows_figures_and_a_merged_model(tiny: Tiny) -> None:
    for name in TASKS:
        assert lk.Adapter.load(tiny.out / name).record["metrics"]["held_out_right"] == 0
        assert {"recipe.yaml", "report.html", "loss.png"} <= {file.name for file in (tiny.out / name).iterdir()}
        assert len((tiny.out / "data" / name / "train.jsonl").read_text().splitlines()) == 2 * demo_training.BATCH
        assert len((tiny.out / "data" / name / "held_out.jsonl").read_text().splitlines()) == 2
    assert (tiny.out / "scene-merged" / "model.safetensors").is_file()
    figures = json.loads((tiny.out / "demo.json").read_text())
    assert set(figures["tasks"]) == set(TASKS)
    assert len(figures["failures"]) == 3


def test_a_demo_says_what_it_made_and_what_to_try_next(tiny: Tiny) -> None:
    for name, found in tiny.report.tasks.items():
        command = f"lora-kit generate --adapter {tiny.out / name} --compare --prompt '{found.prompts[0]}'"
        assert command in tiny.printed.splitlines()[-6:] or f"  {command}" in tiny.printed.splitlines()
    assert f"all of it is in {tiny.out}" in tiny.printed.replace("\n", "")


def test_rows_of_a_mixed_batch_and_the_merged_model_agree(tiny: Tiny) -> None:
    assert all(row.difference <= row.bound for row in tiny.report.mixed)
    assert tiny.report.merged.logits is not None
    assert tiny.report.merged.logits.largest_difference <= tiny.report.merged.logits.bound
    assert tiny.report.base_unchanged
    assert [row.adapter for row in tiny.report.mixed] == ["scene", None, "pirate", None, "mood", None]


def test_everything_that_is_promised_is_judged(tiny: Tiny) -> None:
    good = {name: dataclasses.replace(result, score=0.9) for name, result in tiny.report.tasks.items()}
    report = dataclasses.replace(tiny.report, tasks=good)
    assert report.failures == []
    off = dataclasses.replace(report.mixed[0], difference=1.0, bound=0.1)
    for broken, part in (
        (dataclasses.replace(report, mixed=(off, *report.mixed[1:])), "mixed batch"),
        (dataclasses.replace(report, base_unchanged=False), "have changed"),
        (dataclasses.replace(report, tasks={**good, "mood": dataclasses.replace(good["mood"], score=0.5)}), "mood"),
    ):
        assert len(broken.failures) == 1
        assert part in broken.failures[0]


def test_a_merge_whose_logits_are_off_fails_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_kit.merging.verification.logits.estimate_rounding_bound", lambda *_, **__: -1.0)
    with pytest.raises(VerificationError, match="away from base"):
        run(tmp_path / "out", steps={"scene": 1}, held_out=2, screen=DemoScreen(Console(file=io.StringIO())))


class _StoppedHere(Exception):
    pass


def test_a_demo_replaces_an_earlier_demo_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> Base:
        raise _StoppedHere

    monkeypatch.setattr(demo_training, "load_demo_base", stop)
    for _ in range(2):
        with pytest.raises(_StoppedHere):
            run(tmp_path / "mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(StorageError, match="holds something else"):
        run(tmp_path / "other")
    assert [file.name for file in (tmp_path / "other").iterdir()] == ["letter.txt"]


# The adapters that ship


def test_adapters_that_are_not_good_enough_are_not_shipped(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="mood 0%; expected at least 90%"):
        ship.ship(tmp_path / "store", scratch=tmp_path / "scratch", steps={"mood": 1}, held_out=2)
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_adapters_that_are_good_enough_replace_those_in_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ship, "MIN_SCORE", 0)
    for steps in (1, 2):
        (found,) = ship.ship(tmp_path / "store", scratch=tmp_path / "scratch", steps={"mood": steps}, held_out=2)
        shipped = lk.Adapter.load(tmp_path / "store" / "mood")
        assert shipped.digest == found.training.digest
        assert shipped.record["metrics"]["steps"] == ship.EPOCHS * steps
        assert (tmp_path / "store" / "mood" / "recipe.yaml").is_file()


@pytest.fixture(scope="module")
def kit_base() -> Base:
    return demo_training.load_demo_base()


@pytest.mark.parametrize("name", TASKS)
def test_a_shipped_adapter_loads_strictly_and_does_its_task(name: str, kit_base: Base, tmp_path: Path) -> None:
    count = demo_training.BATCH * demo_training.STEPS[name]
    _, held_out = TASKS[name].split(train=count, held_out=ship.HELD_OUT)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row.to_json()) + "\n" for row in held_out[:GOLDEN_ROWS]))
    answers = demo_training.answer_rows(kit_base, ADAPTERS / name, file)
    assert answers[name].metrics["exact_match"] >= GOLDEN_LEAST


@pytest.mark.parametrize("name", TASKS)
def test_a_shipped_adapter_is_what_is_written_today(name: str, tmp_path: Path) -> None:
    shipped = lk.Adapter.load(ADAPTERS / name)
    written = shipped.save(tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (written / file).read_bytes() == (ADAPTERS / name / file).read_bytes()
    formats = [json.loads((folder / "lora_kit.json").read_text())["format"] for folder in (written, ADAPTERS / name)]
    assert formats[0] == formats[1]


@pytest.mark.parametrize("name", TASKS)
def test_a_shipped_adapter_is_small_and_says_where_it_comes_from(name: str) -> None:
    folder = ADAPTERS / name
    adapter = lk.Adapter.load(folder)
    assert (folder / "adapter_model.safetensors").stat().st_size < 1_000_000
    assert adapter.base is not None
    assert adapter.base["name"] == adapter.config.base_model_name_or_path == "kit-base"
    assert adapter.record["metrics"]["held_out_right"] >= ship.MIN_SCORE
    recipe = adapter.record["recipe"]
    assert not Path(recipe["data"]["train"]).is_absolute()
    assert not Path(recipe["out"]).is_absolute()


def test_the_shipped_adapters_are_written_into_a_store_and_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "scene", "--store", "mine"]) == 2
    assert "lora-kit demo --adapters mine writes it there" in capsys.readouterr().err
    Path("mine/other").mkdir(parents=True)
    assert main(["demo", "--adapters", "mine"]) == 0
    assert "lora-kit list mine" in capsys.readouterr().out
    for name in SHIPPED_ADAPTERS:
        assert lk.Adapter.load(f"mine/{name}").digest == lk.Adapter.load(ADAPTERS / name).digest
    Path("mine/scene/notes.txt").write_text("mine", "utf-8")
    assert main(["demo", "--adapters", "mine"]) == 3
    assert "exists already" in capsys.readouterr().err
    assert Path("mine/scene/notes.txt").is_file()
    assert main(["demo", "--adapters", "mine", "--replace"]) == 0
    assert not Path("mine/scene/notes.txt").exists()
