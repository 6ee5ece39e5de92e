"""Every test runs offline, on tiny models, with two threads at the most."""

from __future__ import annotations

import gc
import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

# A shell that starts something in the background has it ignore SIGINT, and tests interrupt themselves with it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What was imported by now stays: every training collects garbage first, most of whose time it would take."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
