"""litgpt's adapters: the update of every layer is the one that litgpt's own forward adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn.functional import conv1d

from lora_kit.adapter.conversion.convert import convert
from lora_kit.errors import AdapterError

HEADS, GROUPS, SIZE, WIDTH, INNER, RANK, ALPHA = 4, 2, 8, 24, 40, 3, 6
MODEL: dict[str, Any] = {
    "name": "Llama-tiny",
    "hf_config": {"org": "meta-llama", "name": "Llama-tiny"},
    "mlp_class_name": "LLaMAMLP",
    "n_head": HEADS,
    "n_query_groups": GROUPS,
    "head_size": SIZE,
}
ROWS = {"lora_query": HEADS * SIZE, "lora_key": GROUPS * SIZE, "lora_value": GROUPS * SIZE}
NAMES = {"lora_query": "q_proj", "lora_key": "k_proj", "lora_value": "v_proj"}


def write_litgpt(folder: Path, trained: tuple[str, ...], **model: Any) -> dict[str, Tensor]:
    """Write what litgpt's trainer leaves of a model with one layer, and return the tensors."""
    torch.manual_seed(0)
    rows = sum(ROWS[name] for name in trained)
    shapes = {
        "transformer.h.0.attn.qkv": (rows, WIDTH, RANK * len(trained)),
        "transformer.h.0.attn.proj": (WIDTH, HEADS * SIZE, RANK),
        "transformer.h.0.mlp.fc_1": (INNER, WIDTH, RANK),
        "transformer.h.0.mlp.fc_2": (INNER, WIDTH, RANK),
        "transformer.h.0.mlp.proj": (WIDTH, INNER, RANK),
        "lm_head": (50, WIDTH, RANK),
    }
    tensors = {}
    for path, (out, width, rank) in shapes.items():
        tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"] = torch.randn(rank, width), torch.randn(out, RANK)
    settings = {"lora_r": RANK, "lora_alpha": ALPHA, **{name: name in trained for name in ROWS}}
    folder.mkdir(exist_ok=True)
    torch.save({"model": tensors}, folder / "lit_model.pth.lora")
    (folder / "hyperparameters.yaml").write_text(yaml.dump(settings))
    (folder / "model_config.yaml").write_text(yaml.dump({**MODEL, **model}))
    return tensors


def compute_qkv_update(tensors: dict[str, Tensor], trained: tuple[str, ...]) -> Tensor:
    """Return the update of the fused layer as litgpt computes it: one convolution for each part, then zeros between."""
    a, b = (tensors[f"transformer.h.0.attn.qkv.lora_{side}"] for side in "AB")
    parts = zip(a.chunk(len(trained)), b.split([ROWS[name] for name in trained]), strict=True)
    products = dict(zip(trained, (conv1d(one_a[None], one_b[..., None])[0] for one_a, one_b in parts), strict=True))
    return torch.cat([products.get(name, torch.zeros(rows, WIDTH)) for name, rows in ROWS.items()])


@pytest.mark.parametrize(
    "trained", [("lora_query", "lora_value"), ("lora_key",), ("lora_query", "lora_key", "lora_value")]
)
def test_every_update_is_that_of_litgpt(tmp_path: Path, trained: tuple[str, ...]) -> None:
    tensors = write_litgpt(tmp_path / "lit", trained)
    adapter = convert(tmp_path / "lit")
    updates = {path: adapter.config.scaling_of(path) * one.b @ one.a for path, one in adapter.pairs().items()}
    layer = "model.layers.0"
    qkv = compute_qkv_update(tensors, trained).split(list(ROWS.values()))
    for (name, leaf), expected in zip(NAMES.items(), qkv, strict=True):
        path = f"{layer}.self_attn.{leaf}"
        assert (path in updates) == (name in trained)
        if path in updates:
            torch.testing.assert_close(updates[path], ALPHA / RANK * expected)
    others = {"attn.proj": "self_attn.o_proj", "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj"}
    others |= {"mlp.proj": "mlp.down_proj"}
    for theirs, ours in others.items():
        a, b = (tensors[f"transformer.h.0.{theirs}.lora_{side}"] for side in "AB")
        torch.testing.assert_close(updates[f"{layer}.{ours}"], ALPHA / RANK * b @ a)
    assert "lm_head" in updates
    assert adapter.config.base_model_name_or_path == "meta-llama/Llama-tiny"
    assert adapter.config.task_type == "CAUSAL_LM"


def test_renames_and_another_alpha_are_taken(tmp_path: Path) -> None:
    write_litgpt(tmp_path / "lit", ("lora_query",))
    adapter = convert(tmp_path / "lit", lora_alpha=12, renames={"model.layers": "model.language_model.layers"})
    assert "model.language_model.layers.0.self_attn.q_proj" in adapter.pairs()
    assert adapter.config.scaling_of("lm_head") == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_class_name": "GptNeoxMLP"}, "layers have other names"),
        ({"name": "Phi-3-mini-4k-instruct"}, "layers have other names"),
        ({"n_head": 8}, "do not hold q_proj"),
        ({"head_size": None}, "head_size is None"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_litgpt(tmp_path / "lit", ("lora_query", "lora_value"), **change)
    with pytest.raises(AdapterError, match=message):
        convert(tmp_path / "lit")


@pytest.mark.parametrize("name", ["hyperparameters.yaml", "model_config.yaml"])
def test_a_missing_or_damaged_settings_file_is_named(tmp_path: Path, name: str) -> None:
    write_litgpt(tmp_path / "lit", ("lora_query",))
    for text, message in (("[1, 2", "is not YAML"), ("- 1", "does not hold settings")):
        (tmp_path / "lit" / name).write_text(text)
        with pytest.raises(AdapterError, match=rf"{name}.*{message}"):
            convert(tmp_path / "lit")
    (tmp_path / "lit" / name).unlink()
    with pytest.raises(AdapterError, match=f"{name} is missing"):
        convert(tmp_path / "lit")


def test_the_order_of_rows_before_0_5_5_is_refused(tmp_path: Path) -> None:
    tensors = {f"transformer.h.0.attn.attn.lora_{side}": torch.ones(2, 2) for side in "AB"}
    torch.save({"model": tensors}, tmp_path / "lit_model.pth.lora")
    with pytest.raises(AdapterError, match=r"before 0\.5\.5"):
        convert(tmp_path)
