"""Loading a base: kit-base, folders, what is refused, and how a prompt becomes tokens."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kit.errors import BaseModelError, ConfigError
from lora_kit.models.heads import find_head_modules
from lora_kit.models.loading import load_base
from lora_kit.models.prompt_tokens import find_special_tokens, render_prompt, tokenize_prompt
from tests.support import texts, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer, as save_pretrained writes it."""
    where = tmp_path_factory.mktemp("bases") / "tiny-llama"
    tiny.llama(dtype=torch.bfloat16).save_pretrained(where)
    texts.tokenizer(pad="").save_pretrained(where)
    return where


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_kit_base_loads_offline_in_under_a_second() -> None:
    load_base("kit-base")
    started = time.process_time()
    base = load_base("kit-base")
    assert time.process_time() - started < 1
    assert base.name == "kit-base"
    assert base.model.dtype == torch.bfloat16
    assert base.max_length == 512
    assert not base.model.training


def test_two_loads_of_a_base_have_one_fingerprint() -> None:
    one, two = load_base("kit-base"), load_base("kit-base", dtype="fp32")
    assert one.fingerprint() == two.fingerprint()
    assert two.model.dtype == torch.float32


def test_loading_prints_nothing(capfd: pytest.CaptureFixture[str], folder: Path) -> None:
    load_base(folder)
    load_base(folder, task="classify", num_labels=3)
    assert capfd.readouterr() == ("", "")


def test_loading_leaves_random_numbers_alone(folder: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    load_base(folder, task="classify", num_labels=3)
    assert torch.equal(torch.rand(1), expected)


def test_a_missing_pad_token_becomes_the_eos(folder: Path) -> None:
    base = load_base(folder)
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id == texts.EOS


def test_a_new_head_is_the_same_every_time(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    torch.manual_seed(1)
    one = load_base(folder, task="classify", label2id={"no": 0, "yes": 1})
    torch.manual_seed(2)
    two = load_base(folder, task="classify", num_labels=2)
    assert torch.equal(one.model.score.weight, two.model.score.weight)
    assert one.model.config.id2label == {0: "no", 1: "yes"}
    assert "new head" in caplog.text
    assert find_head_modules(one.model, "classify") == ("score",)


def test_the_head_of_a_language_model_is_its_output_layer() -> None:
    assert find_head_modules(tiny.llama(), "causal-lm") == ("lm_head",)
    assert find_head_modules(tiny.gpt2(), "causal-lm") == ("lm_head",)
    assert find_head_modules(tiny.bert(), "classify") == ("classifier",)


def test_a_missing_folder_names_the_nearest(folder: Path) -> None:
    with pytest.raises(BaseModelError, match=r"no such folder.*tiny-llama'"):
        load_base(folder.parent / "tiny-lama")
    with pytest.raises(BaseModelError, match="tiny-llama"):
        load_base(str(folder.parent / "tiny-lama"))


def test_a_name_that_is_nothing_says_what_there_is() -> None:
    with pytest.raises(BaseModelError, match="kit-base"):
        load_base("kit_base")
    with pytest.raises(BaseModelError, match="HF_HUB_OFFLINE"):
        load_base("nobody/nothing")
    with pytest.raises(BaseModelError, match="no such folder"):
        load_base("../a/b/c")


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"no config\.json"):
        load_base(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BaseModelError, match="not JSON"):
        load_base(tmp_path)


def test_an_adapter_is_not_a_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BaseModelError, match="holds an adapter"):
        load_base(tmp_path)


def test_a_file_is_not_a_base(folder: Path) -> None:
    with pytest.raises(BaseModelError, match="is a file"):
        load_base(folder / "config.json")


@pytest.mark.parametrize("damage", ["gone", "cut", "lfs"])
def test_weights_that_are_missing_or_torn_are_refused(folder: Path, tmp_path: Path, damage: str) -> None:
    copy = copied(folder, tmp_path / "copy")
    weights = copy / "model.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    if damage == "cut":
        weights.write_bytes(data[:-100])
    elif damage == "lfs":
        weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(BaseModelError, match="could not be read"):
        load_base(copy)


def test_weights_that_do_not_fill_the_model_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = copied(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(BaseModelError, match=r"do not fill the model: .*layers\.2.* missing"):
        load_base(copy)


def test_a_base_without_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = copied(folder, tmp_path / "copy")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(BaseModelError, match="tokenizer"):
        load_base(copy)


def test_code_of_a_model_is_never_run(folder: Path, tmp_path: Path) -> None:
    copy = copied(folder, tmp_path / "copy")
    mark = tmp_path / "ran"
    (copy / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="code of its own"):
        load_base(copy)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "clasify"}, "did you mean 'classify'"),
        ({"task": "seq2seq"}, "needs an encoder and a decoder"),
        ({"quantize": "nf5"}, "did you mean 'nf4'"),
        ({"dtype": "bf17"}, "bf16"),
        ({"device": "gpu"}, "cpu, cuda"),
        ({"task": "classify", "num_labels": 3, "label2id": {"a": 0}}, "names 1 labels"),
    ],
)
def test_a_setting_that_is_not_known_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((BaseModelError, ConfigError), match=message):
        load_base("kit-base", **settings)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantized_base_passes_gradients_on_after_inference_too(quantize: str) -> None:
    base = load_base("kit-base", quantize=quantize)
    full = load_base("kit-base").model.model.layers[0].mlp.gate_proj
    layer = base.model.model.layers[0].mlp.gate_proj
    assert base.model.is_quantized
    x = torch.randn(1, 5, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        base.model(torch.ones(1, 5, dtype=torch.long))
        close = torch.nn.functional.cosine_similarity(layer(x).flatten(), full(x).flatten(), dim=0)
    x.requires_grad_()
    layer(x).sum().backward()
    expected = full.weight.sum(0).expand(1, 5, 256)
    assert x.grad is not None
    assert close > 0.98
    assert torch.nn.functional.cosine_similarity(x.grad.flatten(), expected.flatten(), dim=0) > 0.98


def test_special_tokens_are_found() -> None:
    assert find_special_tokens(texts.tokenizer()) == ([], [])
    assert find_special_tokens(texts.tokenizer(bos="<s>")) == ([texts.BOS], [])
    assert find_special_tokens(texts.bert_tokenizer()) == ([texts.BOS], [texts.EOS])


def test_a_prompt_has_one_bos_and_no_eos() -> None:
    tokenizer = texts.tokenizer(bos="<s>")
    assert tokenize_prompt(tokenizer, "<s>ab") == tokenize_prompt(tokenizer, "ab") == [texts.BOS, 4, 5]
    assert tokenize_prompt(texts.bert_tokenizer(), "ab") == [texts.BOS, 4, 5]
    assert tokenize_prompt(texts.tokenizer(), "ab") == [4, 5]


def test_a_prompt_is_followed_by_the_separator() -> None:
    assert render_prompt("ask") == "ask\n"
    assert render_prompt("ask", separator=" -> ") == "ask -> "
