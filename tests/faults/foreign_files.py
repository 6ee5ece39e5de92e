"""Faults of files that other programs write: what PEFT writes loads as in PEFT, what means something else says so."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch

import lora_kit as lk
from lora_kit.adapter.conversion.convert import convert
from lora_kit.adapter.folder import CONFIG, WEIGHTS
from lora_kit.adapter.peft_keys import PREFIX
from lora_kit.errors import AdapterError, ConfigError, LoraKitError, MergeError
from lora_kit.merging.merge import merge
from tests.faults.adapter_acts import load, load_with_peft
from tests.faults.fault import Act, Fault, no_files
from tests.support import folders, hub_cache, legacy_adapters, merging, tiny


def _save_peft(model: Any, folder: Path, **fields: Any) -> Any:
    """Save a PeftModel's adapter, with weights that do something; return the model."""
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], **fields))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(std=0.1)
    wrapped.save_pretrained(str(folder))
    return wrapped.eval()


def _same_as_peft(make_model: Callable[[], Any], **fields: Any) -> Act:
    """Return what loads an adapter of PEFT, and compares logits with PEFT's."""

    def act(folder: Path) -> None:
        wrapped = _save_peft(make_model(), folder / "adapter", **fields)
        expected = tiny.logits(wrapped, tiny.batch())
        bank = lk.attach(make_model(), slots=1)
        bank.load("x", folder / "adapter")
        bank.use("x")
        assert torch.allclose(tiny.logits(bank.model, tiny.batch()), expected, atol=1e-5)

    return act


def _classifier_of_peft(folder: Path) -> None:
    """PEFT saves a head that it does not name by the name that the model has."""
    model = peft.get_peft_model(tiny.bert(), peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.normal_()
    model.eval().save_pretrained(str(folder / "adapter"))
    bank = lk.attach(tiny.bert(), slots=1)
    bank.load("x", folder / "adapter")
    bank.use("x")
    expected = tiny.logits(model, tiny.batch())
    assert torch.allclose(tiny.logits(bank.model, tiny.batch()), expected, atol=1e-5)


def _adopted_classifier(folder: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    bank = lk.adopt(peft.get_peft_model(tiny.bert(), config))
    bank.save(bank.names[0], folder / "adapter")
    assert lk.Adapter.load(folder / "adapter").saved()


def _null_metadata(folder: Path) -> None:
    """mlx-lm writes `"__metadata__": null`."""
    path = folders.foreign(folder / "adapter") / WEIGHTS
    fields, payload = folders.taken_apart(path.read_bytes())
    path.write_bytes(folders.raw({"__metadata__": None, **fields}, payload))


def _dropped_head(folder: Path) -> None:
    """A trained head that the config does not name is never dropped without a word."""
    values = folders.tensors() | {PREFIX + "lm_head.weight": torch.ones(96, 32)}
    folders.foreign(folder / "adapter", values)


def _rename(old: str, new: str) -> Act:
    renamed = {key.replace(old, new): tensor for key, tensor in folders.tensors().items()}
    return lambda folder: folders.foreign(folder / "adapter", renamed)


def _wrapped_state(wrap: Callable[[dict[str, Any]], Any]) -> Act:
    """Return what writes a whole live PeftModel's state dict, wrapped, and converts it."""

    def act(folder: Path) -> None:
        wrapped = _save_peft(tiny.llama(), folder / "peft")
        torch.save(wrap(wrapped.state_dict()), folder / "state.bin")
        convert(folder / "state.bin", lora_alpha=8).save(folder / "adapter")
        expected = lk.Adapter.load(folder / "peft").tensors
        found = lk.Adapter.load(folder / "adapter").tensors
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())

    return act


def _compiled(folder: Path) -> None:
    model = torch.compile(tiny.llama())
    bank = lk.attach(model, folders.config(init_lora_weights=False), name="x")
    bank.save("x", folder / "adapter")
    assert not [key for key in lk.Adapter.load(folder / "adapter").tensors if "_orig_mod" in key]


def _saved_with_bank(folder: Path) -> None:
    model = tiny.llama()
    lk.attach(model, folders.config(init_lora_weights=False), name="x")
    model.save_pretrained(folder / "again")
    keys = safetensors.torch.load_file(folder / "again" / "model.safetensors")
    assert keys.keys() == tiny.llama().state_dict().keys()


def _copies_of_base(folder: Path) -> None:
    """PEFT writes a copy of an adapted embedding beside its weights."""
    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    model.save_pretrained(str(folder / "adapter"), save_embedding_layers=True)
    lk.attach(tiny.llama(), slots=1).load("x", folder / "adapter")


def _some_targets_missing(folder: Path) -> None:
    folders.foreign(folder / "adapter", target_modules=["q_proj", "c_attn"])


def _parent(folder: Path) -> None:
    folders.adapter().save(folder / "adapter" / "one")
    folders.adapter().save(folder / "adapter" / "two")


def _old_peft(folder: Path) -> None:
    """Fields that old versions of PEFT lack are left out where they are at their default."""
    fields = json.loads((folders.adapter().save(folder / "adapter") / CONFIG).read_text())
    new = {"exclude_modules", "lora_bias", "corda_config", "trainable_token_indices", "target_parameters", "eva_config"}
    assert not new & fields.keys()


def _small_vocabulary(folder: Path) -> None:
    fields = {"target_modules": [], "modules_to_save": ["embed_tokens"]}
    path = merging.adapter_folder(folder / "base", folder / "adapter", **fields) / WEIGHTS
    tensors = {key: value[:50].contiguous() for key, value in safetensors.torch.load_file(path).items()}
    (folder / "adapter" / "lora_kit.json").unlink()
    safetensors.torch.save_file(tensors, path)


def _merge(folder: Path) -> None:
    merge(folder / "base", folder / "adapter", folder / "merged")


def _save_checkpoints(folder: Path) -> None:
    for step in (100, 200):
        folders.adapter(seed=step).save(folder / "adapters" / "run" / f"checkpoint-{step}")


def _load_by_name(name: str) -> Act:
    """Return what loads a name with the folder as the working directory."""

    def act(folder: Path) -> None:
        with contextlib.chdir(folder):
            assert lk.Adapter.load(name).digest == folders.adapter(seed=200).digest

    return act


def _publish(folder: Path) -> None:
    """Put an adapter into a cache of the hub, under two revisions of which only one is the adapter."""
    for seed, revision in ((100, "main"), (200, "v2")):
        saved = folders.adapter(seed=seed).save(folder / f"seed-{seed}")
        hub_cache.add_repository(folder / "cache", "org/run", saved, revision=revision)


def _old_experts(folder: Path) -> None:
    """Experts as transformers 4 had them, one matrix each, for a base that has them in one tensor."""
    torch.manual_seed(0)
    merging.base_folder(folder / "experts", legacy_adapters.mixtral().eval())
    legacy_adapters.write(folder / "adapter", legacy_adapters.MIXTRAL, target_modules=["w1", "w2", "w3"])


def _load_old_experts(folder: Path) -> None:
    model = lk.load_base(folder / "experts").model
    before, bank = tiny.logits(model, tiny.batch()), lk.attach(model, slots=1)
    bank.load("old", folder / "adapter")
    bank.use("old")
    change = (tiny.logits(model, tiny.batch()) - before).abs().max()
    assert float(change) > 1e-2, "the experts are as they were"


def _row(
    name: str, make: Act, act: Act, says: str = "", *, error: type[LoraKitError] | None = None, **more: Any
) -> Fault:
    beside = load_with_peft if more.get("command") else None
    return Fault(name=name, make=make, act=act, error=error, says=says, **{"peft": beside, **more})


GENERATE = ("generate", "--base", "base", "--adapter", "adapter", "--prompt", "ab", "--max-new-tokens", "1")
FILES: tuple[Fault, ...] = (
    _row("a classifier of a live PeftModel", no_files, _adopted_classifier, writes=True),
    _row("a classifier of PEFT", no_files, _classifier_of_peft, writes=True),
    _row("an adapter of PEFT", no_files, _same_as_peft(tiny.llama), writes=True),
    _row(
        "modules_to_save by a part of their names",
        no_files,
        _same_as_peft(tiny.llama, modules_to_save=["norm"]),
        writes=True,
    ),
    *(
        _row(
            f"an initialization that keeps the base: {name}",
            no_files,
            _same_as_peft(tiny.llama, init_lora_weights=name),
            writes=True,
        )
        for name in ("orthogonal", "eva")
    ),
    _row(
        "tied layers that PEFT keeps tied",
        no_files,
        _same_as_peft(lambda: tiny.llama(tie=True), modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        writes=True,
    ),
    _row("metadata of null", _null_metadata, load, command=GENERATE),
    _row(
        "a trained head that the config does not name",
        _dropped_head,
        load,
        "lm_head",
        error=AdapterError,
        command=GENERATE,
    ),
    _row(
        "the same, ignored on request",
        _dropped_head,
        lambda folder: load(folder, allow={"extra-keys"}),
        "lm_head",
        command=(*GENERATE, "--allow", "extra-keys"),
    ),
    _row(
        "names of another release of transformers",
        _rename("model.layers", "language_model.model.layers"),
        load,
        "",
        error=AdapterError,
        command=GENERATE,
    ),
    _row(
        "names of another model",
        _rename("model.layers", "transformer.h"),
        load,
        "0 of 2 covered",
        error=AdapterError,
        command=GENERATE,
    ),
    _row("some targets that the model has not", _some_targets_missing, load, "matches c_attn", command=GENERATE),
    _row("a state dict of a live PeftModel", no_files, _wrapped_state(lambda state: state), writes=True),
    _row(
        "a state dict within others",
        no_files,
        _wrapped_state(
            lambda state: {"epoch": 1, "state_dict": {f"module._orig_mod.{k}": v for k, v in state.items()}}
        ),
        writes=True,
    ),
    _row("saved from a compiled model", no_files, _compiled, writes=True),
    _row("a model that is saved with a bank beside it", no_files, _saved_with_bank, writes=True),
    _row("copies of base weights beside an adapted embedding", no_files, _copies_of_base, writes=True),
    _row("a folder of several adapters", _parent, load, "one.*two", error=ConfigError, command=GENERATE),
    _row("a config for older versions of PEFT", no_files, _old_peft, writes=True),
    _row(
        "a vocabulary that is smaller than the tokenizer's",
        _small_vocabulary,
        _merge,
        "token",
        error=MergeError,
        command=("merge", "--base", "base", "--adapter", "adapter", "--out", "merged"),
        peft=None,
    ),
    _row(
        "experts under the names of an older transformers",
        _old_experts,
        _load_old_experts,
        "names of an older transformers",
        command=(*GENERATE[:2], "experts", *GENERATE[3:]),
        peft=None,
    ),
    _row(
        "names of another model, with the command that renames them",
        _rename("model.layers", "transformer.layers"),
        load,
        "--rename transformer=model",
        error=AdapterError,
        command=GENERATE,
    ),
    _row(
        "a checkpoint by its path",
        _save_checkpoints,
        _load_by_name("adapters/run/checkpoint-200"),
        command=(*GENERATE[:4], "adapters/run/checkpoint-200", *GENERATE[5:]),
        peft=None,
    ),
    _row(
        "a checkpoint by the name of its folder in the store",
        _save_checkpoints,
        _load_by_name("run/checkpoint-200"),
        command=(*GENERATE[:4], "run/checkpoint-200", *GENERATE[5:]),
        peft=None,
    ),
    _row(
        "a checkpoint that is not there",
        _save_checkpoints,
        _load_by_name("run/checkpoint-300"),
        "did you mean 'run/checkpoint-",
        error=LoraKitError,
        command=(*GENERATE[:4], "run/checkpoint-300", *GENERATE[5:]),
        peft=None,
    ),
    _row(
        "a revision in the cache of the hub",
        _publish,
        _load_by_name("org/run@v2"),
        command=(*GENERATE[:4], "org/run@v2", *GENERATE[5:]),
        during=hub_cache.use_cache,
        peft=None,
    ),
    _row(
        "a revision that the cache of the hub has not",
        _publish,
        _load_by_name("org/run@v3"),
        "v3",
        error=LoraKitError,
        command=(*GENERATE[:4], "org/run@v3", *GENERATE[5:]),
        during=hub_cache.use_cache,
        peft=None,
    ),
)
