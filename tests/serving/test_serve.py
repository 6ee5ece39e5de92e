"""The process of a server: it listens before it loads, and a signal ends it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

import lora_kit as lk
from lora_kit.cli.main import main
from lora_kit.errors import ConfigError, StorageError
from lora_kit.serving.serve import serve
from lora_kit.serving.server_settings import ServerSettings
from tests.support import random_adapters


def test_a_port_in_use_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(StorageError, match=f"port {port} .*in use"):
            serve(ServerSettings(base="no-such-base", store=tmp_path, port=port))


def test_a_port_that_is_none_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="port 70000"):
        serve(ServerSettings(base="no-such-base", store=tmp_path, port=70_000))


def test_sigterm_ends_a_server_with_its_own_exit_code_and_no_traceback(tmp_path: Path) -> None:
    command = ["serve", "--base", "kit-base", "--store", str(tmp_path), "--dtype", "fp32", "--port", "0"]
    start = [sys.executable, "-c", "import sys; from lora_kit.cli import main; sys.exit(main())", *command]
    with subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[3].rstrip(";")
        with urllib.request.urlopen(f"{address}/health", timeout=60) as answer:
            assert json.load(answer)["status"] == "ok"
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in errors
    assert "cannot be used" not in errors


@pytest.mark.parametrize("command", [["serve", "--base", "kit-base"], ["chat", "--base", "kit-base"]], ids=" ".join)
def test_without_the_extra_the_error_names_it(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "limits", None)
    for name in ("rate_limit", "served_model", "http_app"):
        monkeypatch.delitem(sys.modules, f"lora_kit.serving.{name}", raising=False)
    assert main(command) == 2
    assert "pip install 'lora-kit[serve]'" in capsys.readouterr().err


def test_the_base_is_the_one_that_the_adapters_of_the_store_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served: list[ServerSettings] = []
    monkeypatch.setattr("lora_kit.serving.serve.serve", lambda settings, on_ready: served.append(settings))
    assert main(["serve", "--store", str(tmp_path)]) == 2
    assert "has no adapter that names a base (give the base with --base)" in capsys.readouterr().err
    base = lk.load_base("kit-base", dtype="fp32")
    random_adapters.made(base, seed=0, target_modules=["q_proj"], r=2).save(tmp_path / "one")
    assert main(["serve", "--store", str(tmp_path)]) == 0
    assert [settings.base for settings in served] == ["kit-base"]
