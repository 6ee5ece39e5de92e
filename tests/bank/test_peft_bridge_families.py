"""The bridge beyond linear layers: fused experts, convolutions, and several adapters trained by turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import peft
import pytest
import torch
from torch import Tensor, nn

import lora_kit as lk
from lora_kit.errors import BankError, RoutingError
from lora_kit.layers.external_params import AdoptedConvolution, AdoptedParameter
from lora_kit.layers.parameter import LoraParameter
from tests.support import tiny
from tests.support.families import FAMILIES, Family, loss, outputs
from tests.support.peft_models import looks, two_adapters

BY_NAME: Final = {family.name: family for family in FAMILIES}
FUSED: Final = ["experts.gate_up_proj", "experts.down_proj"]
CASES: Final[list[tuple[str, dict[str, Any]]]] = [
    ("Mixtral", {"target_modules": ["q_proj"], "target_parameters": FUSED}),
    ("Qwen 3 MoE", {"target_modules": [], "target_parameters": [*FUSED, "mlp.gate.weight"], "use_rslora": True}),
    ("gpt-oss", {"target_modules": ["q_proj"], "target_parameters": FUSED}),
    ("gpt-oss", {"target_modules": [], "target_parameters": FUSED[1:]}),
    ("ViT", {"target_modules": ["projection", "q_proj"], "modules_to_save": ["classifier"]}),
    ("CLIP", {"target_modules": ["patch_embedding", "q_proj"], "lora_dropout": 0.1}),
]
FEW: Final = [CASES[0], CASES[2], CASES[4]]


def in_peft(name: str, fields: dict[str, Any], adapters: tuple[str, ...] = ("default",)) -> Any:
    """A family's model in PEFT, with adapters that do something."""
    torch.manual_seed(2)
    fields = {"lora_alpha": 6, **fields}
    model = peft.get_peft_model(BY_NAME[name].make(), peft.LoraConfig(r=3, **fields), adapter_name=adapters[0])
    for rank, adapter in enumerate(adapters[1:], start=4):
        model.add_adapter(adapter, peft.LoraConfig(r=rank, **fields))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def steps(model: Any, family: Family, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
    losses, inputs = [], family.inputs()
    for _ in range(count):
        value = loss(model, inputs)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_losses_go_on_as_pefts_own_for_experts_and_convolutions(name: str, fields: dict[str, Any]) -> None:
    runs = []
    for adopts in (False, True):
        model = in_peft(name, fields).train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        torch.manual_seed(0)
        first = steps(model, BY_NAME[name], optimizer, 6)
        if adopts:
            bank = lk.adopt(model)
            assert {id(p) for p in bank.parameters("default")} == {id(p) for p in parameters}
            kinds = (AdoptedConvolution, AdoptedParameter)
            assert any(isinstance(module, kinds) for module in model.modules())
        runs.append(first + steps(model, BY_NAME[name], optimizer, 20))
    assert runs[1][-1] < runs[1][5] < runs[1][0]
    torch.testing.assert_close(torch.tensor(runs[1]), torch.tensor(runs[0]), rtol=1e-4, atol=0)


class Heard(nn.Module):
    """A convolution over time and a layer above it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.out = nn.Conv1d(4, 6, 3, stride=2, padding=1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(self.conv(x).mT)
        return found


def test_losses_go_on_as_pefts_own_for_a_convolution_over_time_with_dropout() -> None:
    runs = []
    for adopts in (False, True):
        torch.manual_seed(0)
        fields: dict[str, Any] = {"r": 2, "target_modules": ["conv", "out"], "lora_dropout": 0.2}
        model = peft.get_peft_model(Heard(), peft.LoraConfig(**fields)).train()
        if adopts:
            lk.adopt(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        x, run = torch.randn(3, 4, 9), []
        for _ in range(20):
            value = (model(x) - 1).square().mean()
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.append(value.item())
        runs.append(run)
    assert runs[1][-1] < runs[1][0]
    torch.testing.assert_close(torch.tensor(runs[1]), torch.tensor(runs[0]), rtol=1e-4, atol=0)


def test_adopted_experts_are_computed_in_rank_space(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise AssertionError("a changed weight was made")

    monkeypatch.setattr(LoraParameter, "compute_updated_weight", fails)
    model = in_peft(*CASES[0])
    lk.adopt(model)
    loss(model, BY_NAME["Mixtral"].inputs()).backward()


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_experts_and_convolutions_are_given_back_as_they_were(
    name: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    model, inputs = in_peft(name, fields).eval(), BY_NAME[name].inputs()
    wanted = outputs(model, inputs)  # first: where PEFT computes with a changed parameter, it puts it behind the others
    before, keys = looks(model), list(model.state_dict())
    places = [(p.data_ptr(), p.stride()) for p in model.parameters()]
    model.save_pretrained(tmp_path / "theirs")
    bank = lk.adopt(model)
    torch.testing.assert_close(outputs(model, inputs), wanted, rtol=0, atol=1e-5)
    assert {(p.data_ptr(), p.stride()) for p in bank.parameters("default")} <= set(places)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path / "ours")
    theirs = lk.Adapter.load(tmp_path / "theirs")
    assert lk.Adapter.load(tmp_path / "ours") == theirs
    assert bank.snapshot("default").tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(tensor, theirs.tensors[key]) for key, tensor in bank.snapshot("default").tensors.items())
    assert bank.to_peft() is model
    assert looks(model) == before
    assert [(p.data_ptr(), p.stride()) for p in model.parameters()] == places
    torch.testing.assert_close(outputs(model, inputs), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "fields"), FEW)
def test_rows_may_mix_adopted_adapters_of_experts_and_convolutions(name: str, fields: dict[str, Any]) -> None:
    model, inputs = in_peft(name, fields, ("one", "two")).eval(), BY_NAME[name].inputs()
    alone = {}
    for adapter in ("one", "two"):
        model.set_adapter(adapter)
        alone[adapter] = outputs(model, inputs)
    with model.disable_adapter():
        alone["__base__"] = outputs(model, inputs)
    bank = lk.adopt(model)
    names = ["two", "__base__", "one"]
    with bank.rows([None if adapter == "__base__" else adapter for adapter in names]):
        mixed = outputs(model, inputs)
    torch.testing.assert_close(mixed, torch.stack([alone[a][row] for row, a in enumerate(names)]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "fields"), [*FEW, ("Llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]})]
)
def test_adapters_of_several_names_trained_by_turns_go_on_with_their_optimizers(
    name: str, fields: dict[str, Any]
) -> None:
    family, runs = BY_NAME[name], []
    for adopts in (False, True):
        model = in_peft(name, fields, ("one", "two")).train()
        optimizers = {}
        for adapter in ("one", "two"):
            model.set_adapter(adapter)
            optimizers[adapter] = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        run = []
        for turn, adapter in enumerate(["one", "two"] * 6):
            if adopts and turn == 3:
                bank = lk.adopt(model)
            if turn == 9:
                model = bank.to_peft() if adopts else model
            model.set_adapter(adapter)
            run += steps(model, family, optimizers[adapter], 3)
        runs.append(run)
    assert min(runs[1][-3:]) < min(runs[1][:3])
    torch.testing.assert_close(torch.tensor(runs[1]), torch.tensor(runs[0]), rtol=1e-4, atol=0)


def test_what_came_to_an_adopted_layer_and_went_is_not_in_the_way_back(tmp_path: Path) -> None:
    model = in_peft("Mixtral", {"target_modules": [], "target_parameters": FUSED[:1]}).eval()
    wanted = outputs(model, BY_NAME["Mixtral"].inputs())
    before = looks(model)
    bank = lk.adopt(model)
    bank.add("fresh", lk.LoraConfig(r=2, target_modules=(), target_parameters=tuple(FUSED), init_lora_weights=False))
    with bank.using("fresh"):
        fresh = outputs(model, BY_NAME["Mixtral"].inputs())
        assert not torch.allclose(fresh, wanted)
    torch.testing.assert_close(outputs(model, BY_NAME["Mixtral"].inputs()), wanted, rtol=0, atol=1e-5)
    with pytest.raises(BankError, match="fresh was added"):
        bank.to_peft()
    bank.save("fresh", tmp_path / "fresh")
    bank.unload("fresh")
    bank.to_peft()
    assert looks(model) == before
    assert torch.equal(outputs(model, BY_NAME["Mixtral"].inputs()), wanted)
    judge = peft.PeftModel.from_pretrained(BY_NAME["Mixtral"].make(), tmp_path / "fresh")
    torch.testing.assert_close(outputs(judge, BY_NAME["Mixtral"].inputs()), fresh, rtol=0, atol=1e-5)


def test_rows_of_dora_with_dropout_are_not_trained_as_something_else() -> None:
    model = two_adapters(use_dora=True, lora_dropout=0.1)
    bank = lk.adopt(model.train())
    with bank.rows(["default", None, "other"]), pytest.raises(RoutingError, match="DoRA with dropout"):
        model(**tiny.batch())
    model.eval()
    with bank.rows(["default", None, "other"]):
        model(**tiny.batch())
