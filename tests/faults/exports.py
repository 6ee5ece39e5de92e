"""Faults of what is written for other programs: each reads something else from it than was meant, and says nothing."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any, Final

import gguf
import yaml

import lora_kit as lk
from lora_kit.adapter.folder import CONFIG
from lora_kit.errors import ExportError, LoraKitError
from lora_kit.exporters.llama_cpp import GGUF_FILE
from lora_kit.training.train import train
from tests.faults.fault import Act, Fault
from tests.support import folders, merging, texts
from tests.support.training import PAIRS

_ROPE: Final = {"rope_theta": 500_000.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}


def _export(target: str, **options: Any) -> Act:
    base = options.pop("base", "base")
    return lambda folder: lk.export(
        folder / "adapter", target, folder / "out", base=base if base == "kit-base" else folder / base, replace=True
    )


def _command(target: str, base: str = "base") -> tuple[str, ...]:
    return ("export", "adapter", "--target", target, "--base", base, "--out", "out", "--replace")


def _dora(folder: Path) -> None:
    merging.adapter_folder(folder / "base", folder / "adapter", target_modules=["q_proj"], use_dora=True)


def _check_mlx_dora(folder: Path) -> None:
    fields = json.loads((folder / "out" / CONFIG).read_text("utf-8"))
    assert fields["fine_tune_type"] == "dora", fields


def _plain(folder: Path) -> None:
    folders.adapter().save(folder / "adapter")


def _check_vllm_slots(folder: Path) -> None:
    """Base requests in a mixed batch get the adapter of the last slot where there is no slot to spare."""
    page = (folder / "out" / "README.md").read_text("utf-8")
    (command,) = re.findall(r"^vllm serve .+$", page, re.MULTILINE)
    words = shlex.split(command)
    assert words[words.index("--max-loras") + 1] == "2", command
    assert "issues/48421" in page, "the page does not say why"


def _for_kit_base(folder: Path) -> None:
    model = lk.load_base("kit-base").model
    bank = lk.attach(model, lk.LoraConfig(r=2, target_modules=("q_proj",), init_lora_weights=False), name="x")
    bank.save("x", folder / "adapter")


def _check_gguf(folder: Path) -> None:
    page = (folder / "out" / "README.md").read_text("utf-8")
    assert "pre-tokenizer was not recognized" in page, "the page does not say what the converter will say"
    fields = gguf.GGUFReader(folder / "out" / GGUF_FILE).fields
    assert "adapter.lora.alpha" in fields, list(fields)


def _full_recipe(folder: Path) -> None:
    """A base whose config has the fields of rotary embeddings that older programs read."""
    file = folder / "base" / "config.json"
    fields = {**json.loads(file.read_text("utf-8")), **_ROPE}
    fields.pop("rope_parameters", None)
    file.write_text(json.dumps(fields), "utf-8")
    texts.write(folder / "rows.jsonl", PAIRS)
    section = {"max_steps": 1, "per_device_train_batch_size": 4, "save_strategy": "no"}
    recipe = {"base": str(folder / "base"), "data": {"train": str(folder / "rows.jsonl")}, "method": "full"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "out": str(folder / "out"), "train": section}))


def _check_rope(folder: Path) -> None:
    written = json.loads((folder / "out" / "config.json").read_text("utf-8"))
    assert {name: written.get(name) for name in _ROPE} == _ROPE


def _row(
    name: str,
    make: Act,
    act: Act,
    command: tuple[str, ...],
    says: str = "",
    *,
    error: type[LoraKitError] | None = None,
    check: Act | None = None,
) -> Fault:
    return Fault(
        name=name, make=make, act=act, command=command, says=says, error=error, check=check, writes=error is None
    )


EXPORTS: tuple[Fault, ...] = (
    _row("a DoRA for mlx-lm", _dora, _export("mlx"), _command("mlx"), check=_check_mlx_dora),
    _row("a DoRA for a server that reads none", _dora, _export("tgi"), _command("tgi"), "use_dora", error=ExportError),
    _row("an adapter for vLLM", _plain, _export("vllm"), _command("vllm"), check=_check_vllm_slots),
    _row(
        "a tokenizer that llama.cpp does not know",
        _for_kit_base,
        _export("gguf", base="kit-base"),
        _command("gguf", "kit-base"),
        check=_check_gguf,
    ),
    _row(
        "rotary embeddings that older programs read elsewhere",
        _full_recipe,
        lambda folder: train(folder / "recipe.yaml"),
        ("train", "recipe.yaml", "--replace"),
        check=_check_rope,
    ),
)
