"""Trainers of others train a model with a bank: TRL's for instructions and preferences, transformers' own, a loop."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from lora_kit.adapter.adapter import Adapter
from lora_kit.bank.attach import attach
from lora_kit.bank.bank import AdapterBank
from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import BankError
from tests.support import texts, tiny

trl = pytest.importorskip("trl", reason="TRL is not installed (pip install 'lora-kit[bench]')")

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "trainers.md"
PAIRS = [
    {"prompt": "one ", "completion": "two"},
    {"prompt": "a longer prompt ", "completion": "x"},
    {"prompt": "b ", "completion": "a longer completion"},
    {"prompt": "cc ", "completion": "dddd"},
]
PREFERENCES = [
    {"prompt": pair["prompt"], "chosen": pair["completion"], "rejected": "no " * (2 + i)}
    for i, pair in enumerate(PAIRS)
]
OWN = {"bf16": True, "gradient_checkpointing": True}
"""What TRL does where nothing is said."""
PLAIN = {"bf16": False, "gradient_checkpointing": False}
WAYS = pytest.mark.parametrize(
    ("kind", "how"),
    [
        pytest.param("llama", PLAIN, id="llama, fp32"),
        pytest.param("llama", OWN, id="llama, bf16, checkpointing"),
        pytest.param("gpt2", OWN, id="gpt2, bf16, checkpointing"),
    ],
)
# Said by transformers about the names that TRL uses.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")


@pytest.fixture(autouse=True)
def _one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Outputs and data sets in a folder of their own; the state that accelerate keeps for the process put back."""
    from accelerate.state import AcceleratorState, GradientState

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def with_bank(model: torch.nn.Module, **config: Any) -> AdapterBank:
    return attach(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **config}), name="trained")


def arguments(kind: Any, **changes: Any) -> Any:
    settings = {
        **{"max_steps": 8, "learning_rate": 2e-2, "per_device_train_batch_size": 4, "logging_steps": 1, "seed": 0},
        **{"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True},
    }
    return kind("out", **{**settings, **changes})


def sft(model: Any, **changes: Any) -> Any:
    return trl.SFTTrainer(
        model,
        arguments(trl.SFTConfig, **changes),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=texts.tokenizer(),
    )


def dpo(model: Any, bank: AdapterBank, **changes: Any) -> Any:
    return trl.DPOTrainer(
        model,
        ref_model=bank.reference(),
        args=arguments(trl.DPOConfig, **changes),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=texts.tokenizer(),
    )


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def check_only_the_adapter_changed(bank: AdapterBank, before: Mapping[str, torch.Tensor], initial: Adapter) -> None:
    """Every tensor of the adapter moved; taken off, the model has every bit it had before."""
    trained = bank.snapshot("trained")
    assert trained.tensors.keys() == initial.tensors.keys()
    assert not [key for key in trained.tensors if torch.equal(trained.tensors[key], initial.tensors[key])]
    assert {parameter.dtype for parameter in bank.parameters("trained")} == {torch.float32}
    bank.detach()
    after = bank.model.state_dict()
    assert list(after) == list(before)
    assert not [name for name in before if not torch.equal(after[name], before[name])]


# Instructions


@WAYS
def test_sft_changes_the_adapter_and_nothing_else(kind: str, how: dict[str, bool]) -> None:
    model = tiny.MODELS[kind]()
    before = state(model)
    bank = with_bank(model)
    initial = bank.snapshot("trained")
    trainer = sft(model, **how)
    trainer.train()
    found = losses(trainer)
    assert found[-1] < found[0] - 0.2
    check_only_the_adapter_changed(bank, before, initial)


def test_sft_gives_the_same_adapter_with_and_without_checkpointing() -> None:
    adapters = []
    for checkpointing in (False, True):
        model = tiny.llama()
        bank = with_bank(model)
        sft(model, bf16=False, gradient_checkpointing=checkpointing).train()
        adapters.append(bank.snapshot("trained"))
    for key, tensor in adapters[0].tensors.items():
        torch.testing.assert_close(adapters[1].tensors[key], tensor, rtol=0, atol=1e-6)


# Preferences


@WAYS
def test_dpo_changes_the_adapter_and_nothing_else(kind: str, how: dict[str, bool]) -> None:
    model = tiny.MODELS[kind]()
    before = state(model)
    bank = with_bank(model)
    initial = bank.snapshot("trained")
    trainer = dpo(model, bank, **how)
    trainer.train()
    found = losses(trainer)
    # A fresh adapter does nothing, so at first it cannot be told from its reference.
    assert found[0] == pytest.approx(math.log(2), abs=1e-2 if how["bf16"] else 1e-6)
    assert found[-1] < found[0] - 0.2
    assert bank.active == "trained"
    check_only_the_adapter_changed(bank, before, initial)


class Kept:
    """What a model was given and gave, call by call."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.calls: list[tuple[dict[str, Any], torch.Tensor]] = []
        module.register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.calls.append((kwargs, output.log_probs.clone()))


@pytest.mark.parametrize(("kind", "how"), [("llama", OWN), ("gpt2", PLAIN)], ids=["bf16", "fp32"])
def test_the_reference_of_dpo_is_the_base_bit_for_bit_at_every_step(kind: str, how: dict[str, bool]) -> None:
    from trl.trainer.utils import add_fused_lm_head

    model = tiny.MODELS[kind]()
    bank = with_bank(model, lora_dropout=0.5)
    trainer = dpo(model, bank, **how, disable_dropout=False)
    kept = Kept(trainer.ref_model)
    trainer.train()
    assert len(kept.calls) == 8
    untouched = tiny.MODELS[kind]()
    add_fused_lm_head(untouched)
    for inputs, log_probs in kept.calls:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how["bf16"]):
            expected = untouched(**inputs).log_probs.float()
        assert torch.equal(log_probs, expected)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how["bf16"]):
            assert not torch.equal(model.eval()(**inputs).log_probs.float(), expected)


def test_reference_log_probs_computed_beforehand_are_those_of_the_base_too() -> None:
    for seed in (0, 1):  # TRL keeps what it computed, and must not take one base's for another's
        model = tiny.llama(seed=seed)
        bank = with_bank(model)
        disturb(bank)
        ours = dpo(model, bank, precompute_ref_log_probs=True)
        plain = trl.DPOTrainer(
            tiny.llama(seed=5),
            ref_model=tiny.llama(seed=seed),
            args=arguments(trl.DPOConfig, precompute_ref_log_probs=True),
            train_dataset=Dataset.from_list(PREFERENCES),
            processing_class=texts.tokenizer(),
        )
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            assert ours.train_dataset[name][:] == plain.train_dataset[name][:]


def disturb(bank: AdapterBank) -> None:
    """Give an adapter an effect."""
    with torch.no_grad():
        for leaf in bank.parameters("trained"):
            leaf.normal_(std=0.2)


def test_a_reference_is_the_base_whatever_is_routed_and_leaves_everything_as_it_was() -> None:
    model = tiny.gpt2()
    batch = tiny.batch()
    expected = tiny.logits(model, batch)
    bank = with_bank(model)
    disturb(bank)
    reference = bank.reference()
    model.train()
    with bank.rows(["trained", None, "trained"]):
        assert torch.equal(reference(**batch).logits, expected)
        assert bank.active == ("trained", None, "trained")
    assert all(module.training for module in model.modules())
    assert not reference(**batch).logits.requires_grad
    assert not list(reference.parameters())
    with pytest.raises(ValueError, match="input_ids"):
        reference()
    assert (bank.active, model.training) == ("trained", True)


@pytest.mark.parametrize("config", [{"target_modules": ["q_proj", "lm_head"]},
                                    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}])  # fmt: skip
def test_a_bank_that_covers_the_head_has_no_reference(config: dict[str, Any]) -> None:
    bank = with_bank(tiny.llama(), **config)
    with pytest.raises(BankError, match="covers the head"):
        bank.reference()


# What the document shows


def documented() -> dict[str, str]:
    """The pieces of code of the document, by the heading above them."""
    pieces: dict[str, str] = {}
    heading = ""
    for line, code in re.findall(r"^#+ ([^\n]+)$|^```python\n(.*?)^```$", DOCUMENT.read_text(), re.M | re.S):
        heading = line or heading
        if code:
            pieces[heading if heading not in pieces else f"{heading}, end"] = code
    return pieces


def test_the_document_has_the_pieces_that_are_run_here() -> None:
    assert list(documented()) == ["Trainers of others", "Trainers of others, end", *TRAINERS]


TRAINERS = ["A plain loop", "transformers.Trainer", "TRL: SFTTrainer", "TRL: DPOTrainer"]


@pytest.mark.parametrize("way", TRAINERS)
def test_the_documented_code_trains_the_adapter_and_nothing_else(way: str) -> None:
    pieces = documented()
    names: dict[str, Any] = {}
    exec(pieces["Trainers of others"], names)
    model, bank = names["model"], names["bank"]
    untouched = state(model)
    initial = bank.snapshot("sql")
    exec(pieces[way], names)
    if "trainer" in names:
        found = [entry for entry in names["trainer"].state.log_history if "train_loss" in entry]
        assert math.isfinite(found[-1]["train_loss"])
    exec(pieces["Trainers of others, end"], names)
    saved = Adapter.load("adapters/sql")
    assert not [key for key in saved.tensors if torch.equal(saved.tensors[key], initial.tensors[key])]
    after = model.state_dict()
    assert len(after) == len(untouched)
    assert not [name for name in after if not torch.equal(after[name], untouched[name])]
