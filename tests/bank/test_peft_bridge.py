"""The bridge: a PeftModel adopted in the middle of its training, and given back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import lora_kit as lk
from lora_kit.errors import BankError, ConfigError, LoraKitError, RoutingError
from lora_kit.layers.slot_layer import SlotLayer
from tests.support import tiny
from tests.support.peft_models import looks, peft_model, two_adapters

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    ("llama", {"use_dora": True, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2}}),
    ("llama", {"use_rslora": True, "target_modules": ["q_proj", "embed_tokens"]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True, "lora_dropout": 0.1}),
]
ADAMS: dict[str, dict[str, Any]] = {"foreach": {"foreach": True}, "fused": {"fused": True}}


def trained(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """The losses of some steps."""
    losses = []
    for step in steps:
        inputs = tiny.batch(seed=step % 5)
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("adam", ADAMS)
@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_losses_go_on_as_pefts_own_when_it_is_adopted_in_the_middle(kind: str, fields: Any, adam: str) -> None:
    runs = []
    for adopts in (False, True):
        model = peft_model(kind, **fields).train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, **ADAMS[adam])
        torch.manual_seed(0)
        first = trained(model, optimizer, range(6))
        if adopts:
            bank = lk.adopt(model)
            assert [id(p) for p in bank.parameters("default")] == [id(p) for p in parameters]
            assert any(isinstance(module, SlotLayer) for module in model.modules())
        runs.append(first + trained(model, optimizer, range(6, 26)))
    assert runs[1][-1] < runs[1][5] < runs[1][0]
    torch.testing.assert_close(torch.tensor(runs[1]), torch.tensor(runs[0]), rtol=1e-4, atol=0)


def test_a_trainer_goes_on_with_a_model_that_is_adopted_under_it(tmp_path: Path) -> None:
    class Adopting(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 3:
                lk.adopt(model)

    rows = [{"input_ids": row, "labels": row} for seed in range(10) for row in tiny.batch(2, seed=seed)["input_ids"]]
    runs = []
    for name, callbacks in (("theirs", []), ("ours", [Adopting()])):
        model = peft_model(modules_to_save=["lm_head"])
        settings = transformers.TrainingArguments(
            output_dir=str(tmp_path / name), max_steps=8, per_device_train_batch_size=2, logging_steps=1, save_steps=8,
            learning_rate=1e-2, report_to="none", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, settings, train_dataset=rows, callbacks=callbacks)  # type: ignore[arg-type]
        trainer.train()
        runs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    torch.testing.assert_close(torch.tensor(runs[1]), torch.tensor(runs[0]), rtol=1e-4, atol=0)
    saved = [lk.Adapter.load(tmp_path / name / "checkpoint-8") for name in ("theirs", "ours")]
    assert saved[0].tensors.keys() == saved[1].tensors.keys()
    for key, tensor in saved[0].tensors.items():
        torch.testing.assert_close(saved[1].tensors[key], tensor, rtol=1e-3, atol=1e-4)


def test_no_value_moves_and_no_memory_is_taken(tmp_path: Path) -> None:
    model = two_adapters()
    places = {name: (p.data_ptr(), p.stride()) for name, p in model.named_parameters() if "lora_" in name}
    bank = lk.adopt(model)
    held = {(p.data_ptr(), p.stride()) for module in model.modules() for p in module.parameters(recurse=False)}
    assert held >= set(places.values())
    assert not any(
        slab.numel() for m in model.modules() if isinstance(m, SlotLayer) for slab in m.stacked_weights.values()
    )
    bank.to_peft()
    assert {name: (p.data_ptr(), p.stride()) for name, p in model.named_parameters() if "lora_" in name} == places


def test_it_is_given_back_as_it_was_but_for_what_it_learned() -> None:
    model = two_adapters(modules_to_save=["lm_head"]).train()
    before = looks(model)
    bank = lk.adopt(model)
    assert isinstance(model, peft.PeftModelForCausalLM)
    optimizer = torch.optim.SGD(bank.parameters("default"), lr=0.5)
    trained(model, optimizer, range(3))
    learned = tiny.logits(model.eval(), tiny.batch())
    assert bank.to_peft() is model
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(tiny.logits(model, tiny.batch()), learned, rtol=0, atol=1e-5)
    assert looks(model.train()) == before
    bank = lk.adopt(model)  # and once more
    torch.testing.assert_close(tiny.logits(model.eval(), tiny.batch()), learned, rtol=0, atol=1e-5)


def test_every_adapter_becomes_a_slot_and_rows_may_mix_them() -> None:
    model = two_adapters(modules_to_save=["lm_head"]).eval()
    alone = {"default": tiny.logits(model, tiny.batch())}
    model.set_adapter("other")
    alone["other"] = tiny.logits(model, tiny.batch())
    with model.disable_adapter():
        alone["__base__"] = tiny.logits(model, tiny.batch())
    bank = lk.adopt(model)
    assert bank.names == ("default", "other")
    assert bank.active == "other"
    for name in ("default", "other", None):
        with bank.using(name):
            torch.testing.assert_close(tiny.logits(model, tiny.batch()), alone[name or "__base__"], rtol=0, atol=1e-5)
    names = ["other", "__base__", "default"]
    with torch.no_grad():
        mixed = model(**tiny.batch(), adapter_names=names).logits
    expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)
    assert bank.active == "other"


def test_gradients_of_mixed_rows_reach_the_adopted_parameters() -> None:
    model = two_adapters()
    bank = lk.adopt(model)
    with bank.rows(["default", None, "other"]):
        model(**tiny.batch()).logits[0].square().sum().backward()
    mixed = [p.grad.clone() for p in bank.parameters("default") if p.grad is not None]
    model.zero_grad()
    bank.use("default")
    model(**tiny.batch()).logits[0].square().sum().backward()
    alone = [p.grad for p in bank.parameters("default")]
    assert len(mixed) == len(alone)
    torch.testing.assert_close(mixed, alone, rtol=1e-4, atol=1e-5)


def test_what_training_code_asks_of_a_peft_model_goes_on(tmp_path: Path) -> None:
    model = two_adapters(modules_to_save=["lm_head"]).eval()
    keys, before = list(model.state_dict()), tiny.logits(model, tiny.batch())
    model.save_pretrained(tmp_path / "theirs")
    bank = lk.adopt(model)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path / "ours")
    for part in ("", "other"):
        assert lk.Adapter.load(tmp_path / "ours" / part) == lk.Adapter.load(tmp_path / "theirs" / part)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model, tiny.batch()), tiny.logits(tiny.llama(), tiny.batch()))
    with torch.no_grad():
        for parameter in bank.parameters("default"):
            parameter.zero_()
    assert not torch.allclose(tiny.logits(model, tiny.batch()), before)
    model.load_adapter(tmp_path / "theirs", "default", is_trainable=True)
    torch.testing.assert_close(tiny.logits(model, tiny.batch()), before, rtol=0, atol=1e-5)
    assert {layer.active_adapters[0] for layer in model.get_layer_status()} == {"default"}
    model.set_adapter("other")
    assert bank.active == "other"
    assert bank.parameters("other") == [p for p in model.parameters() if p.requires_grad]
    assert bank.snapshot("other") == lk.Adapter.load(tmp_path / "theirs" / "other")


def test_the_adapter_in_use_is_the_active_one_in_peft() -> None:
    model = two_adapters()
    bank = lk.adopt(model)
    trains = [p.requires_grad for p in model.parameters()]
    bank.use("other")
    expected = tiny.logits(model.eval(), tiny.batch())
    bank.to_peft()
    assert model.active_adapter == "other"
    torch.testing.assert_close(tiny.logits(model, tiny.batch()), expected, rtol=0, atol=1e-5)
    assert sum(p.requires_grad for p in model.parameters()) == sum(trains)
    bank = lk.adopt(model)
    bank.use(None)
    bank.to_peft()
    assert torch.equal(tiny.logits(model, tiny.batch()), tiny.logits(tiny.llama(), tiny.batch()))
    assert lk.adopt(model).active is None


def test_a_saved_adopted_adapter_is_one_like_any_other(tmp_path: Path) -> None:
    model = peft_model(target_modules="all-linear", modules_to_save=["lm_head"])
    bank = lk.adopt(model)
    bank.save("default", tmp_path / "a")
    other = lk.attach(tiny.llama(), slots=1)
    other.load("a", tmp_path / "a")
    other.use("a")
    torch.testing.assert_close(
        tiny.logits(other.model, tiny.batch()), tiny.logits(model.eval(), tiny.batch()), rtol=0, atol=1e-5
    )


def test_the_masters_keep_their_dtype_when_the_model_changes_its_own() -> None:
    model = peft_model()
    bank = lk.adopt(model)
    expected = tiny.logits(model.eval(), tiny.batch())
    model.double()
    assert {p.dtype for p in bank.parameters("default")} == {torch.float32}
    torch.testing.assert_close(tiny.logits(model, tiny.batch()).float(), expected, rtol=0, atol=1e-4)


def merged(model: Any) -> Any:
    model.merge_adapter()
    return model


def rescaled(model: Any) -> Any:
    next(m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)).scale_layer(2.0)
    return model


def several(model: Any) -> Any:
    model.base_model.set_adapter(["default", "other"])
    return model


def hooked(model: Any) -> Any:
    layer = next(m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear))
    layer.register_forward_hook(lambda *_: None)
    return model


def trained_beside(model: Any) -> Any:
    model.base_model.model.model.norm.weight.requires_grad_(True)
    return model


def half_disabled(model: Any) -> Any:
    next(m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)).enable_adapters(False)
    return model


def conv(layer: nn.Module, **fields: Any) -> Any:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = layer, nn.Linear(4, 4)

    return peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["conv", "out"], **fields))


def other_method() -> Any:
    return peft.get_peft_model(tiny.llama(), peft.IA3Config(task_type="CAUSAL_LM"))


REFUSED: list[tuple[str, Callable[[], Any]]] = [
    ("IA3", other_method),
    ("LlamaForCausalLM", tiny.llama),
    ("merged", lambda: merged(peft_model())),
    ("was set to 4", lambda: rescaled(peft_model())),
    ("active at once", lambda: several(two_adapters())),
    ("hooks", lambda: hooked(peft_model())),
    ("norm.weight is trained", lambda: trained_beside(peft_model())),
    ("some of its layers", lambda: half_disabled(peft_model())),
    ("lora_bias", lambda: peft_model(target_modules=["q_proj"], lora_bias=True)),
    ("init_lora_weights", lambda: peft_model(init_lora_weights="pissa")),
    ("rows of tokens|trainable_token_indices", lambda: peft_model(trainable_token_indices=[3])),
    ("DoraConv2dVariant", lambda: conv(nn.Conv2d(2, 3, 3), use_dora=True)),
    ("with groups, dilation or a padding mode", lambda: conv(nn.Conv2d(2, 3, 3, dilation=2))),
    ("Conv3d", lambda: conv(nn.Conv3d(2, 3, 3))),
]


@pytest.mark.parametrize(("told", "make"), REFUSED, ids=[told for told, _ in REFUSED])
def test_what_is_not_understood_is_named_and_left_as_it_was(told: str, make: Callable[[], Any]) -> None:
    model = make()
    before, values = looks(model), state(model)
    with pytest.raises(LoraKitError, match=told):
        lk.adopt(model)
    assert looks(model) == before
    after = state(model)
    assert after.keys() == values.keys()
    assert all(torch.equal(after[key], values[key]) for key in values)


def test_a_refusal_half_way_leaves_everything_as_it_was() -> None:
    model = two_adapters()
    before = looks(model)
    config = model.peft_config["other"]
    config.target_modules = {"v_proj", "up_proj", "down_proj"}  # its layers say otherwise
    with pytest.raises(LoraKitError, match=r"do not agree on model\.layers\.0\.mlp\.down_proj"):
        lk.adopt(model)
    assert looks(model) == before
    config.target_modules = {"v_proj", "up_proj"}
    lk.adopt(model)


def test_what_would_change_layers_is_refused_while_they_are_ours() -> None:
    model = peft_model()
    bank = lk.adopt(model)
    calls: list[Callable[[], Any]] = [
        lambda: model.merge_and_unload(),
        lambda: model.add_adapter("b", peft.LoraConfig()),
        lambda: model.load_adapter("nowhere", "b"),
        lambda: model.delete_adapter("default"),
        lambda: model.base_model.set_adapter("default"),
        lambda: lk.adopt(model),
    ]
    for call in calls:
        with pytest.raises(BankError):
            call()
    bank.add("fresh", lk.LoraConfig(r=2, target_modules=("o_proj", "q_proj")))
    with pytest.raises(BankError, match="fresh was added"):
        bank.to_peft()
    bank.unload("fresh")
    bank.to_peft()
    with pytest.raises(BankError, match="detached already"):
        bank.detach()
    with pytest.raises(ConfigError):
        lk.adopt(model.merge_and_unload())


def test_no_method_of_peft_that_reaches_into_layers_is_forgotten() -> None:
    """New methods of a later PEFT must be looked at, and named here or in the guard."""
    from lora_kit.bank.peft_bridge.guard import GUARDED_METHODS

    harmless = {
        "forward", "generate", "get_base_model", "get_nb_trainable_parameters", "print_trainable_parameters",
        "create_or_update_model_card", "get_prompt", "get_prompt_embedding_to_save", "from_pretrained",
        "prepare_inputs_for_generation", "prepare_model_for_gradient_checkpointing", "supports_lora_conversion",
        "get_model_config", "push_to_hub", "tuner_layer_cls",
    }  # fmt: skip
    own = set(vars(nn.Module))
    for kind in (peft.PeftModelForCausalLM, peft.LoraModel):
        known = GUARDED_METHODS[kind is peft.LoraModel].keys() | harmless | own
        found = {name for name in dir(kind) if not name.startswith("_") and callable(getattr(kind, name))}
        assert not found - known, kind


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_an_adopted_model_is_a_peft_model_of_its_own(way: str, tmp_path: Path) -> None:
    model = peft_model("llama", target_modules=["q_proj"], modules_to_save=["lm_head"])
    bank = lk.adopt(model)
    expected = model(**tiny.batch()).logits
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(twin) is type(bank.to_peft())
    assert not any(isinstance(module, SlotLayer) for module in twin.modules())
    assert not twin.get_base_model()._forward_pre_hooks
    assert {name for name, p in twin.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }
    torch.testing.assert_close(twin(**tiny.batch()).logits, expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    torch.testing.assert_close(model(**tiny.batch()).logits, expected)


def test_an_adopted_model_goes_on_after_it_was_copied() -> None:
    model = peft_model("llama", target_modules=["q_proj"])
    bank = lk.adopt(model)
    copy.deepcopy(model)
    assert any(isinstance(module, SlotLayer) for module in model.modules())
    with bank.rows(["default", None]), pytest.raises(RoutingError):
        model(**tiny.batch(3))
