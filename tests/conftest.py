"""Every test runs offline, on tiny models, and with one thread: a forked child waits for ever for torch's others."""

from __future__ import annotations

import gc
import os
import shutil
import signal
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

# The same examples every time and no clock, however loaded the machine is; `make test-long` draws others.
hypothesis.settings.register_profile("long", deadline=None)
hypothesis.settings.register_profile("short", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("long" if os.environ.get("LORA_KIT_LONG") == "1" else "short")
torch.set_num_threads(1)
# Parallel workers have a width of their own here, and what is written to no terminal is to have ours.
os.environ.pop("COLUMNS", None)
# A shell that starts something in the background has it ignore SIGINT, and tests interrupt themselves with it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What was imported by now stays: every training collects garbage first, most of whose time it would take."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _without_pictures_and_samples(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training leaves out what takes much longer than itself here, but for tests that are marked `report`."""
    if request.node.get_closest_marker("report"):
        return
    monkeypatch.setattr("lora_kit.training.report.artifacts.plot_loss_curve", lambda *_, **__: None)
    monkeypatch.setattr("lora_kit.training.report.train_page.can_plot", lambda: False)
    monkeypatch.setattr("lora_kit.training.report.samples.SAMPLE_COUNT", 0)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support import world

    return world.build(tmp_path_factory.mktemp("documents") / "world")


@pytest.fixture
def here(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of its own with what the documents speak of."""
    shutil.copytree(built, tmp_path / "here", copy_function=os.link)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"
