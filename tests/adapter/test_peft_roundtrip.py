"""PEFT as the judge: an adapter made here gives the same logits there, and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import lora_kit as lk
from lora_kit.adapter.inspect import inspect
from lora_kit.errors import AdapterError, ConfigError, TargetError
from tests.support import tiny

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 4, "lora_alpha": 8}),
    ("llama", {"r": 4, "use_rslora": True, "target_modules": ["q_proj", "embed_tokens"]}),
    (
        "llama",
        {"r": 4, "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 6}, "alpha_pattern": {"up_proj": 32}},
    ),
    ("llama", {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("llama", {"target_modules": [], "modules_to_save": ["lm_head"]}),
    ("llama", {"target_modules": r".*\.layers\.0\..*_proj"}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    ("llama", {"r": 4, "use_dora": True}),
    ("gpt2", {"r": 4, "use_dora": True, "use_rslora": True}),
    ("bert", {"r": 4, "use_dora": True, "target_modules": ["query", "dense"], "modules_to_save": ["classifier"]}),
    ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj", "wte"]}),
    ("gpt2", {"r": 4, "exclude_modules": ["c_proj"]}),
    ("bert", {"r": 4, "target_modules": ["query", "dense", "word_embeddings"], "modules_to_save": ["classifier"]}),
    ("bert", {"target_modules": [], "modules_to_save": ["classifier"]}),
    ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier", "pooler"]}),
]
FUSED = ["experts.gate_up_proj", "experts.down_proj"]
every_case = pytest.mark.parametrize(("kind", "fields"), CASES)
CLOSE = {"rtol": 0.0, "atol": 1e-5}


def shaken(parameters: list[nn.Parameter]) -> None:
    """Give a fresh adapter something to do."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def peft_config(kind: str, fields: dict[str, Any]) -> peft.LoraConfig:
    fields = {"target_modules": "all-linear", **fields}
    return peft.LoraConfig(
        **{**fields, "target_modules": fields["target_modules"] or "dummy-target-modules"},
        fan_in_fan_out=kind == "gpt2",
    )


@every_case
def test_an_adapter_made_here_gives_the_same_logits_in_peft(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = tiny.MODELS[kind]()
    bank = lk.attach(model, lk.LoraConfig(**fields), name="a")
    shaken(bank.parameters("a"))
    ours = tiny.logits(model, tiny.batch())
    bank.save("a", tmp_path / "a")
    theirs = tiny.logits(peft.PeftModel.from_pretrained(tiny.MODELS[kind](), tmp_path / "a"), tiny.batch())
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert not torch.allclose(ours, tiny.logits(tiny.MODELS[kind](), tiny.batch()), **CLOSE)


@every_case
def test_an_adapter_made_by_peft_gives_the_same_logits_here(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    theirs = peft.get_peft_model(tiny.MODELS[kind](), peft_config(kind, fields))
    shaken([parameter for parameter in theirs.parameters() if parameter.requires_grad])
    theirs.save_pretrained(tmp_path)
    model = tiny.MODELS[kind]()
    bank = lk.attach(model, slots=1)
    bank.load("a", tmp_path)
    bank.use("a")
    torch.testing.assert_close(tiny.logits(model, tiny.batch()), tiny.logits(theirs, tiny.batch()), **CLOSE)


@pytest.mark.parametrize(
    "fields", [{}, {"use_rslora": True, "lora_alpha": 3}, {"target_modules": {"q_proj", "v_proj"}}]
)
def test_a_peft_config_is_taken_wherever_one_of_ours_is(fields: dict[str, Any]) -> None:
    config = peft_config("llama", {"r": 4, **fields})
    ours = lk.attach(tiny.llama(), config).coverage("default")
    theirs = peft.get_peft_model(tiny.llama(), config)
    assert ours.parameters == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


def test_a_table_that_peft_wrote_along_must_be_the_bases_own(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(tiny.llama(), peft_config("llama", {"target_modules": ["embed_tokens"]}))
    theirs.save_pretrained(tmp_path)
    lk.attach(tiny.llama(), slots=1).load("a", tmp_path)
    with pytest.raises(lk.LoraKitError, match="not the base's"):
        lk.attach(tiny.llama(seed=3), slots=1).load("a", tmp_path)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_training_follows_peft_step_by_step(dropout: float, tmp_path: Path) -> None:
    model = tiny.llama()
    config = lk.LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["q_proj", "v_proj", "down_proj"])
    bank = lk.attach(model, config, name="a")
    bank.save("a", tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "a", is_trainable=True)
    losses: list[list[float]] = []
    for each, parameters in (
        (model, bank.parameters("a")),
        (theirs, [p for p in theirs.parameters() if p.requires_grad]),
    ):
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        each.train()
        torch.manual_seed(0)
        losses.append([])
        for step in range(50):
            inputs = tiny.batch(seed=step % 4)
            loss = each(**inputs, labels=inputs["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0] - 0.1
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=0)


def mixture() -> transformers.MixtralForCausalLM:
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, vocab_size=96, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(config).eval()


def test_pairs_of_fused_experts_come_into_and_leave_a_bank_whole(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"r": 4, "target_modules": ["q_proj"]}
    theirs = peft.get_peft_model(mixture(), peft.LoraConfig(**fields, target_parameters=FUSED[1:]))
    shaken([parameter for parameter in theirs.parameters() if parameter.requires_grad])
    theirs.save_pretrained(tmp_path / "one")
    expected = {None: tiny.logits(mixture(), tiny.batch()), "one": tiny.logits(theirs, tiny.batch())}
    model = mixture()
    names = list(model.state_dict())
    bank = lk.attach(model, dtype=torch.float32)
    bank.load("one", tmp_path / "one")  # of one parameter
    bank.add("both", lk.LoraConfig(**fields, target_parameters=FUSED, init_lora_weights=False))  # of two, beside it
    bank.use("both")
    expected["both"] = tiny.logits(model, tiny.batch())
    bank.save("both", tmp_path / "both")
    judge = peft.PeftModel.from_pretrained(mixture(), tmp_path / "both")
    torch.testing.assert_close(expected["both"], tiny.logits(judge, tiny.batch()), **CLOSE)
    order = ["both", None, "one"]
    with bank.rows(order):
        mixed = tiny.logits(model, tiny.batch())
    torch.testing.assert_close(mixed, torch.stack([expected[name][row] for row, name in enumerate(order)]), **CLOSE)
    bank.use("one")
    torch.testing.assert_close(tiny.logits(model, tiny.batch()), expected["one"], **CLOSE)
    bank.detach()
    assert list(model.state_dict()) == names
    assert torch.equal(tiny.logits(model, tiny.batch()), expected[None])


def test_what_pairs_of_experts_do_is_measured_expert_by_expert(tmp_path: Path) -> None:
    model = mixture()
    bank = lk.attach(
        model, lk.LoraConfig(r=4, target_modules=[], target_parameters=FUSED[1:], init_lora_weights=False), name="a"
    )
    bank.save("a", tmp_path / "a")
    before = model.model.layers[0].mlp.experts.down_proj.detach().clone()
    found = inspect(tmp_path / "a").layers[0]
    assert found.kind == "parameter"
    bank.merge("a")
    bank.detach()
    change = model.model.layers[0].mlp.experts.down_proj - before
    assert found.norm == pytest.approx(change.norm().item(), rel=1e-4)


def test_pairs_of_experts_are_refused_where_they_would_not_mean_the_same(tmp_path: Path) -> None:
    model = mixture()
    bank = lk.attach(model, lk.LoraConfig(r=4, target_modules=[], target_parameters=FUSED), name="a")
    adapter = bank.snapshot("a")
    with pytest.raises(AdapterError, match="for a parameter"):
        lk.resize(adapter, rank=2)
    with pytest.raises(AdapterError, match="for a parameter"):
        adapter.pairs()
    bank.detach()
    for more in ({"lora_dropout": 0.1}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}}):
        with pytest.raises(ConfigError, match=f"target_parameters with {next(iter(more))}"):
            lk.LoraConfig(target_parameters=FUSED, **more)
    with pytest.raises(ConfigError, match="without its module"):
        lk.LoraConfig(target_parameters=["down_proj"])
    with pytest.raises(TargetError, match=r"experts\.up"):
        lk.attach(model, lk.LoraConfig(target_modules=["q_proj"], target_parameters=["experts.up"]))
    with pytest.raises(TargetError, match="has LoRA weights already"):
        lk.attach(model, lk.LoraConfig(target_modules=["q_proj"], target_parameters=["q_proj.weight"]))
    fewer = dict(adapter.tensors)
    key = next(key for key in fewer if key.endswith("lora_A.weight"))
    fewer[key], other = fewer[key][:8], key.replace("lora_A", "lora_B")
    fewer[other] = fewer[other][:, :8]
    with pytest.raises(AdapterError, match="8 rows, but 4 experts of rank 4"):
        lk.attach(model, slots=1).load("a", lk.Adapter(adapter.config, fewer))


def test_training_of_fused_experts_follows_peft_step_by_step(tmp_path: Path) -> None:
    model = mixture()
    bank = lk.attach(model, lk.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=FUSED), name="a")
    bank.save("a", tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(mixture(), tmp_path / "a", is_trainable=True)
    losses = []
    for each, parameters in (
        (model, bank.parameters("a")),
        (theirs, [p for p in theirs.parameters() if p.requires_grad]),
    ):
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        run = []
        for step in range(8):
            inputs = tiny.batch(seed=step % 2)
            loss = each(**inputs, labels=inputs["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.append(loss.item())
        losses.append(run)
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=0)


class Convolved(nn.Module):
    """Convolutions in one and two dimensions, with strides and paddings."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 4, kernel_size=(3, 2), stride=2, padding=1)
        self.sound = nn.Conv1d(4, 6, kernel_size=3, padding="same")
        self.out = nn.Linear(6, 5)
        self.grouped, self.wide = nn.Conv1d(6, 6, 3, groups=3), nn.Conv1d(6, 6, 3, dilation=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.out(self.sound(self.image(x).flatten(2)).mean(2))
        return found


def convolved() -> Convolved:
    torch.manual_seed(0)
    return Convolved().eval()


def test_convolutions_agree_with_peft_both_ways_swap_serve_rows_and_merge(tmp_path: Path) -> None:
    x, fields = torch.randn(3, 3, 8, 8), {"r": 2, "lora_alpha": 6, "target_modules": ["image", "sound", "out"]}
    model, expected = convolved(), {None: convolved()(x)}
    bank = lk.attach(model, lk.LoraConfig(**fields, lora_dropout=0.2), name="a")
    torch.testing.assert_close(model(x), expected[None], rtol=0, atol=0)
    shaken(bank.parameters("a"))
    optimizer = torch.optim.SGD(bank.parameters("a"), lr=0.1)
    model.train()
    model(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in bank.parameters("a"))
    optimizer.step()
    model.eval()
    expected["a"] = model(x)
    bank.save("a", tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(convolved(), tmp_path / "a")
    torch.testing.assert_close(theirs(x), expected["a"], **CLOSE)
    shaken([parameter for name, parameter in theirs.named_parameters() if "lora_" in name])
    theirs.save_pretrained(tmp_path / "theirs")
    bank.load("b", tmp_path / "theirs")
    bank.use("b")
    expected["b"] = model(x)
    torch.testing.assert_close(expected["b"], theirs(x), **CLOSE)
    names = ["b", None, "a"]
    with bank.rows(names):
        torch.testing.assert_close(model(x), torch.stack([expected[n][row] for row, n in enumerate(names)]), **CLOSE)
    retained = bank.merge("b")
    bank.detach()
    torch.testing.assert_close(model(x), expected["b"], **CLOSE)
    norms = {layer.path: layer.norm for layer in inspect(tmp_path / "theirs").layers}
    weights = dict(convolved().named_parameters())
    for each in retained:
        assert norms[each.path] == pytest.approx(each.relative * weights[f"{each.path}.weight"].norm().item(), rel=1e-4)


def test_convolutions_that_are_not_handled_are_refused_by_name() -> None:
    with pytest.raises(TargetError, match="grouped: a convolution with groups, dilation"):
        lk.attach(convolved(), lk.LoraConfig(target_modules=["grouped"]))
    with pytest.raises(TargetError, match="wide: a convolution with groups, dilation"):
        lk.attach(convolved(), lk.LoraConfig(target_modules=["wide"]))
    with pytest.raises(TargetError, match="DoRA needs"):
        lk.attach(convolved(), lk.LoraConfig(target_modules=["image"], use_dora=True))
    assert list(lk.attach(convolved()).model.state_dict()) == list(convolved().state_dict())
    covered = lk.attach(convolved(), lk.LoraConfig()).coverage("default")
    assert [target.path for target in covered.targets] == ["out"]  # `all-linear` is what it says
