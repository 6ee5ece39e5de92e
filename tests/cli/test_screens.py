"""Screens at 80 and 120 columns, kept as text in `screens/` and looked at by people.

`WRITE_SCREENS=1 python -m pytest tests/cli/test_screens.py` writes them anew: read what changed before it is kept.
"""

from __future__ import annotations

import os
import re
import shutil
import types
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from lora_kit.cli.main import main
from lora_kit.cli.output import print_table
from lora_kit.doctor import Check, Examination
from lora_kit.evaluation.eval_report import EvalReport, Result
from lora_kit.evaluation.prediction import Prediction
from lora_kit.evaluation.prediction_file import LABEL, PredictionForm

SCREENS = Path(__file__).parent / "screens"
STORE = Path(__file__).parents[2] / "adapters"
NAMES = ("pirate", "mood", "scene")
ANSI = re.compile(r"\x1b\[[\d;?]*[A-Za-z]")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shipped adapters as its store."""
    folder = tmp_path_factory.mktemp("screens")
    for name in NAMES:
        shutil.copytree(STORE / name, folder / "adapters" / name)
    return folder


@pytest.fixture(params=[80, 120])
def width(request: pytest.FixtureRequest, world: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.chdir(world)
    monkeypatch.setenv("COLUMNS", str(request.param))
    return int(request.param)


def run(*arguments: str) -> Callable[[pytest.MonkeyPatch], None]:
    def screen(_: pytest.MonkeyPatch) -> None:
        main(arguments)

    return screen


def show_help_of_train(_: pytest.MonkeyPatch) -> None:
    main(["train", "--help"])


def show_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"lora_kit": "0.1.0", "python": "3.11.7 (Linux 6.18)", "torch": "2.13.0+cpu", "cuda": "no device"}
    checks = (
        Check(name="LoRA step, fp32", state="good", seconds=0.41, note="cpu: loss 4.8709 to 4.6898 in 3 steps"),
        Check(
            name="bitsandbytes, 4-bit",
            state="good",
            seconds=0.22,
            note="cpu: NF4 comes back within 0.03 of the largest weight",
        ),
        Check(
            name="Triton",
            state="not here",
            seconds=0.0,
            note="its kernels run on CUDA devices only; plain torch is used",
        ),
        Check(name="writing here", state="failed", seconds=0.01, note="OSError: [Errno 28] No space left on device"),
    )
    monkeypatch.setattr("lora_kit.doctor.examine", lambda: Examination(facts=facts, checks=checks))
    main(["doctor"])


def show_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = {"loss": 2.0794, "perplexity": 8.0, "exact_match": 0.125, "bleu": 0.31, "chrf": 0.52, "rouge": 0.48}
    better = {name: value / 2 if name in ("loss", "perplexity") else 0.9 for name, value in metrics.items()}
    named = {"base": metrics, "support-answers-english-v2": better}
    results = tuple(Result(name=name, digest=None, metrics=values) for name, values in named.items())
    report = EvalReport(data=Path("valid.jsonl"), task="causal-lm", rows=216, cases=(), results=results, seconds=12.3)
    monkeypatch.setattr("lora_kit.evaluation.evaluate.evaluate", lambda *_, **__: report)
    main(["eval", "valid.jsonl", "--base", "kit-base", "--adapter", "support-answers-english-v2", "--compare"])


def show_predictions(_: pytest.MonkeyPatch) -> None:
    texts = {
        "Where is my parcel? It was to be here on Monday, and the page that follows it shows nothing.": "delivery",
        "I was charged twice.": "billing",
    }
    form = PredictionForm(LABEL)
    rows = [
        row
        for text, label in texts.items()
        for row in form.format_rows(text, Prediction(labels=(label,), probabilities={label: 0.9712}))
    ]
    print_table(form.columns, rows)


def show_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    main(["predikt"])
    main(["inspect", "nowhere/pirat"])
    main(["combine", "-a", "pirate", "-a", "mood", "--weight", "1", "--out", "both"])


def show_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_kit.training.loop.progress import TrainingProgress

    clock = [0.0]
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setattr("rich.console.monotonic", lambda: clock[0])
    progress, state = TrainingProgress(), types.SimpleNamespace(max_steps=1760, global_step=0)
    arguments, control = types.SimpleNamespace(disable_tqdm=False), types.SimpleNamespace(should_log=False)
    logs = {"loss": 0.12345, "grad_norm": 1.5, "learning_rate": 1.9e-4, "tokens_per_second": 31234.0, "peak_bytes": 2e9}
    progress.on_train_begin(arguments, state, control)
    for step in (10, 420):
        clock[0], state.global_step = clock[0] + 30.0, step
        progress.on_step_end(arguments, state, control)
        progress.on_log(arguments, state, control, logs)
    progress.close()
    bar = progress._bar
    assert bar is not None
    bar.console.print(bar.make_tasks_table(bar.tasks))


SHOWN: Mapping[str, Callable[[pytest.MonkeyPatch], None]] = {
    "help": run("--help"),
    "help_train": show_help_of_train,
    "help_combine": run("combine", "--help"),
    "list": run("list"),
    "inspect": run("inspect", "pirate"),
    "compare": run("compare", "pirate", "mood"),
    "doctor": show_doctor,
    "eval": show_eval,
    "predict": show_predictions,
    "error": show_errors,
    "live_line": show_live_line,
}


def clean(name: str, shown: str) -> str:
    """Return a screen as its file has it: no colors, of a live line its last state, of others' texts nothing."""
    text = ANSI.sub("", shown)
    if name == "live_line":
        text = text.rstrip().rpartition("\n")[2].rpartition("\r")[2] + "\n"
    text = text.partition("\nTraining: ")[0] if name == "help_train" else text  # of transformers' own keys
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE).rstrip() + "\n"


@pytest.mark.parametrize("name", SHOWN)
def test_a_screen_fits_and_is_as_it_was(
    name: str, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    SHOWN[name](monkeypatch)
    out, err = capsys.readouterr()
    shown = clean(name, err if name in ("error", "live_line") else out)
    # A command that comes next is pasted: it stays one line.
    assert all(len(line) <= width for line in shown.splitlines() if not line.startswith("  lora-kit "))
    path = SCREENS / f"{name}_{width}.txt"
    if os.environ.get("WRITE_SCREENS") == "1":
        path.write_text(shown, encoding="utf-8")
    assert shown == path.read_text(encoding="utf-8")


def test_every_screen_that_is_kept_is_shown() -> None:
    assert {path.stem.rpartition("_")[0] for path in SCREENS.iterdir()} == set(SHOWN)


@pytest.mark.parametrize("name", ["list", "inspect", "compare"])
def test_no_word_is_broken_whatever_the_width(
    name: str, world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    words = dict[int, set[str]]()
    for width in (40, 400):
        monkeypatch.setenv("COLUMNS", str(width))
        SHOWN[name](monkeypatch)
        words[width] = set(capsys.readouterr().out.split())
    assert words[40] <= words[400]
