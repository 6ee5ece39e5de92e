"""Faults while something is written: a full disk, a kill, an output that exists, two processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import lora_kit as lk
from lora_kit.cli.main import main
from lora_kit.errors import LoraKitError, MergeError, RecipeError, StorageError
from lora_kit.io.output_lock import lock_target
from lora_kit.io.sealed_json import NO_DIGEST, SELF_DIGEST, seal_json
from lora_kit.merging.merge import merge
from lora_kit.merging.preflight import MERGE_RECORD
from lora_kit.training.loop.checkpoints import MARKER
from lora_kit.training.train import train
from tests.faults.bases import MERGE
from tests.faults.fault import Act, Fault, no_files
from tests.support import folders, texts
from tests.support.full_disk import run_on_full_disk
from tests.support.interrupted import SignalAt, die_at, killed, long_recipe, results, run_of, unbroken
from tests.support.merging import contents
from tests.support.processes import at_call, die, in_child
from tests.support.training import PAIRS, base_of

OLD, NEW = folders.adapter(seed=1), folders.adapter(seed=2)


def _old_and_new(folder: Path) -> None:
    OLD.save(folder / "out")
    NEW.save(folder / "adapter")


def _fill_disk(work: Callable[[Path], object], limits: tuple[int, ...]) -> Act:
    def act(folder: Path) -> None:
        for largest in limits:
            code, said = run_on_full_disk(lambda: work(folder), largest=largest)
            assert code == 3, (largest, code, said)
            assert "bytes are needed" in said, said

    return act


def _save_new(folder: Path) -> None:
    NEW.save(folder / "out", replace=True)


def _merge(folder: Path) -> None:
    merge(folder / "base", folder / "adapter", folder / "merged", replace=True)


def _kill_saves(folder: Path) -> None:
    """Kill a save at calls all along its way: the folder is the old adapter or the new one."""
    for number in range(1, 80, 7):

        def work(number: int = number) -> None:
            at_call(number, die, below=folder)
            _save_new(folder)

        code = in_child(work)
        assert lk.Adapter.load(folder / "out") in (OLD, NEW)
        if code == 0:
            break
    _save_new(folder)
    assert lk.Adapter.load(folder / "out") == NEW
    assert not [path for path in folder.glob(".out*") if "staging" in path.name], "a leftover stays"


def _kill_merges(folder: Path) -> None:
    """Kill a merge over an earlier one at calls all along its way; then let it finish."""
    merged = folder / "merged"
    merge(folder / "base", folder / "adapter", merged)
    new = contents(merged)
    OLD.save(folder / "other")
    for number in range(1, 400, 40):
        merge(folder / "base", folder / "other", merged, replace=True)
        old = contents(merged)

        def work(number: int = number) -> None:
            at_call(number, die, below=folder)
            _merge(folder)

        code = in_child(work)
        assert _without_time(contents(merged)) in (_without_time(old), _without_time(new)), number
        _merge(folder)
        assert _without_time(contents(merged)) == _without_time(new)
        assert not [path.name for path in folder.glob(".merged*")], "a leftover stays"
        if code == 0:
            break


def _without_time(files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name not in (MERGE_RECORD, "README.md")}


def _recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    return long_recipe(folder, steps=5, **changes)


@cache
def _expected() -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return unbroken(_recipe(Path(folder)))


def _stop(number: int) -> Act:
    """Return what stops a training by a signal, and finishes it."""

    def act(folder: Path) -> None:
        recipe = _recipe(folder)

        def work() -> None:
            try:
                train(recipe, base=base_of(), callbacks=[SignalAt(3, number)])
            except (KeyboardInterrupt, SystemExit):
                os._exit(77)

        assert in_child(work) == 77
        assert run_of(Path(recipe["out"])).exists()
        assert train(recipe, base=base_of()).resumed
        assert results(Path(recipe["out"])) == _expected()

    return act


def _tear_checkpoint(folder: Path) -> None:
    recipe = _recipe(folder)
    killed(recipe, die_at(5))
    weights = run_of(Path(recipe["out"])) / "checkpoint-4" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def _text_as_step(folder: Path) -> None:
    """The marker of the newest checkpoint is sealed, and says `"step": "4"`."""
    recipe = _recipe(folder)
    killed(recipe, die_at(5))
    marker = run_of(Path(recipe["out"])) / "checkpoint-4" / MARKER
    fields = {**json.loads(marker.read_text()), "step": "4", SELF_DIGEST: NO_DIGEST}
    marker.write_text(seal_json(json.dumps(fields, indent=2, sort_keys=True)))


def _resume_before(folder: Path) -> None:
    recipe = _recipe(folder)
    assert train(recipe, base=base_of()).resumed == 2
    assert results(Path(recipe["out"])) == _expected()


def _interrupt(folder: Path) -> None:
    killed(_recipe(folder), die_at(3))


def _resume_with(**overrides: Any) -> Act:
    def act(folder: Path) -> None:
        train(_recipe(folder), base=base_of(), overrides=overrides)

    return act


def _resume_with_rows(folder: Path) -> None:
    recipe = _recipe(folder)
    changed = str(texts.write(folder / "changed.jsonl", PAIRS[:4]))
    train({**recipe, "data": {"train": changed, "validation": changed}}, base=base_of())


def _hold(folder: Path) -> None:
    """Save while another process holds the output."""
    ready, go = os.pipe()
    done, end = os.pipe()
    child = os.fork()
    if child == 0:
        with lock_target(folder / "out"):
            os.write(go, b"x")
            os.read(done, 1)
        os._exit(0)
    os.read(ready, 1)
    try:
        _save_new(folder)
    finally:
        os.write(end, b"x")
        os.waitpid(child, 0)


def _in_read_only(folder: Path) -> None:
    """Save where nobody may write. Root may write anywhere, so it is done as nobody."""
    os.chmod(folder / "out", 0o555)

    def work() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        NEW.save(folder / "out" / "below")

    try:
        assert in_child(work) == 1, "not of the machine"
    finally:
        os.chmod(folder / "out", 0o755)


def _closed_stdout(folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    nobody = open(writer, "w", encoding="utf-8")  # noqa: SIM115 - what closes it fails for the same reason
    with contextlib.redirect_stdout(nobody):
        assert main(["list", str(folder)]) == 0
    with contextlib.suppress(BrokenPipeError):
        nobody.close()


def _plain_locale(folder: Path) -> None:
    OLD.save(folder / "ünï-色")
    env = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "lora_kit", "inspect", str(folder / "ünï-色")]
    process = subprocess.run(command, capture_output=True, env={**os.environ, **env}, check=False)
    assert (process.returncode, process.stderr.count(b"Traceback")) == (0, 0), process.stderr


def _foreign_staging(folder: Path) -> None:
    folders.adapter().save(folder / "adapter")
    (folder / ".out.staging").mkdir()
    (folder / ".out.staging" / "thesis.txt").write_text("mine")


def _foreign_output(folder: Path) -> None:
    folders.adapter().save(folder / "adapter")
    (folder / "out").mkdir()
    (folder / "out" / "thesis.txt").write_text("mine")


def _row(
    name: str, make: Act, act: Act, says: str = "", *, error: type[LoraKitError] | None = StorageError, **more: Any
) -> Fault:
    return Fault(name=name, make=make, act=act, error=error, says=says, **more)


def _fails_first(folder: Path) -> None:
    """A foreign checkpoint, and a file and a FIFO that have the name of one."""
    run = run_of(folder / "out")
    (run / "checkpoint-3").mkdir(parents=True)
    (run / "checkpoint-3" / "trainer_state.json").write_text("{}")


def _train(folder: Path) -> None:
    train(_recipe(folder), base=base_of())


def _not_folders(folder: Path) -> None:
    run = run_of(folder / "out")
    run.mkdir()
    os.mkfifo(run / "checkpoint-2")
    (run / "checkpoint-4").write_text("mine")
    (run / "notes-checkpoint-1.txt").write_text("mine")


def _train_beside(folder: Path) -> None:
    _train(folder)
    kept = {path.name for path in run_of(folder / "out").iterdir()}
    assert "notes-checkpoint-1.txt" in kept
    assert len(kept) >= 3, kept


def _save_onto_base(folder: Path) -> None:
    NEW.save(folder / "base", replace=True)


EXPORT = ("export", "adapter", "--target", "vllm", "--out", "out")
_STOPS = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM}
WRITING: tuple[Fault, ...] = (
    _row("the disk is full in a save", _old_and_new, _fill_disk(_save_new, (0, 200, 1_500)), error=None),
    _row("the disk is full in a merge", _old_and_new, _fill_disk(_merge, (0, 2_000, 20_000)), error=None),
    _row("killed at calls of a save", _old_and_new, _kill_saves, error=None, writes=True),
    _row("killed at calls of a merge", _old_and_new, _kill_merges, error=None, writes=True, slow=True),
    *(
        _row(f"{name} in a training", no_files, _stop(number), error=None, writes=True, slow=True)
        for name, number in _STOPS.items()
    ),
    _row("the newest checkpoint is torn", _tear_checkpoint, _resume_before, error=None, writes=True, slow=True),
    _row(
        "a recipe changed before it resumes",
        _interrupt,
        _resume_with(**{"train.learning_rate": 0.02}),
        "learning_rate was",
        error=RecipeError,
        writes=True,
    ),
    _row(
        "rows changed before it resumes",
        _interrupt,
        _resume_with_rows,
        "sha256.rows",
        error=RecipeError,
        writes=True,
        slow=True,
    ),
    _row("an output that exists", _old_and_new, lambda folder: NEW.save(folder / "out"), "exists", command=EXPORT),
    _row(
        "an output of somebody else",
        _foreign_output,
        lambda folder: NEW.save(folder / "out", replace=True),
        "something else",
        command=(*EXPORT, "--replace"),
    ),
    _row(
        "an output that is the base",
        _old_and_new,
        lambda folder: merge(folder / "base", folder / "adapter", folder / "base", replace=True),
        "",
        error=MergeError,
        command=(*MERGE[:-1], "base", "--replace"),
    ),
    _row(
        "an output in the base",
        _old_and_new,
        lambda folder: merge(folder / "base", folder / "adapter", folder / "base" / "x"),
        "",
        error=MergeError,
        command=(*MERGE[:-1], "base/x"),
    ),
    _row("an adapter saved onto the base", _old_and_new, _save_onto_base, "something else"),
    _row("a folder that may not be written", _old_and_new, _in_read_only, error=None, writes=True),
    _row("two processes and one output", _old_and_new, _hold, "another process", writes=True),
    _row(
        "a staging folder of somebody else",
        _foreign_staging,
        lambda folder: NEW.save(folder / "out"),
        "is in the way",
        command=EXPORT,
    ),
    _row("a checkpoint of somebody else", _fails_first, _train, "is not a checkpoint of lora_kit", writes=True),
    _row("a checkpoint whose step is a text", _text_as_step, _resume_before, error=None, writes=True, slow=True),
    _row("files with the names of checkpoints", _not_folders, _train_beside, error=None, writes=True),
    _row(
        "the output's name has 300 letters",
        _old_and_new,
        lambda folder: NEW.save(folder / ("x" * 300)),
        "",
        command=(*EXPORT[:-1], "x" * 300),
    ),
    _row("stdout is closed", _old_and_new, _closed_stdout, error=None),
    _row("a locale without Unicode", no_files, _plain_locale, error=None, writes=True, slow=True),
)
