"""Exports, each read back as its reader does: the same logits, the same updates, and nothing left out in silence."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy
import peft
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from torch import Tensor

import lora_kit as lk
from lora_kit.adapter.conversion.convert import convert
from lora_kit.adapter.peft_keys import lora_weight_keys
from lora_kit.cli.main import main
from lora_kit.errors import AdapterError, BaseMismatchError, ConfigError, ExportError, StorageError
from lora_kit.exporters.export import TARGETS, check
from lora_kit.exporters.llama_cpp import ARCHITECTURES
from lora_kit.models.loading import load_base
from tests.support import tiny
from tests.support.folders import contents

AWKWARD: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 6.5,
    "use_rslora": True,
    "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 6},
    "alpha_pattern": {"up_proj": 32},
    "target_modules": "all-linear",
}
PLAIN: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "gate_proj"],
}
Deltas = dict[str, Tensor]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "llama"
    tiny.llama().save_pretrained(folder)
    return folder


def trained(model: torch.nn.Module, folder: Path, *, record: dict[str, Any] | None = None, **fields: Any) -> Path:
    """An adapter that does something, saved."""
    bank = lk.attach(model, lk.LoraConfig(**fields), name="a")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in bank.parameters("a"):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    bank.save("a", folder, record=record)
    bank.detach()
    return folder


@pytest.fixture
def awkward(tmp_path: Path) -> Path:
    return trained(tiny.llama(), tmp_path / "sql", **AWKWARD)


def deltas(folder: Path) -> Deltas:
    """What the adapter does, by path: `scaling · B A`."""
    own = lk.Adapter.load(folder)
    return {
        path: own.config.scaling_of(path) * (pair.b.double() @ pair.a.double()) for path, pair in own.pairs().items()
    }


def assert_same(found: Deltas, wanted: Deltas) -> None:
    assert found.keys() == wanted.keys()
    for path, delta in wanted.items():
        assert float((found[path] - delta).norm() / delta.norm()) <= 1e-6, path


def plainly_scaled(folder: Path) -> Deltas:
    """What a reader sees that knows `lora_alpha / r` alone: no patterns, nothing rank-stabilized."""
    fields = json.loads((folder / "adapter_config.json").read_text())
    stored = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    scale, found = fields["lora_alpha"] / fields["r"], {}
    for key in (key for key in stored if ".lora_A.weight" in key):
        path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = stored[key].double(), stored[key.replace("lora_A", "lora_B")].double()
        assert a.shape[0] == b.shape[1] == fields["r"]
        found[path] = scale * b @ a
    return found


# PEFT, and the servers that read its format


@pytest.mark.parametrize("target", ["peft", "vllm", "sglang", "tgi"])
def test_the_command_in_the_readme_loads_an_export_that_gives_the_same_logits(
    target: str, base: Path, awkward: Path, tmp_path: Path
) -> None:
    bank = lk.attach(model := tiny.llama(), slots=1, max_rank=8)
    bank.load("a", awkward)
    bank.use("a")
    wanted = tiny.logits(model, tiny.batch())
    lk.export(awkward, target, tmp_path / "out", base=base)
    # The others are not installed here; what they read, PEFT reads as well.
    lk.export(tmp_path / "out", "peft", tmp_path / "again", base=base)
    code = re.search(r"```python\n(.+?)```", (tmp_path / "again" / "README.md").read_text(), re.DOTALL)
    assert code
    names: dict[str, Any] = {}
    exec(code[1], names)
    found = tiny.logits(names["model"].eval(), tiny.batch())
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(found, tiny.logits(tiny.llama(), tiny.batch()), atol=1e-3)


@pytest.mark.parametrize("target", ["vllm", "sglang", "tgi"])
def test_servers_get_one_rank_and_one_scaling_that_say_the_same(
    target: str, base: Path, awkward: Path, tmp_path: Path
) -> None:
    made = lk.export(awkward, target, tmp_path / "out", base=base)
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (fields["use_rslora"], fields["rank_pattern"], fields["alpha_pattern"]) == (False, {}, {})
    assert isinstance(fields["lora_alpha"], int)
    assert fields["base_model_name_or_path"] == str(base)
    assert_same(plainly_scaled(tmp_path / "out"), deltas(awkward))
    told = " ".join(made.changed)
    assert all(field in told for field in ("use_rslora", "alpha_pattern", "lora_alpha 6.5", "rank_pattern"))


def vllm_refuses(folder: Path, *, max_lora_rank: int, modules: set[str]) -> list[str]:
    """The checks that vLLM makes of an adapter (vllm/lora/peft_helper.py, lora_model.py), said again."""
    fields = json.loads((folder / "adapter_config.json").read_text())
    found = [f"{name} is missing" for name in ("r", "lora_alpha", "target_modules") if name not in fields]
    found += ["modules_to_save"] if fields.get("modules_to_save") else []
    found += ["use_dora"] if fields.get("use_dora") else []
    found += ["r"] if fields["r"] > max_lora_rank else []
    found += ["bias"] if fields.get("bias", "none") != "none" else []
    for key in safetensors.torch.load_file(folder / "adapter_model.safetensors"):
        named = re.fullmatch(r"base_model\.model\.(?:.+\.)?(\w+)\.(?:lora_[AB]\.weight|lora_embedding_[AB])", key)
        found += [] if named and named[1] in modules else [key]
    return found


def test_vllms_own_checks_pass_and_catch_what_was_not_exported(base: Path, awkward: Path, tmp_path: Path) -> None:
    lk.export(awkward, "vllm", tmp_path / "out", base=base, max_lora_rank=8)
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert vllm_refuses(tmp_path / "out", max_lora_rank=8, modules=linear) == []
    assert vllm_refuses(tmp_path / "out", max_lora_rank=4, modules=linear) == ["r"]
    other = trained(
        tiny.llama(), tmp_path / "other", r=4, use_dora=True, target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    refused = vllm_refuses(other, max_lora_rank=8, modules=linear)
    assert {"use_dora", "modules_to_save"} < set(refused)
    told = check(other, "vllm").refused
    assert [why.partition(":")[0] for why in told] == ["use_dora", "modules_to_save"]


@pytest.mark.parametrize(("rank", "limit"), [(17, 32), (200, 256), (300, 320), (400, 512)])
def test_the_smallest_limit_that_vllm_can_be_started_with_is_named(rank: int, limit: int, tmp_path: Path) -> None:
    key_a, key_b = lora_weight_keys("model.layers.0.mlp.up_proj", "linear")
    tensors = {key_a: torch.ones(rank, 32), key_b: torch.ones(48, rank)}
    adapter = lk.Adapter(lk.LoraConfig(r=rank, target_modules=("up_proj",)), tensors)
    found = check(adapter, "vllm", max_lora_rank=rank)
    assert (found.refused, found.needed[0].partition(" (")[0]) == ((), f"--max-lora-rank {limit}")
    assert check(adapter, "vllm", max_lora_rank=rank - 1).refused != ()
    small = lk.Adapter(
        lk.LoraConfig(r=16, target_modules=("up_proj",)), {key_a: torch.ones(16, 32), key_b: torch.ones(48, 16)}
    )
    assert not any("--max-lora-rank" in need for need in check(small, "vllm").needed)


def test_vllm_gets_a_slot_more_than_there_are_adapters(base: Path, tmp_path: Path) -> None:
    folder = trained(tiny.llama(), tmp_path / "sql", **PLAIN)
    lk.export(folder, "vllm", tmp_path / "out", base=base)
    page = (tmp_path / "out" / "README.md").read_text()
    command = re.search(r"```sh\n(vllm serve .+)\n```", page)
    assert command
    words = shlex.split(command[1])
    count = len([word for word in words if word.endswith(f"={tmp_path / 'out'}")])
    assert int(words[words.index("--max-loras") + 1]) == count + 1
    assert "vllm/issues/48421" in page
    assert any(need.startswith("--max-loras") for need in check(folder, "vllm").needed)


def test_an_adapter_that_is_plain_already_keeps_its_bits_and_its_identity(base: Path, tmp_path: Path) -> None:
    folder = trained(tiny.llama(), tmp_path / "sql", **PLAIN)
    made = lk.export(folder, "vllm", tmp_path / "out", base=base)
    assert made.changed == ()
    assert lk.Adapter.load(tmp_path / "out").digest == lk.Adapter.load(folder).digest


@pytest.mark.parametrize("alpha", [0.5, 1.5, 3, -2])
def test_any_alpha_comes_out_as_a_whole_number_that_scales_the_same(alpha: float, base: Path, tmp_path: Path) -> None:
    folder = trained(tiny.llama(), tmp_path / "sql", **{**PLAIN, "lora_alpha": alpha})
    lk.export(folder, "vllm", tmp_path / "out", base=base)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] >= 1
    assert_same(plainly_scaled(tmp_path / "out"), deltas(folder))


def test_layers_left_out_by_the_config_stay_out(base: Path, tmp_path: Path) -> None:
    folder = trained(tiny.llama(), tmp_path / "sql", r=4, target_modules=["v_proj", "q_proj"], layers_to_transform=[1])
    lk.export(folder, "vllm", tmp_path / "out", base=base)
    assert lk.Adapter.load(tmp_path / "out").pairs().keys() == {
        f"model.layers.1.self_attn.{name}" for name in ("q_proj", "v_proj")
    }
    bank = lk.attach(tiny.llama(), slots=1)
    bank.load("a", tmp_path / "out")


@pytest.mark.parametrize(
    ("target", "modules", "told"),
    [
        ("sglang", ["k_proj", "v_proj"], "k_proj is read only beside a q_proj"),
        ("sglang", ["q_proj"], "stacked with the v_proj"),
        ("sglang", ["up_proj"], "read only beside a gate_proj"),
        ("tgi", ["embed_tokens", "q_proj"], "model.embed_tokens is not read"),
        ("mlx", "model.embed_tokens", None),
    ],
)
def test_layers_that_a_reader_passes_over_are_refused_by_name(
    target: str, modules: list[str] | str, told: str | None, base: Path, tmp_path: Path
) -> None:
    folder = trained(tiny.llama(), tmp_path / "sql", r=4, target_modules=modules)
    found = check(folder, target, base=base).refused
    assert (told or "") in " ".join(found)
    assert bool(found) == (told is not None)


def test_tgi_is_refused_a_kind_that_some_layer_lacks(base: Path, tmp_path: Path) -> None:
    folder = trained(tiny.llama(), tmp_path / "sql", r=4, target_modules=["q_proj"], layers_to_transform=[1])
    assert "q_proj of every layer would be left out, as layer 0 has none" in check(folder, "tgi", base=base).refused[0]
    with pytest.raises(ExportError, match="config is needed"):
        check(folder, "tgi")


# llama.cpp and Ollama


def read_gguf(file: Path) -> tuple[dict[str, Any], dict[str, numpy.ndarray[Any, Any]]]:
    reader = gguf.GGUFReader(file)
    return (
        {name: field.contents() for name, field in reader.fields.items()},
        {tensor.name: numpy.array(tensor.data) for tensor in reader.tensors},
    )


def halves(rows: Tensor, heads: int) -> Tensor:
    """Back from neighbors to halves: llama.cpp's order of the rows of q and k to that of transformers."""
    return rows.reshape(heads, len(rows) // heads // 2, 2, -1).transpose(1, 2).reshape(rows.shape)


def test_gguf_holds_what_llama_cpp_checks_and_the_same_updates(base: Path, awkward: Path, tmp_path: Path) -> None:
    lk.export(awkward, "gguf", tmp_path / "out", base=base)
    fields, stored = read_gguf(tmp_path / "out" / "adapter.gguf")
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    alpha = fields["adapter.lora.alpha"]
    words = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    found = {}
    for layer in range(2):
        for theirs, word in words.items():
            a, b = (
                torch.from_numpy(stored.pop(f"blk.{layer}.{word}.weight.{side}")).double()
                for side in ("lora_a", "lora_b")
            )
            delta = (alpha / b.shape[1] if alpha else 1.0) * b @ a  # llama-adapter.h: get_scale
            heads = {"attn_q": 4, "attn_k": 2}.get(word)
            found[f"model.layers.{layer}.{theirs}"] = halves(delta, heads) if heads else delta
    assert not stored
    assert_same(found, deltas(awkward))


def test_reordered_rows_attend_the_same_when_neighbors_are_turned(tmp_path: Path) -> None:
    """The order is right if llama.cpp's rotation of it gives the scores that transformers' gives."""
    from lora_kit.exporters.llama_cpp import interleave_heads

    heads, size, positions = 2, 8, torch.arange(5)
    q, k = torch.randn(2, heads * size, 5).double()
    angles = positions * 10000.0 ** (-torch.arange(0, size, 2) / size)[:, None]  # (size / 2, positions)

    def turned(rows: Tensor, first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Tensor:
        rows = rows.reshape(heads, size, 5)
        x, y = first(rows), second(rows)
        return torch.cat([x * angles.cos() - y * angles.sin(), y * angles.cos() + x * angles.sin()], dim=1)

    def scores(q: Tensor, k: Tensor, *parts: Callable[[Tensor], Tensor]) -> Tensor:
        return turned(q, *parts).transpose(1, 2) @ turned(k, *parts)

    by_halves = scores(q, k, lambda rows: rows[:, : size // 2], lambda rows: rows[:, size // 2 :])
    by_neighbors = scores(
        interleave_heads(q, heads), interleave_heads(k, heads), lambda rows: rows[:, 0::2], lambda rows: rows[:, 1::2]
    )
    torch.testing.assert_close(by_neighbors, by_halves)


def test_architectures_that_turn_halves_keep_their_rows(tmp_path: Path) -> None:
    config = transformers.Qwen2Config(**tiny_shape())
    model = transformers.Qwen2ForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    folder = trained(model, tmp_path / "sql", r=4, target_modules=["q_proj"])
    lk.export(folder, "gguf", tmp_path / "out", base=tmp_path / "base")
    fields, stored = read_gguf(tmp_path / "out" / "adapter.gguf")
    assert fields["general.architecture"] == "qwen2"
    b = safetensors.torch.load_file(folder / "adapter_model.safetensors")[
        lora_weight_keys("model.layers.0.self_attn.q_proj", "linear")[1]
    ]
    assert torch.equal(torch.from_numpy(stored["blk.0.attn_q.weight.lora_b"]), b)


def tiny_shape(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "pad_token_id": 0,
        **more,
    }


def test_an_embedding_is_written_a_row_for_every_token(base: Path, tmp_path: Path) -> None:
    folder = trained(tiny.llama(), tmp_path / "sql", r=4, target_modules=["embed_tokens", "lm_head"])
    lk.export(folder, "gguf", tmp_path / "out", base=base)
    _, stored = read_gguf(tmp_path / "out" / "adapter.gguf")
    shapes = {name: value.shape for name, value in stored.items()}
    # src/llama-adapter.cpp: A and B of token_embd change places, with A (entries, r).
    assert (shapes["token_embd.weight.lora_a"], shapes["token_embd.weight.lora_b"]) == ((96, 4), (32, 4))
    assert (shapes["output.weight.lora_a"], shapes["output.weight.lora_b"]) == ((4, 32), (96, 4))


def test_every_architecture_that_is_claimed_exists_and_names_its_layers(tmp_path: Path) -> None:
    for name, found in ARCHITECTURES.items():
        model_class = getattr(transformers, name)
        with torch.device("meta"):
            model = model_class(model_class.config_class(**tiny_shape(head_dim=8)))
        table = gguf.get_tensor_name_map({word: arch for arch, word in gguf.MODEL_ARCH_NAMES.items()}[found.name], 2)
        linear = [path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        unnamed = [path for path in linear if table.get_name(path) is None]
        # A tied head is the embedding; some architectures never have one of their own.
        assert len(linear) > 8
        assert unnamed in ([], ["lm_head"]), name


def test_the_page_for_llama_cpp_says_what_its_converter_does_not_know(base: Path, tmp_path: Path) -> None:
    kit = trained(load_base("kit-base").model, tmp_path / "kit", **PLAIN)
    lk.export(kit, "gguf", tmp_path / "out", base="kit-base")
    assert "get_vocab_base_pre" in (tmp_path / "out" / "README.md").read_text()
    lk.export(trained(tiny.llama(), tmp_path / "sql", **PLAIN), "gguf", tmp_path / "other", base=base)
    assert "get_vocab_base_pre" not in (tmp_path / "other" / "README.md").read_text()


def test_gpt_2_splits_text_as_kit_base_does_but_for_apostrophes() -> None:
    tokenizer = load_base("kit-base").tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    fields = json.loads(tokenizer.to_str())
    fields["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    gpt_2 = tokenizers.Tokenizer.from_str(json.dumps(fields))
    lines = [line for page in Path(lk.__file__).parents[1].glob("docs/*.md") for line in page.read_text().splitlines()]
    assert len(lines) > 500
    others = [line for line in lines if tokenizer.encode(line).ids != gpt_2.encode(line).ids]
    assert all("'" in line for line in others)
    assert tokenizer.encode("don't").ids != gpt_2.encode("don't").ids


@pytest.mark.parametrize("target", ["gguf", "ollama"])
def test_other_architectures_are_refused_by_name(target: str, tmp_path: Path) -> None:
    tiny.gpt2().save_pretrained(tmp_path / "base")
    folder = trained(tiny.gpt2(), tmp_path / "sql", r=4, target_modules=["c_attn"])
    with pytest.raises(ExportError, match=r"the base is a GPT2LMHeadModel; LlamaForCausalLM"):
        lk.export(folder, target, tmp_path / "out", base=tmp_path / "base")
    assert not (tmp_path / "out").exists()


def test_gguf_needs_the_base_and_refuses_what_is_tied(awkward: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="config is needed"):
        lk.export(awkward, "gguf", tmp_path / "out")
    tiny.llama(tie=True).save_pretrained(tmp_path / "base")
    folder = trained(tiny.llama(tie=True), tmp_path / "tied", r=4, target_modules=["embed_tokens", "q_proj"])
    for target in ("gguf", "mlx"):
        assert "embed_tokens is tied" in " ".join(check(folder, target, base=tmp_path / "base").refused)


@pytest.mark.parametrize(
    ("kind", "window", "targets"),
    [
        (transformers.MistralConfig, 8, ("gguf", "ollama", "mlx", "gguf-model", "ollama-model")),
        (transformers.MistralConfig, None, ()),
        (transformers.Qwen2Config, 8, ()),  # which has its window off where nothing is said
        (transformers.Gemma2Config, 8, ("mlx",)),
    ],
)
def test_a_window_that_a_reader_passes_over_limits_the_texts(
    kind: type[transformers.PretrainedConfig], window: int | None, targets: Sequence[str], tmp_path: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_config(kind(**tiny_shape(head_dim=8, sliding_window=window)))
    model.save_pretrained(tmp_path / "base")
    folder = trained(model, tmp_path / "sql", r=4, target_modules=["q_proj"])
    for target in (name for name in TARGETS if name != "merged"):
        needed = check(folder, target, base=tmp_path / "base").needed
        assert any("at most 8 tokens" in need for need in needed) == (target in targets), target
    lk.export(folder, "mlx", tmp_path / "out", base=tmp_path / "base")
    assert ("at most 8 tokens" in (tmp_path / "out" / "README.md").read_text()) == ("mlx" in targets)


def read_flag(folder: Path, flag: str) -> str:
    """Return the word after a flag in the command of a README, as a shell reads it."""
    command = re.search(r"```sh\n(.*?)\n```", (folder / "README.md").read_text(), re.S)
    assert command is not None
    words = shlex.split(command[1])
    return words[words.index(flag) + 1]


@pytest.mark.parametrize("name", ["r.8-v1.2", "lr=1e-3", "lr=0.1, r=8 (best)", "a,b", "Größe", "it's"])
def test_a_name_of_any_characters_is_read_by_every_program(name: str, base: Path, tmp_path: Path) -> None:
    folder = trained(tiny.llama(), tmp_path / name, **PLAIN)
    written = {target: tmp_path / f"for-{target}" for target in ("vllm", "sglang", "tgi", "ollama")}
    for target, out in written.items():
        lk.export(folder, target, out, base=base)
    module = read_flag(written["vllm"], "--lora-modules")  # as `LoRAParserAction` of vLLM does
    plain = "=" in module and "," not in module
    assert (module.split("=", 1) if plain else list(json.loads(module).values())) == [name, str(written["vllm"])]
    path = read_flag(written["sglang"], "--lora-paths")  # as `LoRAPathAction` of SGLang does, and what reads its list
    pair = list(json.loads(path).values()) if path[0] == "{" and path[-1] == "}" else path.split("=", 1)
    assert pair == [name, str(written["sglang"])]
    label, _, rest = read_flag(written["tgi"], "--lora-adapters").partition("=")
    assert not set(label) & set("=,@ ")
    assert rest == str(written["tgi"])
    assert json.dumps({"adapter_id": label})[1:-1] in (written["tgi"] / "README.md").read_text()
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}", read_flag(written["ollama"], "create"))


def test_ollama_gets_a_modelfile_and_is_refused_what_its_own_engine_runs(base: Path, tmp_path: Path) -> None:
    folder = trained(tiny.llama(), tmp_path / "sql", **PLAIN)
    lk.export(folder, "ollama", tmp_path / "out", base=base)
    assert (tmp_path / "out" / "Modelfile").read_text() == f"FROM {base}\nADAPTER ./adapter.gguf\n"
    assert read_gguf(tmp_path / "out" / "adapter.gguf")[0]["adapter.lora.alpha"] == 8
    assert "0.34.0" in check(folder, "ollama", base=base).needed[0]
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**tiny_shape(head_dim=8)))
    model.save_pretrained(tmp_path / "qwen3")
    other = trained(model, tmp_path / "other", r=4, target_modules=["q_proj"])
    assert "own engine" in check(other, "ollama", base=tmp_path / "qwen3").refused[0]
    assert check(other, "gguf", base=tmp_path / "qwen3").refused == ()


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("vllm", "--chat-template {out}/chat_template.jinja"),
        ("sglang", "--chat-template {out}/chat_template.jinja"),
        ("gguf", "--jinja --chat-template-file {out}/chat_template.jinja"),
        ("tgi", "is the chat template that it was trained with. Give conversations in it"),
        ("peft", "is the chat template that it was trained with. Give conversations in it"),
    ],
)
def test_the_prompts_of_the_training_go_with_an_export(target: str, said: str, base: Path, tmp_path: Path) -> None:
    for name, data in (("chat", {"chat_template": "{{ messages[0].content }}"}), ("sql", {"separator": " =>"})):
        folder = trained(tiny.llama(), tmp_path / name, record={"recipe": {"data": data}}, **PLAIN)
        export = lk.export(folder, target, tmp_path / "out" / name, base=base)
        page = (export.out / "README.md").read_text()
        assert "nothing" not in page
        if name == "chat":
            assert said.format(out=export.out) in page
            assert (export.out / "chat_template.jinja").read_text() == data["chat_template"]
        else:
            assert "template" not in page
            assert 'In its training `" =>"` followed each prompt' in page


def test_ollama_presents_prompts_as_in_the_training(base: Path, tmp_path: Path) -> None:
    folder = trained(tiny.llama(), tmp_path / "sql", record={"recipe": {"data": {"separator": " =>"}}}, **PLAIN)
    lk.export(folder, "ollama", tmp_path / "out", base=base)
    assert 'TEMPLATE """{{ .Prompt }} =>"""' in (tmp_path / "out" / "Modelfile").read_text()


def test_without_the_gguf_package_the_error_says_what_to_install(
    base: Path, awkward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ExportError, match=r"pip install 'lora-kit\[export\]'"):
        lk.export(awkward, "gguf", tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


# mlx-lm


def test_mlx_reads_the_same_updates(base: Path, awkward: Path, tmp_path: Path) -> None:
    lk.export(awkward, "mlx", tmp_path / "out", base=base)
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (fields["fine_tune_type"], fields["num_layers"]) == ("lora", -1)
    asked = fields["lora_parameters"]
    stored = safetensors.torch.load_file(tmp_path / "out" / "adapters.safetensors")
    found = {}
    for path in {key.rpartition(".")[0] for key in stored}:
        a, b = stored[f"{path}.lora_a"].double(), stored[f"{path}.lora_b"].double()
        assert (a.shape[1], b.shape[0]) == (asked["rank"], asked["rank"])
        assert re.sub(r"model\.layers\.\d+\.", "", path) in asked["keys"]
        found[path] = (asked["scale"] * b.T) @ a.T  # mlx_lm/tuner/lora.py: LoRALinear.fuse
    assert_same(found, deltas(awkward))


@pytest.mark.parametrize("fields", [{**PLAIN, "lora_alpha": 8}, {**AWKWARD, "target_modules": ["q_proj", "lm_head"]}])
def test_mlx_computes_the_same_dora(fields: dict[str, Any], base: Path, tmp_path: Path) -> None:
    folder = trained(tiny.llama(), tmp_path / "sql", use_dora=True, **fields)
    lk.export(folder, "mlx", tmp_path / "out", base=base)
    asked = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert asked["fine_tune_type"] == "dora"
    stored = safetensors.torch.load_file(tmp_path / "out" / "adapters.safetensors")
    lk.merge(base, folder, tmp_path / "merged")
    before, merged = (safetensors.torch.load_file(f / "model.safetensors") for f in (base, tmp_path / "merged"))
    scale = asked["lora_parameters"]["scale"]
    paths = sorted(key.removesuffix(".m") for key in stored if key.endswith(".m"))
    assert paths == sorted(lk.Adapter.load(folder).pairs())
    for path in paths:  # mlx_lm/tuner/dora.py: DoRALinear.fuse
        adapted = before[f"{path}.weight"] + (scale * stored[f"{path}.lora_b"].T) @ stored[f"{path}.lora_a"].T
        wanted = (stored[f"{path}.m"] / adapted.norm(dim=1)).unsqueeze(1) * adapted
        torch.testing.assert_close(merged[f"{path}.weight"], wanted, rtol=1e-5, atol=1e-6)
    model, answers = tiny.llama(), []
    bank = lk.attach(model)
    for adapter in (lk.Adapter.load(folder), convert(tmp_path / "out")):
        bank.load("x", adapter)
        with bank.using("x"):
            answers.append(tiny.logits(model, tiny.batch()))
        bank.unload("x")
    torch.testing.assert_close(answers[1], answers[0], rtol=0, atol=1e-5)
    for target in ("vllm", "gguf", "tgi"):
        assert any("use_dora" in reason for reason in check(folder, target, base=base).refused)


# All of them


def test_merged_is_what_merge_writes(base: Path, tmp_path: Path) -> None:
    folder = trained(tiny.llama(), tmp_path / "sql", **PLAIN)
    lk.export(folder, "merged", tmp_path / "out", base=base)
    lk.merge(base, folder, tmp_path / "merged")
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "merged" / weights).read_bytes()
    with pytest.raises(ExportError, match="base is needed"):
        lk.export(folder, "merged", tmp_path / "other")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_copies_of_tables_beside_their_lora_weights_are_compared_in_the_coarser_dtype(
    base: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    fields = {"r": 2, "target_modules": ["q_proj", "embed_tokens", "lm_head"], "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(**fields, init_lora_weights=False)
    peft.get_peft_model(tiny.llama(dtype=dtype), config).save_pretrained(tmp_path / "sql", save_embedding_layers=True)
    assert len(lk.Adapter.load(tmp_path / "sql").base_copies()) == 2
    assert check(tmp_path / "sql", "vllm", base=base).refused == ()
    lk.export(tmp_path / "sql", "gguf", tmp_path / "gguf", base=base)
    for one in (torch.float32, torch.bfloat16, torch.float16):
        tiny.llama(dtype=one).save_pretrained(tmp_path / str(one))
        bank = lk.attach(tiny.llama(dtype=one))
        bank.load("sql", tmp_path / "sql")
        lk.merge(tmp_path / str(one), tmp_path / "sql", tmp_path / f"merged {one}")
    tiny.llama(seed=4).save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="not the base's"):
        lk.merge(tmp_path / "other", tmp_path / "sql", tmp_path / "merged")


def test_an_unknown_target_and_an_adapter_without_pairs_are_refused(base: Path, tmp_path: Path) -> None:
    folder = trained(tiny.llama(), tmp_path / "head", target_modules=[], modules_to_save=["lm_head"])
    with pytest.raises(ConfigError, match="did you mean 'vllm'"):
        check(folder, "vlm")
    told = check(folder, "mlx", base=base).refused
    assert [why.partition(":")[0] for why in told] == ["modules_to_save", "target_modules"]
    assert check(folder, "peft").refused == ()


def test_a_base_that_the_adapter_does_not_fit_is_refused(base: Path, awkward: Path, tmp_path: Path) -> None:
    wide = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny_shape(hidden_size=64)))
    wide.config.save_pretrained(tmp_path / "wide")
    for target in ("gguf", "vllm", "mlx"):
        with pytest.raises(AdapterError, match="does not match this model"):
            lk.export(awkward, target, tmp_path / "out", base=tmp_path / "wide")
    heads = transformers.LlamaConfig(**tiny_shape(vocab_size=97))
    heads.architectures = ["LlamaForCausalLM"]
    heads.save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match="other names or shapes"):
        lk.export(awkward, "gguf", tmp_path / "out", base=tmp_path / "other")
    assert not (tmp_path / "out").exists()
    lk.export(awkward, "gguf", tmp_path / "out", base=tmp_path / "other", allow=["other-base"])


def test_pairs_for_parameters_stay_with_peft(tmp_path: Path) -> None:
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**tiny_shape(num_local_experts=2)))
    config = lk.LoraConfig(r=2, target_modules=("q_proj",), target_parameters=("experts.down_proj",))
    bank = lk.attach(model, config, name="a")
    bank.save("a", tmp_path / "moe")
    assert check(tmp_path / "moe", "peft", max_lora_rank=2).refused == ()
    for target in ("vllm", "gguf", "mlx"):
        assert check(tmp_path / "moe", target).refused[0].startswith("target_parameters: ")


def test_token_embeddings_are_named_as_what_a_program_cannot_read(tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny_shape()))
    bank = lk.attach(model, lk.LoraConfig(r=2, target_modules=("q_proj",), trainable_token_indices=(3,)), name="a")
    bank.save("a", tmp_path / "rows")
    for target in ("vllm", "sglang", "tgi", "gguf", "ollama", "mlx"):
        assert check(tmp_path / "rows", target).refused[0].startswith("trainable_token_indices: ")
        with pytest.raises(ExportError, match="trainable_token_indices"):
            lk.export(tmp_path / "rows", target, tmp_path / "out")
    assert check(tmp_path / "rows", "peft").refused == ()


def test_only_an_earlier_export_is_replaced_and_never_what_is_read(base: Path, awkward: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lk.export(awkward, "vllm", out, base=base)
    before = contents(out)
    with pytest.raises(StorageError):
        lk.export(awkward, "mlx", out)
    with pytest.raises(ExportError, match="is an input"):
        lk.export(out, "mlx", out, replace=True)
    with pytest.raises(ExportError, match="lie inside each other"):
        lk.export(out, "mlx", out / "mlx")
    assert contents(out) == before
    lk.export(awkward, "mlx", out, replace=True)
    assert (out / "adapters.safetensors").exists()
    with pytest.raises(StorageError):
        lk.export(awkward, "mlx", base, replace=True)


# The verbs


def test_check_says_why_it_does_not_fit_and_exits_with_2(awkward: Path, tmp_path: Path, capsys: Capture) -> None:
    ask = ["check", str(awkward), "--target", "vllm", "--max-lora-rank"]
    assert main([*ask, "16"]) == 0
    verdict, _, command = capsys.readouterr().out.partition("\nnext:\n")
    assert "--max-loras" in verdict
    assert "--max-lora-rank" not in verdict  # vLLM's default takes it
    assert "--max-lora-rank 16 --target vllm" in command
    assert main([*ask, "4", "--json"]) == 2
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert (told["fits"], told["refused"]) == (False, ["r: rank 6 is above max_lora_rank 4; resize it to 4"])
    assert "r: rank 6 is above max_lora_rank 4" in err


def test_export_writes_and_says_what_it_changed(base: Path, awkward: Path, tmp_path: Path, capsys: Capture) -> None:
    ask = ["export", str(awkward), "--target", "vllm", "--base", str(base), "--out", str(tmp_path / "out")]
    assert main([*ask, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["target"] == "vllm"
    assert any("use_rslora" in change for change in told["changed"])
    assert f"sql={tmp_path / 'out'}" in (tmp_path / "out" / "README.md").read_text()
    assert main(ask) == 3
    assert main([*ask, "--replace", "--max-lora-rank", "4"]) == 2
    assert "max_lora_rank 4" in capsys.readouterr().err
