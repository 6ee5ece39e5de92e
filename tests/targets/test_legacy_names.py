"""Adapters under the module names of transformers 4, which PEFT reads too: what is computed is what PEFT computes."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import lora_kit as lk
from lora_kit.adapter.folder import WEIGHTS
from lora_kit.adapter.peft_keys import PREFIX
from lora_kit.cli.main import main
from lora_kit.errors import AdapterError
from lora_kit.generation.generate import attach_adapters
from tests.support import tiny
from tests.support.legacy_adapters import (
    MIXTRAL,
    QWEN,
    ROUTER,
    TEXT,
    attention,
    gemma3,
    llava,
    mixtral,
    paligemma,
    qwen2_moe,
    qwen3_moe,
    write,
)

IDS = torch.tensor([[5, 9, 17, 33, 2, 70]])


ALL = ("q_proj", "k_proj", "v_proj", "o_proj")
CASES: dict[str, tuple[Callable[[], Any], dict[str, tuple[int, int]], dict[str, Any]]] = {
    "llava": (llava, attention(TEXT, *ALL), {"target_modules": [*ALL]}),
    "gemma3": (gemma3, attention(TEXT, *ALL), {"target_modules": [*ALL]}),
    "paligemma": (paligemma, attention(TEXT, "q_proj", "v_proj"), {"target_modules": ["q_proj", "v_proj"]}),
    "mixtral": (mixtral, MIXTRAL, {"target_modules": ["w1", "w2", "w3"]}),
    "mixtral, attention and router": (
        mixtral,
        MIXTRAL | attention("model.layers", *ALL) | ROUTER,
        {"target_modules": ["w1", "w2", "w3", "gate", *ALL], "use_rslora": False},
    ),
    "mixtral, dropout": (mixtral, MIXTRAL, {"target_modules": ["w1", "w2", "w3"], "lora_dropout": 0.1}),
    "mixtral, down alone": (
        mixtral,
        {path: shape for path, shape in MIXTRAL.items() if path.endswith("w2")},
        {"target_modules": ["w2"]},
    ),
    "qwen2_moe": (
        qwen2_moe,
        QWEN
        | {
            f"model.layers.{layer}.mlp.shared_expert.{name}": shape
            for layer in range(2)
            for name, shape in {"gate_proj": (32, 40), "up_proj": (32, 40), "down_proj": (40, 32)}.items()
        },
        {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    ),
    "qwen2_moe, experts": (qwen2_moe, QWEN, {"target_modules": ["gate_proj", "up_proj", "down_proj"]}),
    "qwen3_moe": (
        qwen3_moe,
        QWEN | attention("model.layers", "q_proj"),
        {"target_modules": ["gate_proj", "up_proj", "down_proj", "q_proj"]},
    ),
}
PEFT_CANNOT = {
    "mixtral, dropout",  # it wants no dropout beside parameters
    "qwen2_moe",  # it converts the models that are like it, and not this one: the experts' updates are lost
    "qwen2_moe, experts",
}


def made(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make().eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def with_updates(model: Any, folder: Path, out: Path) -> Any:
    """The model with the updates added to the files that it saves, which have the names of transformers 4."""
    model.save_pretrained(out)
    weights = safetensors.torch.load_file(out / "model.safetensors")
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    for key, a in tensors.items():
        if ".lora_A." in key:
            path = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            weights[f"{path}.weight"] += 2 * tensors[key.replace("lora_A", "lora_B")] @ a
    safetensors.torch.save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return type(model).from_pretrained(out).eval()


@pytest.mark.parametrize("case", CASES)
def test_the_logits_are_those_of_the_updated_weights(tmp_path: Path, case: str) -> None:
    make, shapes, fields = CASES[case]
    folder = write(tmp_path / "adapter", shapes, **fields)
    model = made(make)
    wanted = logits(with_updates(model, folder, tmp_path / "updated"))
    bank = lk.attach(model)
    bank.load("old", folder)
    bank.use("old")
    assert (logits(model) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("case", sorted(CASES.keys() - PEFT_CANNOT))
def test_the_logits_are_those_of_peft(tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    make, shapes, fields = CASES[case]
    folder = write(tmp_path / "adapter", shapes, **fields)
    by_peft = logits(peft.PeftModel.from_pretrained(made(make), str(folder)).eval())
    model = made(make)
    base, bank = logits(model), lk.attach(model)
    assert bank.load("old", folder) == lk.Adapter.load(folder)
    assert "names of an older transformers" in caplog.text
    bank.use("old")
    ours = logits(model)
    assert (ours - base).abs().max() > 1e-2
    assert (ours - by_peft).abs().max() < 1e-5


def test_an_adapter_that_is_loaded_when_it_is_needed_is_converted_too(tmp_path: Path) -> None:
    make, shapes, fields = CASES["mixtral"]
    folder = write(tmp_path / "adapter", shapes, **fields)
    model = made(make)
    bank = lk.attach(model, slots=1)
    bank.load("now", folder)
    bank.use("now")
    wanted = logits(model)
    bank.use(None)
    bank.unload("now")
    for name in ("one", "two"):
        bank.offer(name, folder)
    for name in ("one", "two", "one"):
        with bank.using(name):
            assert torch.equal(logits(model), wanted)


def test_experts_of_another_model_are_an_error_of_the_adapter(tmp_path: Path) -> None:
    for name, shapes in (
        ("wide", {"model.layers.0.block_sparse_moe.experts.0.w1": (64, 48)}),
        ("tall", {"model.layers.0.block_sparse_moe.experts.0.w2": (48, 64)}),
        ("many", {"model.layers.0.block_sparse_moe.experts.7.w1": (32, 48)}),
    ):
        folder = write(tmp_path / name, shapes, target_modules=["w1", "w2"])
        with pytest.raises(AdapterError, match=r"but model\.layers\.0\.mlp\.experts\.\w+ has 3 experts"):
            lk.attach(made(mixtral)).load("x", folder)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"use_dora": True},
            r"x: use_dora rescales the rows of each layer, but model\.layers\.0\.block_sparse_moe\.\S+ is a",
        ),
        (
            {"target_parameters": ["self_attn.q_proj.weight"]},
            r"x: target_parameters self_attn\.q_proj\.weight beside layers",
        ),
    ],
)
def test_what_cannot_be_fused_exactly_is_rejected_by_the_name_of_its_field(
    tmp_path: Path, fields: dict[str, Any], reason: str
) -> None:
    shapes = {"model.layers.0.block_sparse_moe.experts.0.w1": (32, 48)}
    if "target_parameters" in fields:
        shapes["model.layers.0.self_attn.q_proj"] = (32, 32)
    folder = write(tmp_path / "adapter", shapes, target_modules=["w1"], **fields)
    if "use_dora" in fields:
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
        tensors[f"{PREFIX}model.layers.0.block_sparse_moe.experts.0.w1.lora_magnitude_vector"] = torch.ones(48)
        safetensors.torch.save_file(tensors, folder / WEIGHTS)
    model = made(mixtral)
    bank, before = lk.attach(model), logits(model)
    with pytest.raises(AdapterError, match=reason):
        bank.load("x", folder)
    assert torch.equal(logits(model), before)


def test_a_bank_for_certain_adapters_has_room_for_their_fused_experts(tmp_path: Path) -> None:
    make, shapes, fields = CASES["mixtral"]
    adapter = lk.Adapter.load(write(tmp_path / "adapter", shapes, **fields))
    with attach_adapters(made(make), {"old": adapter}) as bank:
        assert bank is not None
        assert {target.rank for target in bank.coverage("old").targets} == {8}


@pytest.mark.parametrize("case", ["llava", "mixtral, attention and router"])
def test_a_merge_takes_them_too(tmp_path: Path, case: str) -> None:
    make, shapes, fields = CASES[case]
    folder = write(tmp_path / "adapter", shapes, **fields)
    model = made(make)
    model.save_pretrained(tmp_path / "base")
    bank = lk.attach(model)
    bank.load("old", folder)
    bank.use("old")
    report = lk.merge(tmp_path / "base", folder, tmp_path / "merged")
    assert report.adapters == {lk.Adapter.load(folder).digest: 1.0}
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    assert (logits(merged) - logits(model)).abs().max() < 1e-5


def test_ranks_and_alphas_stay_with_their_modules(tmp_path: Path) -> None:
    _, shapes, _ = CASES["llava"]
    first = next(iter(shapes))
    folder = write(tmp_path / "adapter", shapes, target_modules=list(shapes), alpha_pattern={first: 32})
    model = made(llava)
    bank = lk.attach(model)
    bank.load("old", folder)
    scalings = {target.path: target.scaling for target in bank.coverage("old").targets}
    assert {path: scaling for path, scaling in scalings.items() if scaling != 2} == {
        "model.language_model.layers.0.self_attn.q_proj": 8
    }
    assert len(scalings) == len(shapes)


def test_where_the_mapping_does_not_help_the_error_has_the_command_that_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = attention("transformer.layers", "q_proj", "v_proj")
    folder = write(tmp_path / "an adapter", shapes, target_modules=["q_proj", "v_proj"])
    with pytest.raises(AdapterError, match="the model has no module transformer") as caught:
        lk.attach(tiny.llama()).load("x", folder)
    command = shlex.split(caught.value.hint)
    assert command[:2] == ["lora-kit", "convert"]
    assert "transformer=model" in command
    out = tmp_path / "converted"
    assert main([str(out) if word == "CONVERTED" else word for word in command[1:]]) == 0, capsys.readouterr().err
    config = lk.Adapter.load(out).config
    assert all(config.names_layer(path.replace("transformer", "model")) for path in shapes)
    lk.attach(tiny.llama()).load("x", out)


def test_a_prefix_that_is_missing_is_added_by_the_command(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", attention("layers", "q_proj"), target_modules=["q_proj"])
    with pytest.raises(AdapterError) as caught:
        lk.attach(tiny.llama()).load("x", folder)
    assert "--rename layers=model.layers" in caught.value.hint
