"""Faults of files that change: while they are read, or between a merge that was killed and the one that takes it up."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import safetensors.torch

import lora_kit as lk
from lora_kit.adapter.folder import CONFIG, WEIGHTS, AdapterFolder
from lora_kit.errors import AdapterError, MergeError
from lora_kit.merging.merge import merge
from lora_kit.merging.writing import journal, writer
from tests.faults.adapter_acts import GENERATE, load
from tests.faults.bases import MERGE
from tests.faults.fault import Fault
from tests.support import folders, processes, tiny
from tests.support.merging import stored


@contextlib.contextmanager
def _rewriting(folder: Path, times: int) -> Iterator[None]:
    """Let each reading of the weights begin with another program that writes config and weights in place."""
    real, left = AdapterFolder.read, iter(range(times))

    def read(source: AdapterFolder, **options: bool) -> lk.Adapter:
        number = next(left, None)
        if number is not None:
            other = folder / f"written-{number}"
            folders.foreign(other, folders.tensors(seed=number), lora_alpha=number + 1)
            for name in (CONFIG, WEIGHTS):
                (folder / "adapter" / name).write_bytes((other / name).read_bytes())
            shutil.rmtree(other)
        return real(source, **options)

    with patch.object(AdapterFolder, "read", read):
        yield


def _foreign(folder: Path) -> None:
    folders.foreign(folder / "adapter")


def _load_the_last(folder: Path) -> None:
    assert lk.Adapter.load(folder / "adapter") == lk.Adapter(folders.config(lora_alpha=2), folders.tensors(seed=1))


def _kill_merge(folder: Path) -> None:
    """Kill a merge that has finished one file, and put another base in the place of the first, of its size and time."""
    (folder / "base" / "model.safetensors").unlink()
    tiny.llama().save_pretrained(folder / "base", max_shard_size="60KB")
    folders.adapter().save(folder / "adapter")

    def work() -> None:
        real, count = journal.FinishedFiles.finish, itertools.count(1)

        def finish(*given: object, **named: object) -> None:
            real(*given, **named)  # type: ignore[arg-type]
            if next(count) == 1:
                processes.die()

        with patch.object(journal.FinishedFiles, "finish", finish):
            _merge(folder)

    assert processes.in_child(work) == -signal.SIGKILL
    for shard in (folder / "base").glob("*.safetensors"):
        times = shard.stat()
        values = {name: tensor + 1 for name, tensor in safetensors.torch.load_file(shard).items()}
        safetensors.torch.save_file(values, folder / "copy", metadata={"format": "pt"})
        assert (folder / "copy").stat().st_size == times.st_size
        os.utime(folder / "copy", ns=(times.st_atime_ns, times.st_mtime_ns))
        os.replace(folder / "copy", shard)


def _merge(folder: Path) -> None:
    merge(folder / "base", folder / "adapter", folder / "merged", replace=True)


def _check_of_this_base(folder: Path) -> None:
    base, merged = stored(folder / "base"), stored(folder / "merged")
    changed = [name for name, tensor in base.items() if not tensor.equal(merged[name])]
    assert sorted(changed) == sorted(f"{path}.weight" for path in folders.PATHS), changed


@contextlib.contextmanager
def _touching_base(folder: Path) -> Iterator[None]:
    """Change a file of the base once the merge has read all of them."""
    real = writer.write_shards

    def write(*given: object, **named: object) -> object:
        written = real(*given, **named)  # type: ignore[arg-type]
        os.utime(folder / "base" / "model.safetensors", ns=(1, 1))
        return written

    with patch.object(writer, "write_shards", write):
        yield


def _with_adapter(folder: Path) -> None:
    folders.adapter().save(folder / "adapter")


CHANGING: tuple[Fault, ...] = (
    Fault(
        name="a foreign adapter that is written twice while it is read",
        make=_foreign,
        act=_load_the_last,
        command=GENERATE,
        during=lambda folder: _rewriting(folder, 2),
        writes=True,
    ),
    Fault(
        name="a foreign adapter that is written again and again",
        make=_foreign,
        act=load,
        error=AdapterError,
        says="was changed while it was read",
        command=GENERATE,
        during=lambda folder: _rewriting(folder, 100),
        writes=True,
    ),
    Fault(
        name="another base of the same size and time after a merge was killed",
        make=_kill_merge,
        act=_merge,
        command=(*MERGE, "--replace"),
        check=_check_of_this_base,
        writes=True,
    ),
    Fault(
        name="a base that changes while it is merged",
        make=_with_adapter,
        act=_merge,
        error=MergeError,
        says="was changed while it was read",
        command=(*MERGE, "--replace"),
        during=_touching_base,
    ),
)
