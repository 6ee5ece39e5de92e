"""Trainings without pictures and samples, libraries without words: as in the tests, for what is run by itself."""

from __future__ import annotations

import logging


def hush() -> None:
    """Let this process, and those that it forks, draw and say nothing."""
    import lora_kit.training.report.artifacts
    import lora_kit.training.report.samples
    import lora_kit.training.report.train_page

    for name in ("transformers", "optuna"):
        logging.getLogger(name).setLevel(logging.ERROR)
    lora_kit.training.report.artifacts.plot_loss_curve = lambda *_, **__: None  # type: ignore[assignment]
    lora_kit.training.report.train_page.can_plot = lambda: False
    lora_kit.training.report.samples.SAMPLE_COUNT = 0  # type: ignore[misc]
