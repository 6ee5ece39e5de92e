"""Every option of PEFT's LoraConfig: an adapter made with it loads with equal logits, or is refused by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import lora_kit as lk
from lora_kit.adapter.folder import WEIGHTS
from lora_kit.adapter.peft_keys import PREFIX
from lora_kit.config.peft_fields import INITS_OF_PEFT
from lora_kit.errors import AdapterError, ConfigError, TargetError
from lora_kit.exporters.export import check
from tests.support import folders, tiny
from tests.support.peft_models import peft_model
from tests.support.peft_options import CASES, LOADS, PAGE, Case, find_outcome, render_table, split_page


@pytest.fixture(scope="module")
def outcomes() -> dict[int, str]:
    """What was found, by position in `CASES`."""
    return {}


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{case.option} {case.shown}" for case in CASES])
def test_an_adapter_of_peft_loads_or_is_refused_by_the_name_of_the_field(index: int, outcomes: dict[int, str]) -> None:
    case = CASES[index]
    outcomes[index] = outcome = find_outcome(case)
    assert outcome == LOADS or outcome.startswith(f"{case.option}=") or case.option == "peft_type"
    row = split_page(PAGE.read_text())[1].splitlines()[3 + index]
    assert row.endswith(f"| {outcome} |"), "stale: run `python -m tests.support.peft_options`"


def test_the_table_of_the_page_is_fresh(outcomes: dict[int, str]) -> None:
    if len(outcomes) < len(CASES):
        pytest.skip("the cases ran elsewhere")
    assert split_page(PAGE.read_text())[1] == render_table(outcomes), "run `python -m tests.support.peft_options`"


def test_no_option_of_peft_and_no_task_is_left_out() -> None:
    options = {field.name for field in dataclasses.fields(peft.LoraConfig) if field.init}
    assert {case.option for case in CASES} == options
    tasks = {case.fields["task_type"] for case in CASES if case.option == "task_type"}
    assert tasks == {None, *(str(task.value) for task in peft.TaskType)}


def test_a_wrong_value_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_kit.config.lora_config.LoraConfig.scaling_of", lambda self, path: 1.0)
    with pytest.raises(AssertionError, match="is off by"):
        find_outcome(Case("r", {"r": 2}))


@pytest.mark.parametrize("init", INITS_OF_PEFT)
def test_nothing_new_is_trained_with_an_initialization_of_peft_alone(init: str) -> None:
    with pytest.raises(ConfigError, match=f"init_lora_weights={init} is not supported in training"):
        lk.attach(tiny.llama(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=init))


@pytest.mark.parametrize("fields", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}])
def test_tied_layers_are_not_trained_apart(fields: dict[str, Any]) -> None:
    config = peft.LoraConfig(**{"target_modules": ["q_proj"], **fields}, ensure_weight_tying=True)
    with pytest.raises(TargetError, match=r"ensure_weight_tying=True is not supported in training: .*lm_head"):
        lk.attach(tiny.llama(tie=True), config)
    lk.attach(tiny.llama(), config)  # whose layers are not tied


def test_a_tied_layer_that_the_file_says_nothing_of_is_not_covered(tmp_path: Path) -> None:
    model = peft_model(target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "a")
    adapter = lk.Adapter.load(tmp_path / "a")
    config = dataclasses.replace(adapter.config, extra={"ensure_weight_tying": True})
    stray = {f"{PREFIX}model.norm.weight": torch.ones(32)}
    bank = lk.attach(tiny.llama(tie=True), slots=1, max_rank=4)
    with pytest.raises(AdapterError, match=r"the file has model\.norm\.weight, which is in no module"):
        bank.load("a", lk.Adapter(config, {**adapter.tensors, **stray}))
    bank.load("a", lk.Adapter(config, adapter.tensors))
    assert {target.path.rpartition(".")[2] for target in bank.coverage("a").targets} == {"q_proj"}


def test_copies_of_the_base_are_compared_in_the_coarser_dtype(tmp_path: Path) -> None:
    model = peft_model(target_modules=["q_proj", "embed_tokens", "lm_head"])
    model.save_pretrained(tmp_path / "a")
    lk.attach(tiny.llama(dtype=torch.bfloat16), slots=1, max_rank=4).load("a", tmp_path / "a")
    with pytest.raises(AdapterError, match="a weight for lm_head that is not the base's"):
        lk.attach(tiny.llama(dtype=torch.bfloat16, seed=1), slots=1, max_rank=4).load("a", tmp_path / "a")
    tiny.llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    assert not check(tmp_path / "a", "peft", base=tmp_path / "base").refused  # whose model is on meta


def test_a_weight_file_without_metadata_loads(tmp_path: Path) -> None:
    folder = folders.foreign(tmp_path / "a")
    header, payload = folders.taken_apart((folder / WEIGHTS).read_bytes())
    (folder / WEIGHTS).write_bytes(folders.raw({"__metadata__": None, **header}, payload))
    assert lk.Adapter.load(folder) == folders.adapter()
