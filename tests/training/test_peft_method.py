"""`method: peft`: every type that PEFT has is trained, kept and saved as PEFT reads it, or refused by name."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, PeftType
from safetensors.torch import load_file

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.inspect import inspect
from lora_kit.adapter.store import list_adapters
from lora_kit.bank.attach import attach
from lora_kit.cli.main import main
from lora_kit.data.batches import Collator
from lora_kit.data.encode import encode
from lora_kit.data.rows import read_rows
from lora_kit.errors import ConfigError, LoraKitError, RecipeError, StorageError
from lora_kit.evaluation.measure import measure
from lora_kit.generation.decoding import Sampling, generate_batch
from lora_kit.generation.prompts import EncodedPrompt
from lora_kit.merging.merge import merge
from lora_kit.sweeps.space import check_values, parse_space
from lora_kit.training.job.job import Job
from lora_kit.training.job.methods import make_job_trainable
from lora_kit.training.plan.plan import plan
from lora_kit.training.recipe.load import load_recipe
from lora_kit.training.recipe.peft_config import UNSUPPORTED_TYPES
from lora_kit.training.recipe.portable_recipe import make_recipe_portable
from lora_kit.training.results import TrainReport
from lora_kit.training.train import train
from tests.support import texts
from tests.support.interrupted import SignalAt, die_at, killed, long_recipe, results, unbroken
from tests.support.long_runs import take_few
from tests.support.memory import narrow
from tests.support.sequences import both
from tests.support.training import LABELED, PAIRS, At, base_of, recipe_of, same_state, state

LEAST: dict[str, Any] = {"base": "kit-base", "data": "train.jsonl", "out": "adapters/x", "method": "peft"}
PROMPT: dict[str, Any] = {"num_virtual_tokens": 4}
SECTIONS: dict[str, dict[str, Any]] = {
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "C3A": {"block_size": 16},
    "CARTRIDGE": PROMPT,
    "FOURIERFT": {"n_frequency": 50},
    "LOHA": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "MISS": {"r": 4},
    "PREFIX_TUNING": PROMPT,
    "PROMPT_TUNING": PROMPT,
    "PSOFT": {"r": 4},
    "P_TUNING": {**PROMPT, "encoder_hidden_size": 16},
    "ROAD": {"group_size": 4},
    "SHADOW": {"auxiliary_loss_weight": 0},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"token_indices": list(range(40))},
    "VBLORA": {"vector_length": 16, "num_vectors": 16},
    "WAVEFT": {"n_frequency": 100},
}
"""What a tiny Llama needs where PEFT's defaults are for larger models."""
MISSING_PACKAGE = {"ADAMSS": "scikit-learn"}
TRAINED = sorted(kind.value for kind in PeftType if kind.value not in {*UNSUPPORTED_TYPES, *MISSING_PACKAGE})


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def section_of(kind: str) -> dict[str, Any]:
    return {"peft_type": kind, **SECTIONS.get(kind, {})}


def trained(folder: Path, kind: str = "LOHA", **changes: Any) -> TrainReport:
    base = changes.pop("base", None) or base_of()
    callbacks = changes.pop("callbacks", ())
    section = {**section_of(kind), **changes.pop("peft", {})}
    return train(recipe_of(folder, method="peft", peft=section, **changes), base=base, callbacks=callbacks)


def loss_by_peft(report: TrainReport, kind: str = "llama") -> float:
    """The loss over the validation rows of a model that PEFT alone has put together, a row at a time."""
    base, data = base_of(kind), report.recipe.data
    model: Any = PeftModel.from_pretrained(base.model, str(report.out)).eval()
    samples = encode(read_rows(str(data.validation)), base.tokenizer, max_length=int(data.max_length or 0))
    total = 0.0
    for place in range(len(samples)):
        row = {name: tensor[None] for name, tensor in samples[place].items()}
        ids, labels = row["input_ids"], row["labels"]
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] :]
        total += float(torch.nn.functional.cross_entropy(logits[:-1], labels[0, 1:], reduction="sum"))
    return total / samples.num_labels


# Every type


@pytest.mark.parametrize("kind", take_few(TRAINED, *list(TRAINED)[::3]))
def test_a_type_learns_changes_its_own_parameters_alone_and_is_what_peft_loads(tmp_path: Path, kind: str) -> None:
    base = base_of()
    before = state(base.model)
    seen: dict[str, dict[str, torch.Tensor]] = {}

    def remember(model: Any) -> None:
        seen[str(len(seen))] = {
            name: tensor.detach().clone()
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
            if not tensor.requires_grad
        }

    report = trained(tmp_path, kind, base=base, steps=8, callbacks=[At(1, remember), At(8, remember)])
    assert report.before is not None
    assert report.after is not None
    assert report.after.loss < report.before.loss - 1e-4
    assert seen["0"].keys() == seen["1"].keys()
    assert all(torch.equal(seen["0"][name], seen["1"][name]) for name in seen["0"])
    assert same_state(base.model, before)
    assert loss_by_peft(report) == pytest.approx(report.after.loss, abs=1e-5)
    record = json.loads((report.out / "lora_kit.json").read_text())
    assert (record["method"], record["peft_type"], record["digest"]) == ("peft", kind, report.digest)


@pytest.mark.parametrize("kind", sorted(UNSUPPORTED_TYPES))
def test_a_type_that_cannot_be_trained_is_refused_by_name(kind: str) -> None:
    with pytest.raises(RecipeError, match=f"peft.peft_type {kind} cannot be trained by a recipe: it"):
        load_recipe({**LEAST, "peft": {"peft_type": kind}})


def test_a_type_whose_package_is_missing_says_so() -> None:
    for kind, package in MISSING_PACKAGE.items():
        with pytest.raises(RecipeError, match=f"{kind}: {package} is required"):
            load_recipe({**LEAST, "peft": {"peft_type": kind}})


VARIANTS: dict[str, dict[str, Any]] = {
    "tokens that invoke it": {"alora_invocation_tokens": [67]},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica", "lora_alpha": 32},
    "bias": {"lora_bias": True},
    "layers twice": {"layer_replication": [[0, 2], [1, 2]]},
    "blocks": {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["o_proj"], "nblocks": 2},
               "target_modules": ["q_proj", "o_proj"]},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_lora_that_a_bank_refuses_are_trained_too(tmp_path: Path, variant: str) -> None:
    base = base_of()
    before = state(base.model)
    report = trained(tmp_path, "LORA", base=base, steps=8, peft=VARIANTS[variant])
    assert report.before is not None
    assert report.after is not None
    assert report.after.loss < report.before.loss - 0.01
    assert same_state(base.model, before)
    assert loss_by_peft(report) == pytest.approx(report.after.loss, abs=1e-5)


def test_a_lora_that_a_bank_knows_is_loaded_by_it_as_well(tmp_path: Path) -> None:
    base = base_of()
    report = trained(tmp_path, "LORA", base=base, peft={"r": 4, "target_modules": "q_proj"})
    bank = attach(base.model)
    assert bank.load("x", report.out)
    bank.use("x")
    samples = encode(read_rows(tmp_path / "rows.jsonl"), base.tokenizer, max_length=64)
    assert report.after is not None
    assert measure(base.model, samples, Collator(texts.PAD)).loss == pytest.approx(report.after.loss, abs=1e-5)
    assert Adapter.load(report.out).digest == report.digest
    assert "A bank of lora_kit loads it as well" in (report.out / "README.md").read_text()


# What is refused before any work


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "peft.peft_type is missing"),
        ({"peft_type": "LOAH"}, "peft.peft_type 'LOAH' is not known"),
        ({"peft_type": 3}, "peft.peft_type 3 is not known"),
        ({"peft_type": "LOHA", "alfa": 3}, "unknown key peft.alfa .did you mean 'alpha'"),
        ({"peft_type": "LOHA", "r": 3.5}, "peft.r must be a whole number; 3.5"),
        ({"peft_type": "LOHA", "r": True}, "peft.r must be a whole number; True"),
        ({"peft_type": "LOHA", "r": 3_000_000}, "peft.r must be at most 65,536; 3,000,000"),
        ({"peft_type": "LOHA", "target_modules": [1]}, r"peft.target_modules\[0\] must be a string; 1"),
        ({"peft_type": "LOHA", "rank_pattern": 4}, "peft.rank_pattern must be a mapping; 4"),
        ({"peft_type": "LOHA", "task_type": "SEQ_CLS"}, "peft.task_type cannot be set .the recipe's task decides"),
        ({"peft_type": "LORA", "megatron_core": "os"}, "peft.megatron_core cannot be set .nothing is imported by name"),
        ({"peft_type": "C3A", "init_weights": "gausian"}, "'gausian' is not known .did you mean 'gaussian'"),
        ({"peft_type": "OSF", "target_svd_config": {"q": "x"}}, "peft.target_svd_config.q must be a whole number"),
        ({"peft_type": "LORA", "use_bdlora": {"nblock": 2}}, "unknown key peft.use_bdlora.nblock .did you mean"),
        ({"peft_type": "LORA", "layer_replication": [[0, 1, 2]]}, r"peft.layer_replication\[0\] must have 2 items"),
        ({"peft_type": "LORA", "init_lora_weights": "corda"}, "'corda' cannot be trained by a recipe: it needs a pass"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa_niter_4"}, "'pissa' cannot be .*; method lora does it"),
        ({"peft_type": "LORA", "kasa_config": {}}, "peft.kasa_config cannot be trained by a recipe: it changes the"),
        ({"peft_type": "LORA", "monteclora_config": {}}, "peft.monteclora_config cannot be .* its loss has an add"),
        ({"peft_type": "LORA", "velora_config": {}}, "peft.velora_config cannot be .* it keeps state"),
        ({"peft_type": "PVERA", "generator_seed": 1}, "peft.generator_seed cannot be .* it keeps state"),
        ({"peft_type": "SHADOW"}, "SHADOW: its loss has an additional term.*auxiliary_loss_weight: 0"),
        ({"peft_type": "PROMPT_TUNING"}, "peft.num_virtual_tokens must be a whole number from 1; None"),
        ({"peft_type": "PROMPT_TUNING", **PROMPT, "prompt_tuning_init": "TEXT"}, "tokenizer_name_or_path can't be"),
    ],
)  # fmt: skip
def test_a_section_that_is_wrong_is_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({**LEAST, "peft": section})


LOHA = {"peft_type": "LOHA"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft": LOHA, "lora": {"r": 8}}, "method peft has no lora section"),
        ({"peft": LOHA, "method": "lora"}, "method lora has no peft section .use method peft"),
        ({"peft": LOHA, "method": "full"}, "method full has no peft section"),
        ({"peft": LOHA, "compile": True}, "compile is not for method peft"),
        ({"peft": LOHA, "train": {"loraplus_lr_ratio": 2}}, "loraplus_lr_ratio is for lora_A and lora_B; method peft"),
        ({"peft": {"peft_type": "PROMPT_TUNING", **PROMPT}, "data": {"train": "a", "packing": True}},
         "PROMPT_TUNING puts its virtual tokens before a whole row, so data.packing must be false"),
        ({"peft": {"peft_type": "PREFIX_TUNING", **PROMPT}, "train": {"gradient_checkpointing": True}},
         "PREFIX_TUNING needs the key-value cache, which is off with gradient checkpointing"),
        ({"peft": {"peft_type": "LORA", "alora_invocation_tokens": [3]}, "data": {"train": "a", "packing": True}},
         "peft.alora_invocation_tokens counts from the end of a row"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({**LEAST, **changes})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"peft_type": "LOHA", "target_modules": "nowhere"}, "peft: LOHA does not work with tiny: .*nowhere"),
        ({"peft_type": "C3A", "block_size": 7, "target_modules": "q_proj"}, "block size should be a factor"),
        ({"peft_type": "LOHA", "r": 0, "target_modules": "q_proj"}, "peft: LOHA does not work with tiny"),
        (
            {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 63},
            "num_virtual_tokens is 63; the context of tiny is 64",
        ),
    ],
)
def test_what_does_not_fit_the_base_is_refused_and_nothing_is_written(
    tmp_path: Path, section: dict[str, Any], message: str
) -> None:
    base = base_of()
    before = state(base.model)
    recipe = recipe_of(tmp_path, method="peft", peft=section)
    with pytest.raises(RecipeError, match=message):
        train(recipe, base=base)
    assert same_state(base.model, before)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_flags_and_words_are_read_as_the_type_of_their_field() -> None:
    flags = {"peft.r": "4", "peft.target_modules": "q_proj,v_proj", "peft.layers_to_transform": "0,1"}
    recipe = load_recipe({**LEAST, "peft": {"peft_type": "loha"}}, overrides=flags)
    wanted = {"peft_type": "LOHA", "r": 4, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 1]}
    assert dict(recipe.peft) == wanted
    assert recipe.train["learning_rate"] == 1e-3
    assert load_recipe(recipe.to_dict()) == recipe
    assert "lora" not in recipe.to_dict()
    expression = {"peft_type": "LOHA", "target_modules": ".*[qv]_proj"}
    assert load_recipe({**LEAST, "peft": expression}).peft["target_modules"] == ".*[qv]_proj"
    assert "peft" not in load_recipe({**LEAST, "method": "lora"}).to_dict()


def test_a_sweep_goes_over_the_fields_of_the_type() -> None:
    fields = {**LEAST, "peft": LOHA}
    check_values(parse_space({"peft.r": [2, 4]}), fields)
    with pytest.raises(RecipeError, match=r"unknown key peft\.rank .did you mean 'r'"):
        check_values(parse_space({"peft.rank": [2]}), fields)


# As other methods do


def test_the_result_says_how_it_came_to_be_and_how_it_is_loaded(tmp_path: Path) -> None:
    base = base_of()
    found = plan(recipe_of(tmp_path, method="peft", peft=section_of("LOHA")), base=base)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    report = trained(tmp_path, base=base)
    assert (found.trainable, found.parameters) == (report.trainable, report.parameters)
    assert {kind.name: kind.modules for kind in found.kinds} == {"q_proj": 2, "v_proj": 2}
    assert sum(kind.parameters for kind in found.kinds) == found.trainable
    assert found.steps.steps == report.steps
    assert {path.name for path in report.out.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "lora_kit.json", "README.md", "recipe.yaml",
        "metrics.jsonl", "report.html"}  # fmt: skip
    record = json.loads((report.out / "lora_kit.json").read_text())
    assert record["base"] == base.fingerprint()
    assert record["recipe"]["peft"] == section_of("LOHA")
    assert report.after is not None
    assert record["metrics"]["loss"] == report.after.loss
    assert load_recipe(report.out / "recipe.yaml") == make_recipe_portable(report.recipe)
    card, page = (report.out / "README.md").read_text(), (report.out / "report.html").read_text()
    assert "PeftModel.from_pretrained(base.model, 'path/to/out')" in card
    assert "bank does not load it" in card
    assert "PeftModel.from_pretrained(base.model" in page
    assert "bank.load" not in page


def test_the_same_recipe_gives_the_same_folder(tmp_path: Path) -> None:
    names = ["v_proj", "q_proj", "up_proj", "o_proj", "k_proj", "gate_proj", "down_proj"]
    made = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        base = base_of()
        torch.manual_seed(len(made))  # making the base has set it
        made.append(trained(tmp_path, base=base, out=str(folder / "same"), peft={"target_modules": names}))
    first, second = made
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        assert (first.out / name).read_bytes() == (second.out / name).read_bytes()
    config = json.loads((first.out / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(names)  # which PEFT has as a set
    assert (config["peft_type"], config["task_type"], config["base_model_name_or_path"]) == (
        "LOHA",
        "CAUSAL_LM",
        "tiny",
    )
    assert config["inference_mode"] is True


RESUMED: dict[str, dict[str, Any]] = {
    "LOHA": {"module_dropout": 0.3},
    "PROMPT_TUNING": {},
    "LORA": {"lora_dropout": 0.2, "lora_bias": True},
    "SHIRA": {},
    "RANDLORA": {"randlora_dropout": 0.2},
}


@pytest.mark.parametrize("kind", take_few(RESUMED, "LOHA", "PROMPT_TUNING"))
def test_killed_and_started_again_it_ends_with_the_same_bytes_and_log(tmp_path: Path, kind: str) -> None:
    section = {**section_of(kind), **RESUMED[kind]}
    recipe = long_recipe(tmp_path, method="peft", lora=None, peft=section)
    expected = unbroken(recipe)
    killed(recipe, die_at(5))
    report = train(recipe, base=base_of())
    assert report.resumed == 4
    assert results(report.out) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.jsonl", "unbroken"]


def test_a_changed_section_is_refused_with_the_difference(tmp_path: Path) -> None:
    recipe = long_recipe(tmp_path, method="peft", lora=None, peft=section_of("LOHA"))
    killed(recipe, die_at(5))
    with pytest.raises(RecipeError, match=r"peft\.r was 4, is 8"):
        train({**recipe, "peft": {**section_of("LOHA"), "r": 8}}, base=base_of())
    assert train(recipe, base=base_of()).resumed == 4


def test_a_signal_stops_it_with_a_checkpoint(tmp_path: Path) -> None:
    recipe = long_recipe(tmp_path, method="peft", lora=None, peft=section_of("LOHA"))
    expected = unbroken(recipe)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, base=base_of(), callbacks=[SignalAt(2, signal.SIGINT)])
    report = train(recipe, base=base_of())
    assert report.resumed == 3
    assert results(report.out) == expected


def test_the_best_evaluation_is_kept(tmp_path: Path) -> None:
    section = {"eval_strategy": "steps", "eval_steps": 1, "early_stopping_patience": 2, "learning_rate": 3.0}
    report = trained(tmp_path, steps=20, train=section)
    assert report.steps < 20
    losses = {entry["step"]: entry["eval_loss"] for entry in report.history if "eval_loss" in entry and entry["step"]}
    assert report.kept == min(losses, key=losses.__getitem__)
    assert report.after is not None
    assert loss_by_peft(report) == pytest.approx(report.after.loss, abs=1e-4)


def test_where_memory_runs_out_the_micro_batch_halves(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, method="peft", peft=section_of("LOHA"))
    report = train(recipe, base=narrow("llama", 2)())
    assert report.micro_batch == 2
    half = {**recipe["train"], "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    other = train({**recipe, "train": half, "out": str(tmp_path / "half")}, base=base_of())
    assert report.digest == other.digest


@pytest.mark.parametrize("kind", ["LORA", "P_TUNING"])
def test_a_head_is_trained_and_saved_with_it(tmp_path: Path, kind: str) -> None:
    base = base_of("bert", labels=2)
    section = {**section_of(kind), **({"target_modules": "query,key,value,dense"} if kind == "LORA" else {})}
    recipe = recipe_of(tmp_path, rows=LABELED, steps=30, task="classify", method="peft", peft=section)
    report = train(recipe, base=base)
    assert report.after is not None
    if kind == "LORA":  # which a model of this size learns these labels by
        assert report.after.loss < 0.5
    saved = load_file(report.out / "adapter_model.safetensors")
    (head,) = [tensor for name, tensor in saved.items() if name.endswith("classifier.weight")]
    assert (head - base.model.classifier.weight).abs().max() > 0.01
    assert report.recipe.peft["modules_to_save"] == ["classifier"]
    again = base_of("bert", labels=2)
    model: Any = PeftModel.from_pretrained(again.model, str(report.out))
    samples = encode(
        read_rows(tmp_path / "rows.jsonl"), base.tokenizer, max_length=60, label2id={"no": 0, "yes": 1}, task="classify"
    )
    assert measure(model, samples, Collator(texts.PAD)).loss == pytest.approx(report.after.loss, abs=1e-5)
    assert json.loads((report.out / "lora_kit.json").read_text())["labels"] == ["no", "yes"]


def test_a_type_that_saves_no_head_is_refused_for_a_task_with_one(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, rows=LABELED, task="classify", method="peft", peft=section_of("TRAINABLE_TOKENS"))
    with pytest.raises(RecipeError, match="task classify trains a head, which TRAINABLE_TOKENS does not save"):
        train(recipe, base=base_of("bert", labels=2))


@pytest.mark.parametrize("kind", ["LOHA", "PROMPT_TUNING", "PREFIX_TUNING"])
def test_an_encoder_with_a_decoder_learns(tmp_path: Path, kind: str) -> None:
    section = {**section_of(kind), **({"target_modules": ["q", "v"]} if kind == "LOHA" else {})}
    recipe = recipe_of(tmp_path, rows=PAIRS, steps=8, task="seq2seq", method="peft", peft=section)
    report = train(recipe, base=both())
    assert report.before is not None
    assert report.after is not None
    assert report.after.loss < report.before.loss - 1e-3


def test_on_a_quantized_base_it_is_trained_or_refused_with_what_may_be_wrong(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    texts.tokenizer().save_pretrained(tmp_path / "base")
    recipe = {**recipe_of(tmp_path, method="peft", steps=8), "base": str(tmp_path / "base"), "quantize": "nf4"}
    report = train({**recipe, "peft": section_of("IA3")})
    assert report.before is not None
    assert report.after is not None
    assert report.after.loss < report.before.loss - 1e-3
    with pytest.raises(RecipeError, match=r"LOHA does not work with .*not every type works on quantized weights"):
        train({**recipe, "peft": section_of("LOHA"), "out": str(tmp_path / "other")})


def test_a_base_in_16_bits_trains_what_peft_keeps_in_32(tmp_path: Path) -> None:
    report = trained(tmp_path, base=base_of(dtype=torch.bfloat16), steps=8)
    assert report.before is not None
    assert report.after is not None
    assert report.after.loss < report.before.loss - 1e-3
    saved = load_file(report.out / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


# The head, and tokens before the text


def test_the_loss_is_taken_in_chunks_where_the_head_gets_the_positions_of_the_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = {}
    for kind, changes in (("LOHA", {}), ("PREFIX_TUNING", {}), ("PROMPT_TUNING", {}),
                          ("IA3", {"target_modules": ["lm_head"], "feedforward_modules": []})):  # fmt: skip
        caplog.clear()
        with caplog.at_level("INFO", logger="lora_kit.training.loop.trainer"):
            trained(tmp_path, kind, peft=changes, out=str(tmp_path / kind), steps=1)
        told[kind] = "in chunks" in caplog.text
    assert told == {"LOHA": True, "PREFIX_TUNING": True, "PROMPT_TUNING": False, "IA3": False}


def test_the_loss_of_a_step_is_that_of_the_labels_behind_the_virtual_tokens(tmp_path: Path) -> None:
    """PEFT's own loss is the mean over the labels, which it puts behind its tokens."""
    from peft import PromptTuningConfig, get_peft_model

    report = trained(tmp_path, "PROMPT_TUNING", steps=1, train={"per_device_train_batch_size": 5, "logging_steps": 1})
    base = base_of()
    transformers.set_seed(0)
    model: Any = get_peft_model(base.model, PromptTuningConfig(task_type="CAUSAL_LM", **PROMPT))
    samples = encode(read_rows(tmp_path / "rows.jsonl"), base.tokenizer, max_length=60)
    batch = Collator(texts.PAD)([samples[place] for place in range(len(samples))])
    assert report.train_loss == pytest.approx(float(model(**batch).loss), abs=1e-5)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_what_is_written_after_a_prompt_does_not_depend_on_its_neighbors(tmp_path: Path, kind: str) -> None:
    recipe = recipe_of(tmp_path, method="peft", peft=section_of(kind))
    job = Job.open(load_recipe(recipe), base_of())
    with make_job_trainable(job) as ready:
        model = ready.job.base.model
        for tensor in model.parameters():
            tensor.data.mul_(3)
        for tensor in model.prompt_encoder.parameters():
            torch.nn.init.normal_(tensor)
        rows = [EncodedPrompt("", ids, frozenset({texts.EOS})) for ids in ([5, 6, 7], list(range(8, 20)), [20])]
        model.eval()
        together = generate_batch(ready.job.base, rows, sampling=Sampling(), limit=6)
        for row, found in zip(rows, together, strict=True):
            ids = list(row.ids)
            while len(ids) < len(row.ids) + 6 and ids[-1] != texts.EOS:
                given = torch.tensor([ids])
                with torch.no_grad():
                    ids.append(
                        int(model(input_ids=given, attention_mask=torch.ones_like(given)).logits[0, -1].argmax())
                    )
            assert found.ids == ids[len(row.ids) :]


# What the rest of the toolkit says of it


def test_a_bank_a_merge_and_the_store_say_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = trained(tmp_path, out=str(tmp_path / "store" / "x"), steps=1)
    base = base_of()
    what = "peft_type is 'LOHA': only LORA adapters are read; this one was trained by `method: peft`"
    with pytest.raises(ConfigError, match=what) as refused:
        attach(base.model).load("x", report.out)
    assert "peft.PeftModel.from_pretrained loads it" in refused.value.hint
    with pytest.raises(ConfigError, match=what):
        inspect(report.out)
    base.model.save_pretrained(tmp_path / "base")
    with pytest.raises(LoraKitError, match=what):
        merge(tmp_path / "base", report.out, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    (line,) = list_adapters(tmp_path / "store")
    assert what in line.problem
    for verb in (["eval", str(tmp_path / "rows.jsonl")], ["generate", "--prompt", "x"]):
        assert main([*verb, "--base", str(tmp_path / "base"), "--adapter", str(report.out)]) == 2
        assert "this one was trained by `method: peft`" in capsys.readouterr().err


def test_an_earlier_result_is_replaced_only_when_asked(tmp_path: Path) -> None:
    first = trained(tmp_path, steps=1)
    kept = {path.name: path.read_bytes() for path in first.out.iterdir()}
    with pytest.raises(StorageError, match="exists already"):
        trained(tmp_path, steps=2)
    assert {path.name: path.read_bytes() for path in first.out.iterdir()} == kept
    recipe = recipe_of(tmp_path, method="peft", peft=section_of("IA3"), steps=1)
    report = train(recipe, base=base_of(), replace=True)
    assert json.loads((report.out / "adapter_config.json").read_text())["peft_type"] == "IA3"
