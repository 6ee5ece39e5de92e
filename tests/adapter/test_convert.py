"""Adapters that other tools wrote: the same updates as an adapter of ours, or a refusal that says why."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

import lora_kit as lk
from lora_kit.adapter.conversion.convert import convert, read_foreign_adapter
from lora_kit.adapter.folder import CONFIG, OLD_WEIGHTS, WEIGHTS
from lora_kit.adapter.inspect import inspect
from lora_kit.adapter.peft_keys import PREFIX
from lora_kit.cli.main import main
from lora_kit.errors import AdapterError, ConfigError
from tests.support import classifiers, folders, hub_cache, tiny

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
REAL = os.environ.get("LORA_KIT_FOREIGN_ADAPTERS")
"""A folder with real adapters of others; its tests are skipped without it."""


def mlx(folder: Path, *, kind: str = "lora", **parameters: Any) -> Path:
    """An adapter as mlx-lm writes it: pairs transposed, their scale in the config."""
    folder.mkdir()
    fields = {
        "fine_tune_type": kind,
        "model": "some/llama",
        "num_layers": 1,
        "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0, **parameters},
    }
    (folder / CONFIG).write_text(json.dumps(fields))
    torch.manual_seed(3)
    values = {f"{Q}.lora_a": torch.randn(32, 4), f"{Q}.lora_b": torch.randn(4, 32)}
    if kind == "dora":
        values[f"{Q}.m"] = torch.rand(32) + 1
    (folder / "adapters.safetensors").write_bytes(with_null_metadata(safetensors.torch.save(values)))
    return folder


def with_null_metadata(data: bytes) -> bytes:
    """The same file as mlx's own writer makes it, which says `"__metadata__": null`."""
    header, payload = folders.taken_apart(data)
    return folders.raw({"__metadata__": None, **header}, payload)


def loralib(folder: Path, **more: Tensor) -> Path:
    """What `torch.save(lora_state_dict(model))` writes, for a BERT with a head."""
    folder.mkdir()
    torch.manual_seed(4)
    path = "bert.encoder.layer.1.attention.self.query"
    values = {f"{path}.lora_A": torch.randn(4, 32), f"{path}.lora_B": torch.randn(32, 4)}
    values |= {"classifier.weight": torch.randn(3, 32), "classifier.bias": torch.randn(3), **more}
    torch.save(values, folder / "lora.bin")
    return folder


def grouped(folder: Path, enable: list[bool], *, weights: str = OLD_WEIGHTS) -> Path:
    """PEFT before 0.3: pairs for parts of GPT-2's q, k, v, their B that of a grouped convolution."""
    folder.mkdir()
    count = sum(enable)
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    (folder / CONFIG).write_text(json.dumps({**fields, "enable_lora": enable, "merge_weights": False, "bias": "none"}))
    torch.manual_seed(5)
    values = {}
    for layer in range(2):
        path = f"{PREFIX}transformer.h.{layer}.attn.c_attn"
        values[f"{path}.lora_A.weight"] = torch.randn(4 * count, 32)
        values[f"{path}.lora_B.weight"] = torch.randn(32 * count, 4, 1)
    torch.save(values, folder / weights)
    return folder


@contextmanager
def watched(model: nn.Module, paths: list[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Input and output of modules, as they are seen while the block runs."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            seen[path] = given[0].detach(), out.detach()

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def check_by_hand(model: Any, adapter: lk.Adapter, deltas: Mapping[str, Tensor], *, atol: float = 1e-4) -> None:
    """Each adapted layer gives base(x) + delta x, the delta (out, in) worked out from the raw tensors."""
    bases = {path: model.get_submodule(path) for path in deltas}
    bank = lk.attach(model, slots=1, max_rank=64)
    bank.load("foreign", adapter, allow=("other-base",))
    bank.use("foreign")
    with watched(model, list(deltas)) as seen, torch.no_grad():
        model(**tiny.batch())
    assert seen.keys() == deltas.keys()
    for path, (x, y) in seen.items():
        torch.testing.assert_close(y, bases[path](x) + x @ deltas[path].T, rtol=1e-4, atol=atol)
        assert (y - bases[path](x)).abs().max() > 1e-3


# mlx-lm


def test_pairs_of_mlx_are_turned_round_and_scaled_as_it_does(tmp_path: Path) -> None:
    folder = mlx(tmp_path / "x")
    values = safetensors.torch.load_file(folder / "adapters.safetensors")
    adapter = convert(folder)
    assert adapter.config.base_model_name_or_path == "some/llama"
    delta = 20.0 * (values[f"{Q}.lora_a"] @ values[f"{Q}.lora_b"]).T
    check_by_hand(tiny.llama(), adapter, {Q: delta}, atol=1e-2)


def test_a_dora_of_mlx_keeps_its_magnitudes(tmp_path: Path) -> None:
    adapter = convert(mlx(tmp_path / "x", kind="dora"))
    assert adapter.config.use_dora
    values = safetensors.torch.load_file(tmp_path / "x" / "adapters.safetensors")
    assert torch.equal(adapter.pairs()[Q].magnitude, values[f"{Q}.m"])  # type: ignore[arg-type]


def test_what_is_exported_for_mlx_comes_back_with_the_same_updates(tmp_path: Path) -> None:
    before = folders.adapter()
    before.save(tmp_path / "a")
    lk.export(tmp_path / "a", "mlx", tmp_path / "mlx")
    after = convert(tmp_path / "mlx")
    for path, pair in before.pairs().items():
        one, other = pair, after.pairs()[path]
        delta = before.config.scaling_of(path) * one.b @ one.a
        torch.testing.assert_close(after.config.scaling_of(path) * other.b @ other.a, delta)


@pytest.mark.parametrize(
    ("kind", "parameters", "message"),
    [("full", {}, "fine_tune_type is 'full'"), ("lora", {"scale": None}, "lora_parameters has no scale")],
)
def test_what_mlx_wrote_otherwise_is_refused(
    tmp_path: Path, kind: str, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        convert(mlx(tmp_path / "x", kind=kind, **parameters))


# loralib


def test_a_file_of_loralib_needs_its_alpha_and_brings_its_head(tmp_path: Path) -> None:
    folder = loralib(tmp_path / "x")
    with pytest.raises(ConfigError, match="lora_alpha"):
        convert(folder)
    adapter = convert(folder, lora_alpha=16, base="some/bert")
    assert adapter.config.modules_to_save == ("classifier",)
    path = "bert.encoder.layer.1.attention.self.query"
    values = torch.load(folder / "lora.bin", weights_only=True)
    model = tiny.bert()
    check_by_hand(model, adapter, {path: 16 / 4 * values[f"{path}.lora_B"] @ values[f"{path}.lora_A"]}, atol=1e-3)
    assert torch.equal(adapter.saved()["classifier.weight"], values["classifier.weight"])


def test_parts_of_a_fused_projection_are_taken_only_when_they_are_named(tmp_path: Path) -> None:
    path = "transformer.h.0.attn.c_attn"
    torch.manual_seed(6)
    values = {f"{path}.lora_A": torch.randn(8, 32), f"{path}.lora_B": torch.randn(64, 4)}
    torch.save(values, tmp_path / "gpt2.pt")
    with pytest.raises(AdapterError, match="does not say which"):
        convert(tmp_path / "gpt2.pt", lora_alpha=4)
    adapter = convert(tmp_path / "gpt2.pt", lora_alpha=4, enable_lora=[True, False, True])
    a, b = values[f"{path}.lora_A"], values[f"{path}.lora_B"]
    delta = torch.cat([b[:32] @ a[:4], torch.zeros(32, 32), b[32:] @ a[4:]])
    check_by_hand(tiny.gpt2(), adapter, {path: delta}, atol=1e-3)


def test_a_bias_beside_a_pair_is_refused_by_name(tmp_path: Path) -> None:
    key = "bert.encoder.layer.1.attention.self.query.bias"
    with pytest.raises(AdapterError, match=f"{key} belongs to a layer that has LoRA weights"):
        convert(loralib(tmp_path / "x", **{key: torch.ones(32)}), lora_alpha=1)


# PEFT


@pytest.mark.parametrize("enable", [[True, False, True], [False, True, False], [True, True, True]])
def test_pairs_for_parts_of_a_layer_become_one_pair(tmp_path: Path, enable: list[bool]) -> None:
    folder = grouped(tmp_path / "x", enable)
    with pytest.raises(ConfigError, match="lora-kit convert"):
        lk.Adapter.load(folder)
    values = torch.load(folder / OLD_WEIGHTS, weights_only=True)
    deltas = {}
    for layer in range(2):
        path = f"transformer.h.{layer}.attn.c_attn"
        a, b = (values[f"{PREFIX}{path}.lora_{side}.weight"] for side in "AB")
        x = torch.eye(32)  # as PEFT did: a grouped convolution, and zeros between what it gives
        h = nn.functional.conv1d((x @ a.T).T.unsqueeze(0), b, groups=sum(enable)).squeeze(0)
        delta = torch.zeros(3, 32, 32)
        delta[torch.tensor(enable)] = h.view(sum(enable), 32, 32)
        deltas[path] = 8 / 4 * delta.view(96, 32)
    check_by_hand(tiny.gpt2(), convert(folder), deltas, atol=1e-2)


WRAPPED: dict[str, Callable[[str], str]] = {
    "compiled": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "distributed": lambda key: f"module.{key}",
    "sharded": lambda key: key.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    "checkpointed": lambda key: key.replace("self_attn.", "_checkpoint_wrapped_module.self_attn."),
    "with the name of the adapter": lambda key: key.replace(".weight", ".default.weight"),
    "without the prefix": lambda key: key.removeprefix(PREFIX),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_state_dicts_of_wrapped_models_are_the_same_adapter(tmp_path: Path, how: str) -> None:
    plain = folders.tensors()
    folder = folders.foreign(tmp_path / "x", {WRAPPED[how](key): tensor for key, tensor in plain.items()})
    adapter = convert(folder)
    assert adapter == lk.Adapter(folders.config(), plain)
    assert adapter.save(tmp_path / "mine")
    assert lk.Adapter.load(tmp_path / "mine") == adapter


AROUND: dict[str, Callable[[str], str]] = {
    "nothing": lambda key: key,
    "DDP twice": lambda key: f"module.module.{key}",
    "DDP and compile": lambda key: f"_orig_mod.module.{key}",
    "compile inside": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "Fabric": lambda key: f"_forward_module.{key}",
    "Lightning and FSDP": lambda key: f"model._fsdp_wrapped_module.{key}",
}
INSIDE: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda state: state,
    "Lightning": lambda state: {"state_dict": state, "epoch": 3, "hyper_parameters": {"lr": 0.1}},
    "a training loop": lambda state: {"model": state, "optimizer": {"state": {0: torch.ones(2)}}, "step": 7},
    "DeepSpeed": lambda state: {"module": {"state_dict": state}, "dp_world_size": 2},
    "under other names": lambda state: {"epoch": 2, "checkpoint": {"net": [state, {"lr": 0.1}]}},
}
KINDS: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["query"], "modules_to_save": ["pooler"]},
    "DoRA": {"target_modules": ["query", "dense"], "use_dora": True},
    "embedding": {"target_modules": ["query", "word_embeddings"]},
    "tokens": {"target_modules": ["query"], "trainable_token_indices": {"word_embeddings": [3, 5]}},
}


def live(kind: str) -> Any:
    """A PeftModel that is being trained."""
    return classifiers.peft_classifier("Bert", "SEQ_CLS", **KINDS[kind])


def checkpoint(folder: Path, model: Any, around: str, inside: str, *, name: str = "last.ckpt") -> Path:
    """A folder with the whole state dict of a model, as a training loop writes it, and PEFT's config beside it."""
    model.save_pretrained(folder)
    (folder / WEIGHTS).unlink()
    state = {AROUND[around](key): tensor for key, tensor in model.state_dict().items()}
    torch.save(INSIDE[inside](state), folder / name)
    return folder


def check_equals_live(adapter: lk.Adapter, theirs: Any) -> None:
    model = classifiers.classifier("Bert", "SEQ_CLS")
    bank = lk.attach(model, slots=1, max_rank=8)
    bank.load("converted", adapter)
    bank.use("converted")
    torch.testing.assert_close(classifiers.logits(model), classifiers.logits(theirs), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_state_dict_of_a_live_model_is_converted(tmp_path: Path, kind: str) -> None:
    theirs = live(kind)
    result = read_foreign_adapter(checkpoint(tmp_path / "x", theirs, "nothing", "nothing"))
    check_equals_live(result.adapter, theirs)
    assert any("of the base are left out" in note for note in result.notes)


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("around", AROUND)
def test_a_state_dict_is_found_however_it_is_wrapped(tmp_path: Path, around: str, inside: str) -> None:
    theirs = live("head")
    check_equals_live(convert(checkpoint(tmp_path / "x", theirs, around, inside)), theirs)


def test_two_state_dicts_with_lora_weights_are_both_named(tmp_path: Path) -> None:
    theirs = live("head")
    state = theirs.state_dict()
    averaged = {key: tensor + 1 for key, tensor in state.items()}
    folder = checkpoint(tmp_path / "x", theirs, "nothing", "nothing")
    both = {f"{who}.{key}": state[key] for who in ("student", "teacher") for key in state}
    for whole, names in (
        ({"model": state, "callbacks": {"ema": averaged}}, r"callbacks\.ema, model"),
        ({"state_dict": both}, "student, teacher"),
    ):
        torch.save(whole, folder / "last.ckpt")
        with pytest.raises(AdapterError, match=names):
            convert(folder)
    torch.save({"model": state, "again": state}, folder / "last.ckpt")
    check_equals_live(convert(folder), theirs)


def test_a_teacher_without_an_adapter_is_left_out(tmp_path: Path) -> None:
    theirs = live("head")
    folder = checkpoint(tmp_path / "x", theirs, "nothing", "nothing")
    teacher = {
        f"teacher.{key}": tensor for key, tensor in classifiers.classifier("Bert", "SEQ_CLS").state_dict().items()
    }
    student = {f"student.{key}": tensor for key, tensor in theirs.state_dict().items()}
    torch.save({"state_dict": teacher | student}, folder / "last.ckpt")
    check_equals_live(convert(folder), theirs)


def test_a_head_beside_named_tensors_is_kept(tmp_path: Path) -> None:
    theirs = live("head")
    theirs.save_pretrained(tmp_path / "x")
    values = safetensors.torch.load_file(tmp_path / "x" / WEIGHTS)
    named = {re.sub(r"(lora_[AB])\.weight", r"\1.default.weight", key): tensor for key, tensor in values.items()}
    safetensors.torch.save_file(named, tmp_path / "x" / WEIGHTS)
    check_equals_live(convert(tmp_path / "x"), theirs)


def test_tensors_of_peft_alone_need_their_alpha(tmp_path: Path) -> None:
    theirs = live("DoRA")
    folder = checkpoint(tmp_path / "x", theirs, "DDP twice", "Lightning")
    (folder / CONFIG).unlink()
    with pytest.raises(AdapterError, match=r"no adapter_config\.json is beside it"):
        convert(folder)
    check_equals_live(convert(folder, lora_alpha=8), theirs)


def test_what_would_not_load_is_not_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folders.foreign(tmp_path / "x", target_modules=["v_proj"])
    with pytest.raises(AdapterError, match=r"LoRA weights for model\.layers\.0\.self_attn\.q_proj, .* does not match"):
        convert(source)
    moved = {key.replace("model.layers", "encoder.layers"): tensor for key, tensor in folders.tensors().items()}
    source = folders.foreign(tmp_path / "y", moved)
    tiny.llama().save_pretrained(tmp_path / "base")
    flags = ["--out", str(tmp_path / "out"), "--base", str(tmp_path / "base")]
    assert main(["convert", str(source), *flags]) == 2
    assert "the model has no module encoder.layers.0.self_attn.q_proj" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["convert", str(source), *flags, "--rename", "encoder=model"]) == 0


def test_what_would_not_load_into_a_cached_base_is_not_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    tiny.llama().save_pretrained(tmp_path / "base")
    hub_cache.add_repository(tmp_path / "cache", "org/base", tmp_path / "base")
    moved = {key.replace("model.layers", "encoder.layers"): tensor for key, tensor in folders.tensors().items()}
    source = folders.foreign(tmp_path / "y", moved)
    flags = ["--out", str(tmp_path / "out"), "--base", "org/base"]
    assert main(["convert", str(source), *flags]) == 2
    assert "the model has no module encoder.layers.0.self_attn.q_proj" in capsys.readouterr().err
    assert main(["convert", str(source), *flags, "--rename", "encoder=model"]) == 0


def test_renamed_layers_are_named_in_the_config(tmp_path: Path) -> None:
    old = {key.replace("model.layers", "decoder.layers"): tensor for key, tensor in folders.tensors().items()}
    source = folders.foreign(tmp_path / "x", old, target_modules=r"decoder\.layers\.\d\.self_attn\.q_proj")
    assert convert(source, renames={"decoder": "model"}).config.target_modules == folders.PATHS


def test_renamed_layers_keep_the_rank_and_the_alpha_that_their_old_paths_had(tmp_path: Path) -> None:
    old = {key.replace("model.layers", "decoder.layers"): tensor for key, tensor in folders.tensors().items()}
    first = folders.PATHS[0].replace("model.", "decoder.")
    source = folders.foreign(tmp_path / "x", old, r=2, rank_pattern={"q_proj": 4}, alpha_pattern={first: 16})
    config = convert(source, renames={"decoder": "model"}).config
    assert [config.rank_of(path) for path in folders.PATHS] == [4, 4]
    assert [config.alpha_of(path) for path in folders.PATHS] == [16, 8]


def test_a_saved_head_of_a_live_peft_model_comes_without_the_original(tmp_path: Path) -> None:
    values = folders.tensors() | {
        f"{PREFIX}score.original_module.weight": torch.zeros(3, 32),
        f"{PREFIX}score.modules_to_save.default.weight": torch.ones(3, 32),
    }
    found = read_foreign_adapter(folders.foreign(tmp_path / "x", values, modules_to_save=["score"]))
    assert torch.equal(found.adapter.saved()["score.weight"], torch.ones(3, 32))
    assert any("original modules" in note for note in found.notes)


def test_several_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    values = {
        key.replace(".weight", f".{name}.weight"): t.clone() for key, t in folders.tensors().items() for name in "ab"
    }
    with pytest.raises(AdapterError, match="several adapters: a, b"):
        convert(folders.foreign(tmp_path / "x", values))


def test_beginnings_of_paths_can_be_renamed(tmp_path: Path) -> None:
    old = {key.replace("model.layers", "language_model.model.layers"): t for key, t in folders.tensors().items()}
    folder = folders.foreign(tmp_path / "x", old)
    assert convert(folder, renames={"language_model.model": "model"}) == lk.Adapter(folders.config(), folders.tensors())


def test_what_unsloth_axolotl_and_llama_factory_write_loads_as_it_is(tmp_path: Path) -> None:
    # Their folders are PEFT's, with names of code to import, regular expressions over paths and fields of their own.
    extra: dict[str, Any] = {
        "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "m", "unsloth_fixed": True},
        "base_model_name_or_path": "unsloth/llama-bnb-4bit",
        "target_modules": r"(?:.*?(?:self_attn|attention).*?(?:q_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.q_proj)",
        "eva_config": None,
        "peft_version": "0.18.0",
    }
    folder = folders.foreign(tmp_path / "x", **extra)
    model = tiny.llama()
    bank = lk.attach(model, slots=1, max_rank=8)
    bank.load("theirs", folder)
    bank.use("theirs")
    theirs = tiny.logits(model, tiny.batch())
    bank.use(None)
    bank.unload("theirs")
    bank.load("plain", lk.Adapter(folders.config(), folders.tensors()))
    bank.use("plain")
    assert torch.equal(theirs, tiny.logits(model, tiny.batch()))


# Refusals, and what people see


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_unet_mid.lora_down.weight": torch.ones(2, 2)}, "kohya's sd-scripts"),
        ({"lora_te1_text_model_0_q.alpha": torch.ones(1)}, "kohya's sd-scripts"),
        ({"diffusion_model.double_blocks.0.qkv.lora_A.weight": torch.ones(2, 2)}, "ComfyUI"),
        ({"unet.mid_block.attn1.to_q.lora_A.weight": torch.ones(2, 2)}, "diffusers"),
        ({"double_blocks.0.processor.lora_down.weight": torch.ones(2, 2)}, "diffusion models"),
        ({"layers.0.attn.q_proj.lora_a.weight": torch.ones(2, 2)}, "torchtune"),
        ({"transformer.h.0.attn.qkv.lora_A": torch.ones(2, 2)}, "hyperparameters.yaml is missing"),
        ({"model.embed_tokens.weight": torch.ones(2, 2)}, "no keys of an adapter"),
        ({}, "no keys of an adapter"),
        ({f"{Q}.lora_A": torch.ones(2, 2)}, "A or B is missing"),
        ({f"{PREFIX}{Q}.lora_A.weight": torch.ones(2, 2)}, "no adapter_config.json"),
    ],
)
def test_what_is_no_adapter_is_refused_and_nothing_is_written(
    tmp_path: Path, values: dict[str, Tensor], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    safetensors.torch.save_file(values, tmp_path / "x.safetensors")
    with pytest.raises(AdapterError, match=message):
        convert(tmp_path / "x.safetensors")
    assert main(["convert", str(tmp_path / "x.safetensors"), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("global_step5/mp_rank_00_model_states.pt", r"a checkpoint of DeepSpeed.*zero_to_fp32"),
        ("zero/model.lora_A/fp32.pt", r"a universal checkpoint of DeepSpeed.*made of"),
        ("pytorch_model_fsdp_0/__0_0.distcp", r"a distributed checkpoint of PyTorch.*accelerate merge-weights"),
    ],
)
def test_parts_of_tensors_are_not_read_and_what_joins_them_is_said(tmp_path: Path, file: str, message: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    torch.save({}, tmp_path / file)
    with pytest.raises(AdapterError, match=message):
        convert(tmp_path)
    whole = lk.Adapter(folders.config(), folders.tensors())
    whole.save(tmp_path / "beside")
    for name in (WEIGHTS, CONFIG):
        (tmp_path / "beside" / name).rename(tmp_path / name)
    assert convert(tmp_path) == whole


def sharded(folder: Path, source: Path) -> Path:
    """An adapter with every other tensor in a second file, and an index."""
    folder.mkdir()
    tensors = safetensors.torch.load_file(source / WEIGHTS)
    weight_map = {key: f"adapter_model-0000{number % 2 + 1}-of-00002.safetensors" for number, key in enumerate(tensors)}
    for name in set(weight_map.values()):
        part = {key: tensors[key] for key, file in weight_map.items() if file == name}
        safetensors.torch.save_file(part, folder / name)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / CONFIG).write_text((source / CONFIG).read_text())
    return folder


def test_an_adapter_in_several_files_is_the_same_adapter(tmp_path: Path) -> None:
    whole = lk.Adapter(folders.config(), folders.tensors())
    whole.save(tmp_path / "whole")
    parts = sharded(tmp_path / "parts", tmp_path / "whole")
    assert convert(parts) == whole
    next(parts.glob("*-00002-of-00002.safetensors")).unlink()
    with pytest.raises(AdapterError, match="names files that are missing: adapter_model-00002"):
        convert(parts)
    for named in ('"../other.safetensors"', "[]", "3"):
        (parts / f"{WEIGHTS}.index.json").write_text(f'{{"weight_map": {{"x": {named}}}}}')
        with pytest.raises(AdapterError, match="does not name files beside it"):
            convert(parts)


def test_inspect_explains_what_would_not_load(tmp_path: Path) -> None:
    found = inspect(loralib(tmp_path / "x"))
    assert "written by loralib" in found.notes[0]
    assert any("lora_alpha" in note for note in found.notes)
    assert [layer.rank for layer in found.layers] == [4]
    assert inspect(tmp_path / "x" / "lora.bin").digest == found.digest


def test_inspect_does_not_explain_away_what_is_wrong_with_ours(tmp_path: Path) -> None:
    folder = folders.adapter().save(tmp_path / "mine")
    safetensors.torch.save_file(folders.tensors(seed=1), folder / WEIGHTS)
    with pytest.raises(AdapterError, match="replaced"):
        inspect(folder)


def test_convert_on_the_command_line_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = loralib(tmp_path / "x"), tmp_path / "out"
    assert main(["convert", str(source), "--out", str(out)]) == 2
    assert "lora_alpha" in capsys.readouterr().err
    assert main(["convert", str(source), "--out", str(out), "--alpha", "16", "--base", "b", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["layout"] == "loralib"
    adapter = lk.Adapter.load(out)
    assert told["digest"] == adapter.digest
    assert adapter.record["converted"]["sha256"] == told["sha256"]
    assert main(["convert", str(source), "--out", str(out), "--alpha", "16"]) == 3
    assert main(["convert", str(source), "--out", str(tmp_path / "o"), "--rename", "x", "--alpha", "1"]) == 2


def test_pairs_for_convolutions_are_converted_too(tmp_path: Path) -> None:
    values = {"conv.lora_A.default.weight": torch.ones(4, 3, 5), "conv.lora_B.default.weight": torch.ones(8, 4, 1)}
    source = folders.foreign(tmp_path / "x", values, target_modules=["conv"])
    assert main(["convert", str(source), "--out", str(tmp_path / "out")]) == 0
    assert lk.Adapter.load(tmp_path / "out").all_pairs()["conv"].kind == "convolution"


# Real ones, where a folder of them is given


@pytest.mark.skipif(REAL is None, reason="LORA_KIT_FOREIGN_ADAPTERS names no folder of real adapters")
@pytest.mark.parametrize(
    "name", ["gpt-neo-125M-qv-r8", "bloom-560m-legacy-enable_lora-bin", "loralib-roberta-base-mnli"]
)
def test_real_adapters_of_others_do_what_their_raw_tensors_say(name: str) -> None:
    folder = Path(str(REAL)) / name
    if name.startswith("gpt-neo"):
        model: Any = transformers.GPTNeoForCausalLM(
            transformers.GPTNeoConfig(
                hidden_size=768, num_heads=12, num_layers=12, attention_types=[[["global", "local"], 6]], vocab_size=96
            )
        )
        values = safetensors.torch.load_file(folder / WEIGHTS)
        paths = [key.removesuffix(".lora_A.weight") for key in values if "lora_A" in key]
        deltas = {
            p.removeprefix(PREFIX): 2 * values[f"{p}.lora_B.weight"] @ values[f"{p}.lora_A.weight"] for p in paths
        }
        adapter = lk.Adapter.load(folder)
    elif name.startswith("bloom"):
        model = transformers.BloomForCausalLM(
            transformers.BloomConfig(hidden_size=1024, n_layer=24, n_head=16, vocab_size=96)
        )
        values = torch.load(folder / OLD_WEIGHTS, weights_only=True, map_location="cpu")
        paths = [key.removesuffix(".lora_A.weight") for key in values if "lora_A" in key]
        deltas = {}
        for path in paths:
            a, b = values[f"{path}.lora_A.weight"], values[f"{path}.lora_B.weight"].squeeze(-1)
            q, v = b[:1024] @ a[:8], b[1024:] @ a[8:]
            deltas[path.removeprefix(PREFIX)] = 16 / 8 * torch.cat([q, torch.zeros(1024, 1024), v])
        adapter = convert(folder)
    else:
        model = transformers.RobertaForSequenceClassification(
            transformers.RobertaConfig(vocab_size=96, pad_token_id=0, id2label={0: "a", 1: "b", 2: "c"})
        )
        values = torch.load(folder / "roberta_base_lora_mnli.bin", weights_only=True, map_location="cpu")
        paths = [key.removesuffix(".lora_A") for key in values if "lora_A" in key]
        deltas = {path: 16 / 8 * values[f"{path}.lora_B"] @ values[f"{path}.lora_A"] for path in paths}
        adapter = convert(folder, lora_alpha=16)
    assert adapter.pairs().keys() == deltas.keys()
    check_by_hand(model.eval(), adapter, deltas, atol=1e-3)
