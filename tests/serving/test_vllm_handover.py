"""The hand-over to vLLM: everything that it needs, or an error that names who cannot go."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

import lora_kit as lk
from lora_kit.errors import ConfigError, ExportError
from lora_kit.models.loading import Base
from lora_kit.serving.server_settings import ServerSettings
from lora_kit.serving.vllm_handover import write_vllm_handover
from tests.support import random_adapters


@pytest.fixture(scope="module")
def base() -> Base:
    return lk.load_base("kit-base", dtype="fp32")


def save(base: Base, store: Path, name: str, *, template: str | None = None, **fields: object) -> None:
    adapter = random_adapters.made(base, seed=0, **{"target_modules": ["q_proj", "v_proj"], "r": 12, **fields})
    record = {} if template is None else {"recipe": {"data": {"chat_template": template}}}
    lk.Adapter(adapter.config, adapter.tensors, record=record).save(store / name)


def read_flags(out: Path) -> list[str]:
    text = (out / "launch.sh").read_text("utf-8")
    return shlex.split(text.partition("exec ")[2].replace("\\\n", " "))


def test_adapters_command_and_template_are_written(base: Base, tmp_path: Path) -> None:
    store, out = tmp_path / "store", tmp_path / "out"
    for name in ("one", "two"):
        save(base, store, name, template="{{ messages }}")
    settings = ServerSettings(base="kit-base", store=store, dtype="fp32", aliases={"chat": "one"}, port=8001)
    notes = write_vllm_handover(settings, out)
    flags = read_flags(out)
    assert flags[:2] == ["vllm", "serve"]
    assert Path(flags[2]).joinpath("config.json").is_file()
    follows = {flag: flags[place + 1] for place, flag in enumerate(flags[:-1]) if flag.startswith("--")}
    assert follows["--max-loras"] == "3"
    assert follows["--max-lora-rank"] == "16"
    assert (follows["--dtype"], follows["--port"], follows["--chat-template"]) == (
        "float32",
        "8001",
        "chat_template.jinja",
    )
    assert flags[flags.index("--lora-modules") + 1 :] == ["one=adapters/one", "two=adapters/two", "chat=adapters/one"]
    config = json.loads((out / "adapters/two/adapter_config.json").read_text("utf-8"))
    assert config["r"] == 12
    assert (out / "chat_template.jinja").read_text("utf-8") == "{{ messages }}"
    assert "3 slots" in notes[0]


def test_templates_that_differ_are_all_kept_and_named(base: Base, tmp_path: Path) -> None:
    for name in ("one", "two"):
        save(base, tmp_path / "store", name, template=f"{{# {name} #}}")
    notes = write_vllm_handover(ServerSettings(base="kit-base", store=tmp_path / "store"), tmp_path / "out")
    assert "--chat-template" not in read_flags(tmp_path / "out")
    assert (tmp_path / "out/templates/two.jinja").read_text("utf-8") == "{# two #}"
    assert "one, two" in notes[1]


def test_an_adapter_that_vllm_cannot_read_stops_all_and_is_named(base: Base, tmp_path: Path) -> None:
    save(base, tmp_path / "store", "good")
    save(base, tmp_path / "store", "bad", use_dora=True)
    with pytest.raises(ExportError, match=r"(?s)bad: .*use_dora"):
        write_vllm_handover(ServerSettings(base="kit-base", store=tmp_path / "store"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="no adapter"):
        write_vllm_handover(ServerSettings(base="kit-base", store=tmp_path), tmp_path / "other")
