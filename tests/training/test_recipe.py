"""Recipes: files, flags, types, and what is refused with the nearest name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest

from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import RecipeError
from lora_kit.training.recipe.load import load_recipe
from lora_kit.training.recipe.recipe import DataSpec, Recipe

LEAST: dict[str, Any] = {"base": "kit-base", "data": "train.jsonl", "out": "adapters/x"}


def written(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_the_least_recipe_is_base_data_and_out() -> None:
    recipe = load_recipe(LEAST)
    assert recipe.data == DataSpec(train="train.jsonl")
    assert (recipe.task, recipe.method, recipe.name, recipe.seed) == ("causal-lm", "lora", "x", 0)
    assert recipe.lora == LoraConfig()
    assert recipe.train["learning_rate"] == 2e-4


def test_yaml_and_toml_say_the_same(tmp_path: Path) -> None:
    yaml = """
base: kit-base
data: {train: a.jsonl, validation: b.jsonl, separator: "\\n\\n"}
method: lora
lora: {r: 16, lora_alpha: 32, target_modules: all-linear}
train: {num_train_epochs: 3, learning_rate: 2e-4, lr_scheduler_type: cosine, eval_strategy: no, bf16: true}
out: adapters/e2e
"""
    toml = """
base = "kit-base"
method = "lora"
out = "adapters/e2e"
[data]
train = "a.jsonl"
validation = "b.jsonl"
separator = "\\n\\n"
[lora]
r = 16
lora_alpha = 32
target_modules = "all-linear"
[train]
num_train_epochs = 3
learning_rate = 2e-4
lr_scheduler_type = "cosine"
eval_strategy = "no"
bf16 = true
"""
    assert load_recipe(written(tmp_path, yaml)) == load_recipe(written(tmp_path, toml, "recipe.toml"))


@pytest.mark.parametrize("number", ["2e-4", "2E-4", "0.0002", ".0002", "2.0e-4", "'2e-4'", "+2e-4"])
def test_a_learning_rate_in_yaml_is_a_number(tmp_path: Path, number: str) -> None:
    text = f"base: kit-base\ndata: a.jsonl\nout: x\ntrain: {{learning_rate: {number}}}\n"
    assert load_recipe(written(tmp_path, text)).train["learning_rate"] == 2e-4


def test_numbers_inside_mappings_are_numbers_too(tmp_path: Path) -> None:
    text = "base: kit-base\ndata: a.jsonl\nout: x\n"
    text += "train: {lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr: 1e-5}}\n"
    text += "lora: {alpha_pattern: {q_proj: 1e1}}\n"
    recipe = load_recipe(written(tmp_path, text))
    assert recipe.train["lr_scheduler_kwargs"] == {"min_lr": 1e-5}
    assert recipe.lora.alpha_pattern == {"q_proj": 10.0}


def test_flags_win_and_are_read_as_the_type_of_their_key() -> None:
    flags = {
        "lora.r": "4",
        "lora.lora_alpha": "1e1",
        "lora.use_rslora": "true",
        "lora.target_modules": "q_proj,v_proj",
        "lora.layers_to_transform": "0,1",
        "train.learning_rate": "1e-3",
        "train.max_steps": "1e2",
        "train.bf16": "false",
        "train.lr_scheduler_type": "cosine_with_restarts",
        "train.lr_scheduler_kwargs": "{num_cycles: 2}",
        "data.max_length": "128",
        "data.validation": "valid.jsonl",
        "out": "elsewhere",
    }
    recipe = load_recipe({**LEAST, "lora": {"r": 16}, "train": {"learning_rate": 5.0}}, overrides=flags)
    assert recipe.lora == LoraConfig(
        r=4, lora_alpha=10.0, use_rslora=True, target_modules=("q_proj", "v_proj"), layers_to_transform=(0, 1)
    )
    assert recipe.train["learning_rate"] == 1e-3
    assert recipe.train["max_steps"] == 100
    assert isinstance(recipe.train["max_steps"], int)
    assert recipe.train["bf16"] is False
    assert recipe.train["lr_scheduler_kwargs"] == {"num_cycles": 2}
    assert recipe.data == DataSpec(train="train.jsonl", validation="valid.jsonl", max_length=128)
    assert recipe.out == "elsewhere"


def test_compile_is_a_word_or_a_flag() -> None:
    assert load_recipe(LEAST).compile is False
    assert load_recipe({**LEAST, "compile": True}).compile is True
    assert load_recipe(LEAST, overrides={"compile": "yes"}).compile is True


def test_a_regular_expression_stays_one() -> None:
    assert load_recipe(LEAST, overrides={"lora.target_modules": ".*_proj"}).lora.target_modules == ".*_proj"
    assert load_recipe(LEAST, overrides={"lora.target_modules": "all-linear"}).lora.target_modules == "all-linear"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metod": "lora"}, "unknown key metod .did you mean 'method'"),
        ({"train": {"learning_rte": 1}}, r"unknown key train.learning_rte .did you mean 'learning_rate'"),
        ({"lora": {"rank": 1}}, "unknown key lora.rank"),
        ({"lora": {"lora_alfa": 1}}, "did you mean 'lora_alpha'"),
        ({"data": {"trian": "a"}}, "did you mean 'train'"),
        ({"data": {"validation": "a"}}, "data.train is missing"),
        ({"train": {"max_steps": "1.5"}}, "train.max_steps must be a whole number; '1.5' was given"),
        ({"train": {"learning_rate": "fast"}}, "must be a finite number"),
        ({"train": {"learning_rate": float("nan")}}, "must be a finite number"),
        ({"train": {"learning_rate": True}}, "must be a finite number"),
        ({"train": {"learning_rate": -1}}, "train.learning_rate must be 0 or more; -1 was given"),
        ({"train": {"per_device_train_batch_size": 0}}, "must be 1 or more; 0 was given"),
        ({"train": {"gradient_accumulation_steps": 0}}, "must be 1 or more; 0 was given"),
        ({"train": {"num_train_epochs": 0}}, "must be above 0; 0 was given"),
        ({"train": {"eval_steps": -1}}, "must be above 0; -1 was given"),
        ({"train": {"dataloader_num_workers": -1}}, "must be 0 or more; -1 was given"),
        ({"train": {"max_steps": 0}}, "train.max_steps must be 1 or more, or -1"),
        ({"train": {"seed": 2**32}}, r"train.seed must be from 0 to below 2\^32"),
        ({"train": {"bf16": "maybe"}}, "must be true or false"),
        ({"train": {"lr_scheduler_type": "cosin"}}, "did you mean 'cosine'"),
        ({"train": {"lr_scheduler_kwargs": {"num_cycles": 2}}}, "unexpected keyword argument 'num_cycles'"),
        ({"train": {"lr_scheduler_type": "cosine_with_min_lr"}}, "train.lr_scheduler_kwargs: One of min_lr"),
        ({"train": {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"min_lr": 1}}}, "takes no arguments"),
        ({"train": {"lr_scheduler_type": "warmup_stable_decay"}}, "train.lr_scheduler_kwargs: .*num_decay_steps"),
        ({"train": {"lr_scheduler_kwargs": "num_cycles"}}, "must be a mapping"),
        ({"train": {"optim_args": "beta1"}}, "must be name=value with commas between; 'beta1' was given"),
        ({"train": {"optim": "sgd", "optim_args": "momentum=fast"}}, "train.optim_args: could not convert"),
        ({"train": {"optim": "sgd", "optim_args": "momentum=-1"}}, "train.optim_args: Invalid momentum"),
        ({"train": {"optim": "galore_adamw"}}, "train.optim: .*galore"),
        ({"train": {"bf16_full_eval": True}}, "in the dtype of the training"),
        ({"train": {"fp16_full_eval": True}}, "in the dtype of the training"),
        ({"train": {"load_best_model_at_end": True, "greater_is_better": True}}, "is true, but a lower loss is better"),
        (
            {"task": "classify", "train": {"metric_for_best_model": "accuracy", "greater_is_better": False}},
            "is false, but a higher accuracy is better",
        ),
        ({"train": {"resume_from_checkpoint": "x"}}, "resumes from its last checkpoint"),
        ({"train": {"output_dir": "x"}}, "the recipe's `out`"),
        ({"train": {"torch_compile": True}}, "the recipe's `compile: true`"),
        ({"compile": "maybe"}, "compile must be true or false"),
        ({"compile": True, "train": {"gradient_checkpointing": True}}, "do not go together"),
        ({"train": {"hub_token": "x"}}, "nothing is uploaded"),
        ({"train": {"eval_strategy": "epoch"}}, "no data.validation"),
        ({"train": {"early_stopping_patience": 2}}, "train.eval_strategy is no"),
        ({"train": {"early_stopping_patience": 0}}, "must be 1 or more evaluations"),
        ({"train": {"early_stopping_patience": 2, "load_best_model_at_end": False}}, "keeps the best adapter"),
        ({"train": {"load_best_model_at_end": True, "metric_for_best_model": "los"}}, "did you mean 'loss'"),
        ({"train": {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}}, "known for causal-lm"),
        ({"train": {"loraplus_lr_ratio": 0}}, "must be above 0"),
        ({"method": "features", "train": {"loraplus_lr_ratio": 16}}, "method features has none"),
        ({"train": 3}, "train must be a mapping"),
        ({"lora": {"r": 0}}, "lora.r must be a whole number from 1"),
        ({"lora": {"r": "x"}}, "lora.r must be a whole number"),
        ({"lora": {"target_modules": "(a"}}, "not a regular expression"),
        ({"task": "token"}, "did you mean 'tokens'"),
        ({"task": "clasify"}, "did you mean 'classify'"),
        ({"method": "peft"}, "peft.peft_type is missing"),
        ({"method": "feature"}, "did you mean 'features'"),
        ({"method": "features", "lora": {"r": 4}}, "trains the head alone"),
        ({"method": "full", "lora": {"r": 4}}, "no lora section"),
        ({"method": "full", "quantize": "nf4"}, "method full cannot train"),
        ({"quantize": "nf5"}, "did you mean 'nf4'"),
        ({"dtype": "f32"}, "did you mean 'fp32'"),
        ({"base": " "}, "must not be empty"),
        ({"out": None}, "out missing"),
        ({"data": {"train": "a", "max_length": 1}}, "at least 2"),
    ],
)
def test_what_is_wrong_is_said(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({**LEAST, **changes})


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("lora.rr", "did you mean 'r'"),
        ("loar.r", "did you mean 'lora'"),
        ("train.", "unknown key train."),
        ("outt", "did you mean 'out'"),
    ],
)
def test_an_unknown_flag_names_the_nearest(flag: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(LEAST, overrides={flag: "1"})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "base: [", "cannot be parsed"),
        ("a.yaml", "- a", "a mapping was expected, found list"),
        ("a.yaml", "base: a\nbase: b", "'base' occurs twice, again in line 2"),
        ("a.yaml", "base: !!python/object/apply:os.system [ls]", "cannot be parsed"),
        ("a.yaml", "1: 2", "not a string"),
        ("a.yaml", "base: &a {b: c}\nout: {<<: *a}", "<< in line 2 is not read"),
        ("a.toml", "base = ", "cannot be parsed"),
        ("a.json", "{}", "is a .yaml, .yml or .toml file"),
    ],
)
def test_a_file_that_is_not_a_recipe_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(written(tmp_path, text, name))


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    written(tmp_path, "base: a")
    with pytest.raises(RecipeError, match=r"no such file .*recipe\.yaml"):
        load_recipe(tmp_path / "recpe.yaml")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "features"},
        {"method": "full", "dtype": "bf16"},
        {"compile": True},
        {"lora": {"r": 4, "rank_pattern": {"q_proj": 2}, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}},
        {"data": {"train": "a", "validation": "ü b", "separator": " -> "}, "train": {"eval_strategy": "steps"}},
    ],
)
def test_a_saved_recipe_is_the_same_recipe(tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe = load_recipe({**LEAST, **changes})
    assert load_recipe(written(tmp_path, recipe.to_yaml())) == recipe
    assert load_recipe(recipe) == recipe


def test_a_recipe_can_be_made_in_python() -> None:
    made = Recipe(base="kit-base", data=DataSpec(train="train.jsonl"), out="adapters/x", lora=LoraConfig(r=4))
    assert made == load_recipe({**LEAST, "lora": {"r": 4}})
    assert made == load_recipe({**LEAST, "lora": LoraConfig(r=4)})


def test_features_trains_the_head_and_nothing_else() -> None:
    recipe = load_recipe({**LEAST, "method": "features"})
    assert recipe.lora.target_modules == ()
    assert recipe.lora.modules_to_save == ("head",)
    named = load_recipe({**LEAST, "method": "features", "lora": {"modules_to_save": ["score"]}})
    assert named.lora.modules_to_save == ("score",)


@pytest.mark.parametrize(
    ("section", "message"),
    [({"adam_beta1": 2}, "beta"), ({"optim": "adamw_torch", "adam_epsilon": -1}, "epsilon")],
)
def test_values_that_no_optimizer_takes_are_found_with_the_recipe(section: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({"base": "kit-base", "data": "rows.jsonl", "out": "adapters/x", "train": section})


UNREAD: list[tuple[dict[str, Any], str]] = [
    ({"optim_args": "beta1=0.9"}, r"adamw_torch does not read beta1 \(train\.adam_beta1\)"),
    ({"optim": "sgd", "optim_args": "momentum=0.9, beta=1"}, "sgd does not read beta"),
    ({"optim": "adafactor", "optim_args": "scale=1"}, "adafactor does not read scale"),
    ({"optim": "sgd", "adam_beta1": 0.8}, r"train\.adam_beta1: sgd does not read it"),
]


@pytest.mark.parametrize(("section", "message"), UNREAD)
def test_arguments_that_the_optimizer_does_not_read_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({**LEAST, "train": section})


@pytest.mark.parametrize(
    "section",
    [
        {"optim": "sgd", "optim_args": "momentum=0.0,nesterov=false"},
        {"optim": "rmsprop", "optim_args": "alpha=0.99, centered=true"},
        {"adam_beta1": 0.9},
        {"optim": "adamw_8bit", "adam_beta2": 0.95},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-5}},
        {"include_num_input_tokens_seen": "non_padding"},
        {"include_num_input_tokens_seen": True},
    ],
)
def test_arguments_that_are_read_are_accepted_also_where_they_are_the_default(section: dict[str, Any]) -> None:
    assert section.items() <= load_recipe({**LEAST, "train": section}).train.items()


CONFLICTS: list[tuple[dict[str, Any], str]] = [
    ({"bf16": True, "fp16": True}, "At most one of fp16 and bf16"),
    ({"include_num_input_tokens_seen": "bogus"}, "must be one of all, non_padding, no; 'bogus' was given"),
    ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 0.5}}, r"lr_end \(0\.5\) must be smaller"),
    ({"lr_scheduler_type": "polynomial", "learning_rate": 1e-8}, "must be smaller than initial lr"),
    ({"lr_scheduler_type": "greedy"}, "greedy requires an eval strategy"),
    ({"dataloader_prefetch_factor": 2}, "prefetch_factor can only be set when"),
    ({"dataloader_persistent_workers": True}, "needs train.dataloader_num_workers"),
    ({"dataloader_multiprocessing_context": "fork"}, "needs train.dataloader_num_workers"),
    ({"label_smoothing_factor": 2.0}, "must be from 0 to below 1"),
    ({"max_steps": -5}, "must be 1 or more, or -1"),
    ({"debug": "bogus"}, "bogus is not a valid DebugOption"),
    ({"log_level": "bogus"}, "train.log_level must be one of"),
    ({"train_sampling_strategy": "bogus"}, "train.train_sampling_strategy must be one of"),
    ({"save_strategy": "best"}, "load_best_model_at_end is not true"),
    (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"bogus": 1}},
        "train.gradient_checkpointing_kwargs: .*unexpected keyword argument 'bogus'",
    ),
    ({"save_steps": 1.5}, "must be an integer if bigger than 1: 1.5"),
    ({"torch_empty_cache_steps": 0}, "must be an integer bigger than 0"),
    ({"accelerator_config": {"bogus": 1}}, "unexpected keyword argument 'bogus'"),
]


@pytest.mark.parametrize(("section", "message"), CONFLICTS)
def test_what_transformers_would_reject_in_the_run_is_found_with_the_recipe(
    section: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({**LEAST, "train": section})


def test_checking_a_recipe_chooses_no_device_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    state: dict[str, Any] = {}
    monkeypatch.setattr(accelerate.PartialState, "_shared_state", state)
    load_recipe({**LEAST, "train": {"bf16": True}})
    assert state == {}


PREPARED: dict[str, Any] = {
    "base": "kit-base",
    "data": {"train": "train.jsonl"},
    "task": "classify",
    "lora": {"r": 16, "lora_alpha": 32},
    "train": {"num_train_epochs": 9, "learning_rate": 2e-3, "head_learning_rate": 2e-2, "loraplus_lr_ratio": 4},
    "out": "adapters/x",
}


@pytest.mark.parametrize(("method", "rate"), [("features", 2e-2), ("full", 5e-5)])
def test_another_method_by_a_flag_drops_the_keys_of_the_first_and_says_so(
    method: str, rate: float, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = load_recipe(PREPARED, overrides={"method": method})
    assert (recipe.method, recipe.train["learning_rate"], recipe.train["num_train_epochs"]) == (method, rate, 9)
    assert "head_learning_rate" not in recipe.train
    [message] = [record.getMessage() for record in caplog.records]
    rates = "train.learning_rate, train.head_learning_rate, train.loraplus_lr_ratio are dropped"
    assert f"method {method} instead of lora: the recipe's lora.r, lora.lora_alpha, {rates}" in message
    assert PREPARED["lora"] == {"r": 16, "lora_alpha": 32}


def test_flags_beside_another_method_are_kept_and_the_same_method_drops_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = load_recipe(PREPARED, overrides={"method": "full", "train.learning_rate": "1e-4"})
    assert recipe.train["learning_rate"] == 1e-4
    caplog.clear()
    assert load_recipe(PREPARED, overrides={"method": "lora"}) == load_recipe(PREPARED)
    assert not caplog.records
    with pytest.raises(RecipeError, match="no lora section"):
        load_recipe({**PREPARED, "method": "full"})
    peft = load_recipe(PREPARED, overrides={"method": "peft", "peft.peft_type": "IA3"})
    assert peft.train["learning_rate"] == 1e-3
