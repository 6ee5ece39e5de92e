"""The folder of a checkpoint is an adapter's, and its training goes on from it as before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_kit.adapter.adapter import Adapter
from lora_kit.bank.attach import attach
from lora_kit.cli.main import main
from lora_kit.errors import BaseMismatchError, LoraKitError
from lora_kit.generation.prompts import find_adapter_style
from lora_kit.io.read import hash_file
from lora_kit.io.sealed_json import NO_DIGEST, SELF_DIGEST, seal_json
from lora_kit.models.loading import Base
from lora_kit.training.loop.checkpoints import MARKER
from lora_kit.training.loop.resumable import WEIGHTS
from lora_kit.training.loop.weight_files import load_tensors, save_tensors
from lora_kit.training.train import train
from tests.support.interrupted import DROPOUT, die_at, killed, long_recipe, results, run_of, unbroken
from tests.support.long_runs import take_few
from tests.support.training import LABELED, base_of

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {}),
    "dora": ("llama", {"lora": {**DROPOUT, "use_dora": True}}),
    "pissa": ("llama", {"lora": {"init_lora_weights": "pissa"}}),
    "features": ("llama", {"method": "features", "lora": {}}),
    "classify": ("bert", {"task": "classify", "rows": LABELED}),
}


def base_for(kind: str) -> Base:
    return base_of(kind, **({"labels": 2} if kind == "bert" else {}))


def checkpoint_of(recipe: dict[str, Any], kind: str = "llama") -> Path:
    """Return the checkpoint of step 4 of a training that was killed."""
    killed(recipe, die_at(5), base=lambda: base_for(kind))
    return run_of(Path(recipe["out"])) / "checkpoint-4"


@pytest.mark.parametrize("case", KINDS)
def test_a_checkpoint_is_what_a_training_of_so_many_steps_saves(tmp_path: Path, case: str) -> None:
    kind, changes = KINDS[case]
    # A training of so few steps computes frozen layers in every step: its last bits would be others.
    changes = {**changes, "train": {"lr_scheduler_type": "constant", "warmup_steps": 0, "prefix_cache": "off"}}
    checkpoint = Adapter.load(checkpoint_of(long_recipe(tmp_path, **changes), kind))
    shorter = train({**long_recipe(tmp_path, steps=4, **changes), "out": str(tmp_path / "four")}, base=base_for(kind))
    assert checkpoint.digest == shorter.digest
    finished = Adapter.load(shorter.out)
    assert checkpoint.base == finished.base
    for key in ("labels", "problem", "seed"):
        assert checkpoint.record.get(key) == finished.record.get(key)
    assert find_adapter_style(checkpoint) == find_adapter_style(finished)
    assert checkpoint.record["checkpoint"] == {"step": 4, "steps": 7}
    assert "run" not in checkpoint.record  # it says whose checkpoints are done with
    assert "checkpoint" not in finished.record


def test_a_bank_takes_a_checkpoint_and_no_other_base_does(tmp_path: Path) -> None:
    folder = checkpoint_of(long_recipe(tmp_path))
    base = base_of()
    bank = attach(base.model, slots=1)
    bank.load("half", folder)
    bank.use("half")
    with torch.no_grad():
        other = base_of().model
        for parameter in other.parameters():
            parameter.mul_(2)
    with pytest.raises(BaseMismatchError):
        attach(other, slots=1).load("half", folder)


def test_the_adapter_of_a_checkpoint_is_stored_once(tmp_path: Path) -> None:
    folder = checkpoint_of(long_recipe(tmp_path))
    adapter = Adapter.load(folder)
    assert load_file(folder / WEIGHTS) == {}
    assert sum(tensor.numel() for tensor in load_tensors(folder / WEIGHTS).values()) == adapter.num_parameters


def test_tensors_are_the_same_whether_the_adapter_beside_them_holds_them_or_not(tmp_path: Path) -> None:
    zeros, nan = torch.zeros(2, 3), torch.tensor([float("nan"), -0.0])
    save_file({"a": zeros, "b": torch.ones(3), "c": nan}, tmp_path / "adapter_model.safetensors")
    tensors = {"same": zeros, "shape": torch.zeros(3, 2), "dtype": zeros.half(), "sign": -zeros, "nan": nan,
               "view": torch.ones(3, 3).t()[0]}  # fmt: skip
    save_tensors(tmp_path / WEIGHTS, tensors)
    assert sorted(load_file(tmp_path / WEIGHTS)) == ["dtype", "shape", "sign"]
    loaded = load_tensors(tmp_path / WEIGHTS)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].flatten().view(torch.uint8), tensor.contiguous().flatten().view(torch.uint8))
    save_file({"b": torch.ones(3)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LoraKitError, match="does not hold"):
        load_tensors(tmp_path / WEIGHTS)


@pytest.mark.parametrize(
    "name", take_few(["adapter_model.safetensors", "adapter_config.json", "lora_kit.json"], "adapter_config.json")
)
@pytest.mark.slow
def test_a_torn_checkpoint_is_no_adapter_and_is_not_resumed(tmp_path: Path, name: str) -> None:
    recipe = long_recipe(tmp_path)
    expected = unbroken(recipe)
    folder = checkpoint_of(recipe)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(LoraKitError):
        Adapter.load(folder)
    report = train(recipe, base=base_of())
    assert report.resumed == 2
    assert results(report.out) == expected


@pytest.mark.slow
def test_a_checkpoint_of_before_without_an_adapter_goes_on(tmp_path: Path) -> None:
    recipe = long_recipe(tmp_path)
    expected = unbroken(recipe)
    folder = checkpoint_of(recipe)
    weights = load_tensors(folder / WEIGHTS)
    for name in ("adapter_model.safetensors", "adapter_config.json", "lora_kit.json", "README.md", MARKER):
        record = json.loads((folder / name).read_text()) if name == MARKER else {}
        (folder / name).unlink()
    save_file(weights, folder / WEIGHTS)
    files = {path.name: hash_file(path) for path in sorted(folder.iterdir())}
    record |= {"format": 2, "files": files, SELF_DIGEST: NO_DIGEST}
    (folder / MARKER).write_text(seal_json(json.dumps(record, indent=2, sort_keys=True)))
    report = train(recipe, base=base_of())
    assert report.resumed == 4
    assert results(report.out) == expected


def test_a_checkpoint_without_an_adapter_says_why(tmp_path: Path) -> None:
    (tmp_path / MARKER).write_text("{}")
    with pytest.raises(LoraKitError, match="has no adapter_config") as error:
        Adapter.load(tmp_path)
    assert "the same recipe goes on from it" in error.value.hint


@pytest.mark.slow
def test_what_peft_made_is_a_checkpoint_that_peft_loads(tmp_path: Path) -> None:
    from peft import PeftModel

    recipe = long_recipe(tmp_path, method="peft", peft={"peft_type": "IA3"})
    recipe.pop("lora")
    expected = unbroken(recipe)
    folder = checkpoint_of(recipe)
    model = PeftModel.from_pretrained(base_of().model, str(folder))
    assert any("ia3" in name for name in model.state_dict())
    assert results(train(recipe, base=base_of()).out) == expected


def test_the_command_line_takes_the_folder_of_a_checkpoint(
    tmp_path: Path, kit_recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    killed(kit_recipe, die_at(3), base=lambda: None)  # type: ignore[arg-type,return-value]
    folder = run_of(Path(kit_recipe["out"])) / "checkpoint-2"
    shutil.copytree(folder, tmp_path / "copy")
    for verb in (["eval", kit_recipe["data"]["train"]], ["generate", "--prompt", "one", "--max-new-tokens", "2"]):
        assert main([*verb, "--base", "kit-base", "--adapter", str(folder)]) == 0
    assert main(["inspect", str(folder)]) == 0
    assert "checkpoint-2" in capsys.readouterr().out


@pytest.fixture
def kit_recipe(tmp_path: Path) -> dict[str, Any]:
    return {**long_recipe(tmp_path, steps=3), "base": "kit-base", "lora": {"r": 2}}
