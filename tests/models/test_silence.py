"""Of what other libraries say, only what nobody can act on is hidden."""

from __future__ import annotations

import logging

import pytest

import lora_kit.models.silence  # noqa: F401  its import hides the notice


def test_of_what_bitsandbytes_logs_only_the_notice_about_kernels_is_hidden(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please install", "no kernels")
    logger.warning("something else")
    assert caplog.messages == ["something else"]
