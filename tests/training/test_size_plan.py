"""What a training needs is counted from a config alone, and is what a training then takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lora_kit as lk
from lora_kit.cli.main import main
from lora_kit.errors import BaseModelError, ConfigError, TargetError
from lora_kit.models.loading import Base, load_base
from lora_kit.training.plan import step_size
from lora_kit.training.plan.devices import parse_devices
from lora_kit.training.plan.live_bytes import LiveBytes
from lora_kit.training.plan.size_plan import plan_size
from lora_kit.training.plan.step_size import StepShape, measure_step_size
from tests.support.memory import count_training

ROWS, LENGTH = 4, 256


def narrow_config() -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=LENGTH,
    )  # fmt: skip


def shape(**changes: Any) -> StepShape:
    lora = lk.LoraConfig(r=8, target_modules="all-linear")
    given = {"method": "lora", "task": "causal-lm", "lora": lora, "dtype": torch.float32, "device": "cpu"}
    return StepShape(**{**given, "rows": ROWS, "length": LENGTH, **changes})


def train_full_rows(folder: Path, *, checkpointing: bool) -> int:
    """Return the most bytes that are alive while two steps of full rows are trained."""
    folder.mkdir()
    model = transformers.LlamaForCausalLM(narrow_config())
    model.config._name_or_path = "narrow"
    base = Base(model=model.eval(), tokenizer=load_base("kit-base").tokenizer, name="narrow")
    rows = [{"text": "the boy ran over the hill to the church and " * 100}] * 2
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train = {"max_steps": 2, "per_device_train_batch_size": ROWS, "learning_rate": 1e-3, "report_to": "none"}
    recipe = {
        "base": "narrow",
        "data": {"train": str(folder / "rows.jsonl"), "max_length": LENGTH},
        "lora": {"r": 8, "target_modules": "all-linear"},
        "out": str(folder / "out"),
        "train": {**train, "gradient_checkpointing": checkpointing},
    }
    return count_training(recipe, base)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_takes_what_was_counted_without_it(tmp_path: Path, checkpointing: bool) -> None:
    counted = measure_step_size(narrow_config(), shape(checkpointing=checkpointing)).total
    assert counted == pytest.approx(train_full_rows(tmp_path / "run", checkpointing=checkpointing), rel=0.03)


def test_bytes_are_counted_while_they_live() -> None:
    live = LiveBytes()
    with live:
        kept = torch.ones(1000)
        view, dropped = kept.view(10, 100), kept * 2
        assert live.now == 8000
        del dropped
        assert live.now == 4000
        kept.sum()
    assert (live.now, live.peak) == (4000, 8000)
    assert view.shape == (10, 100)


def test_products_are_counted_in_forward_and_backward() -> None:
    size = measure_step_size(narrow_config(), shape())
    linear = 3 * (4 * 64 * 64 + 3 * 64 * 176)
    # A frozen weight is multiplied with in the forward and in the backward; the head twice more, for its own gradient.
    least = 2 * 2 * ROWS * LENGTH * (linear + 4096 * 64)
    assert least < size.flops < 1.5 * least


def test_a_base_in_four_bits_takes_what_bitsandbytes_makes_of_it() -> None:
    base = load_base("kit-base", quantize="nf4", dtype="bf16")
    tensors = [*base.model.parameters(), *base.model.buffers()]
    states = [t.quant_state for t in base.model.parameters() if getattr(t, "quant_state", None) is not None]
    stored = sum(t.numel() * t.element_size() for t in tensors) + sum(4 * state.absmax.numel() for state in states)
    planned = measure_step_size(base.model.config, shape(method="qlora", dtype=torch.bfloat16, rows=1, length=8))
    assert states
    assert planned.weights == pytest.approx(stored, rel=0.01)


def test_only_the_config_of_a_base_is_read(tmp_path: Path) -> None:
    narrow_config().save_pretrained(tmp_path)
    plan = plan_size(tmp_path / "config.json", length=32, gpus="8xH200", shard=True, gradient_checkpointing=False)
    assert list(plan.sizes) == ["plain"]
    size, model = plan.sizes["plain"], transformers.LlamaForCausalLM(narrow_config())
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert size.weights < 2 * size.parameters  # in bf16, and shared
    rows = plan.count_rows(size)
    assert rows is not None
    assert (
        size.weights + size.trained + rows * size.activations
        <= 141e9
        < size.weights + size.trained + (rows + 1) * size.activations
    )


def test_what_is_shared_is_the_base_alone() -> None:
    whole = measure_step_size(narrow_config(), shape(length=8))
    part = whole.shard(4)
    assert part.weights == whole.weights - whole.layers + whole.layers // 4 + 2 * whole.largest_layer
    assert (part.trained, part.activations) == (whole.trained, whole.activations)


@pytest.mark.parametrize(
    ("method", "task"), [("full", "causal-lm"), ("lora", "classify"), ("lora", "tokens"), ("qlora", "causal-lm")]
)
def test_every_method_and_task_is_planned(method: str, task: str) -> None:
    config = narrow_config()
    config.pad_token_id, config.num_hidden_layers = 0, 1
    size = measure_step_size(config, shape(length=16, rows=2, method=method, task=task))
    assert (size.trainable == size.parameters) == (method == "full")
    assert (size.weights == 0) == (method == "full")
    assert size.activations > 0


@pytest.mark.slow
def test_an_encoder_with_a_decoder_is_planned(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=64, d_model=16, d_ff=32, d_kv=8, num_heads=2, num_layers=2)
    config.architectures = ["T5ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    plan = plan_size(tmp_path / "config.json", length=8)
    assert plan.shape.task == "seq2seq"
    assert plan.sizes["gradient_checkpointing"].flops > plan.sizes["plain"].flops


@pytest.mark.parametrize(
    ("text", "count", "name"),
    [("H200", 1, "H200"), ("8xh100", 8, "H100"), ("RTX-4090", 1, "4090"), ("A100-80GB", 1, "A100-80"),
     ("2x24GB", 2, "24GB")],
)  # fmt: skip
def test_devices_have_names_or_sizes(text: str, count: int, name: str) -> None:
    devices, device = parse_devices(text)
    assert (devices, device.name) == (count, name)


@pytest.mark.parametrize("text", ["H300", "0xH200", "x", "", "8x", "0GB"])
def test_unknown_devices_are_an_error_that_names_those_that_are_known(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_devices(text)
    assert caught.value.hint


def test_what_cannot_be_planned_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="qlor"):
        plan_size("kit-base", method="qlor")
    with pytest.raises(ConfigError, match="length 0"):
        plan_size("kit-base", length=0)
    with pytest.raises(TargetError, match="nowhere"):
        plan_size("kit-base", length=8, targets=["nowhere"])
    with pytest.raises(BaseModelError, match=r"config\.json of a base, given as a file"):
        plan_size(tmp_path / "nothing")
    with pytest.raises(BaseModelError, match=r"not in the local cache.*config\.json of a base, given as a file"):
        plan_size("nobody/nothing")


def test_a_base_that_would_be_counted_wrongly_is_refused(tmp_path: Path) -> None:
    config = narrow_config()
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path / "gptq")
    transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path / "vit")
    with pytest.raises(BaseModelError, match="quantized by gptq"):
        plan_size(tmp_path / "gptq" / "config.json", length=8)
    with pytest.raises(BaseModelError, match="is a vit"):
        plan_size(tmp_path / "vit" / "config.json", length=8)


def test_what_would_take_hours_to_count_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_kit.training.plan.step_size._MOST_OPERATIONS", 50)
    with pytest.raises(BaseModelError, match=r"rows of 8 tokens has more than 25 operations.*a smaller --length"):
        measure_step_size(narrow_config(), shape(length=8))


def test_a_model_of_as_many_layers_as_the_largest_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    config = narrow_config()
    share = config.num_hidden_layers / 126
    monkeypatch.setattr(step_size, "_MOST_OPERATIONS", int(share * step_size._MOST_OPERATIONS))
    assert measure_step_size(config, shape(length=8, checkpointing=True)).parameters


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> None:
    size = measure_step_size(narrow_config(), shape(length=8))
    monkeypatch.setattr("lora_kit.training.plan.size_plan.measure_step_size", lambda config, shape: size)


@pytest.mark.usefixtures("planned")
def test_the_verb_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["plan", "--base", "kit-base", "--gpus", "8xH200"]
    assert main(given) == 0
    assert "rows that fit on H200" in capsys.readouterr().out
    assert main([*given, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["devices"] == 8
    assert "gradient_checkpointing" in values
    assert main([*given, "--gradient-checkpointing", "--json"]) == 0
    assert "plain" not in json.loads(capsys.readouterr().out)
    assert values["plain"]["total"] == sum(values["plain"][name] for name in ("weights", "trained", "activations"))
