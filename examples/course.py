"""The classic fine-tuning course in one script: each step of docs/course.md, in Python.

python examples/course.py course           # all of it, in the folder course/; about two minutes on two cores
python examples/course.py course files     # only its files: rows, recipes and tiny models
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import transformers
from tiny_models import FAMILIES, write_tiny_model
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import lora_kit as lk
from lora_kit.data.preparation.prepare import prepare
from lora_kit.generation.generate import generate

BASE = "kit-base"  # or a hub id, or a folder
SHORT = {"train.num_train_epochs": 3}
"""Three passes over the rows instead of the prepared recipe's ten."""


def write_files() -> None:
    """Step 0: rows, recipes, and a tiny model of every family."""
    shutil.copytree(Path(__file__).parent / "data", ".", dirs_exist_ok=True)
    for name in FAMILIES:
        write_tiny_model(name, Path("tiny") / name)


def prepare_data() -> None:
    """Step 1: rows examined, split and given a recipe."""
    for name in ("questions", "intents"):
        prepared = prepare(f"{name}.csv", f"data/{name}", base=BASE, test=0.1, replace=True)
        print(f"{name}: {len(prepared.train)} rows to train on -> {prepared.recipe}")


def create_follow_complete(limits: dict[str, Any]) -> None:
    """Step 2: a training is created, followed by a callback, and its result completes a prompt."""

    class Follow(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in (logs or {}):
                print(f"  step {state.global_step} of {state.max_steps}: loss {logs['loss']:.3f}")

    lk.train("data/questions/recipe.yaml", overrides=limits, callbacks=[Follow()], replace=True)
    said = generate(BASE, ["questions"], "What does the kettle cost?")
    print("  completed:", said[0].text.strip())


def classify(limits: dict[str, Any]) -> None:
    """Step 3: labels, with rows held out for validation while it trains and for a test behind it."""
    lk.train("data/intents/recipe.yaml", overrides=SHORT | limits, replace=True)
    tested = lk.evaluate(BASE, ["intents"], "data/intents/test.jsonl", metrics=["accuracy", "f1"])
    print("  test:", tested["intents"].metrics)
    for found in lk.predict(BASE, "intents", ["my lamp is broken, money back please"]):
        print(f"  predicted: {found.label} ({found.probability:.0%})")


def train_gpt2_with_a_trainer(limits: dict[str, Any]) -> None:
    """Step 4: GPT-2, LoRA and the Trainer of transformers, as the course writes them."""
    base = lk.load_base("tiny/gpt2")  # openai-community/gpt2
    config = lk.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["c_attn"])
    bank = lk.attach(base.model, config, name="gpt2")
    rows = [base.tokenizer(text) for text in Path("questions.csv").read_text("utf-8").splitlines()[1:]]
    steps = limits.get("train.max_steps", 20)
    arguments = TrainingArguments(
        "trained", max_steps=steps, learning_rate=1e-3, save_strategy="no", report_to="none", disable_tqdm=True
    )
    collator = DataCollatorForLanguageModeling(base.tokenizer, mlm=False)
    trained = Trainer(base.model, arguments, train_dataset=rows, data_collator=collator).train()
    weights = sum(each.numel() for each in bank.parameters("gpt2"))
    print(f"  training loss {trained.training_loss:.3f}, {weights:,} weights trained")
    bank.save("gpt2", "adapters/gpt2")


def compare_methods(limits: dict[str, Any]) -> None:
    """Step 5: feature extraction (a head alone), LoRA, and every weight."""
    for method, rate in (("features", 1e-2), ("full", 1e-4)):
        changes = {"method": method, "train.learning_rate": rate, "out": f"models/{method}", **SHORT, **limits}
        trained = lk.train("data/intents/recipe.yaml", overrides=changes, replace=True)
        print(f"  {method}: {trained.trainable:,} weights, {trained.after.metrics()}")


def schedule_and_regularize(limits: dict[str, Any]) -> None:
    """Step 6: warm-up, cosine, accumulation, weight decay, dropout, clipping."""
    changes = {
        "train.warmup_steps": 10,
        "train.lr_scheduler_type": "cosine",
        "train.gradient_accumulation_steps": 2,
        "train.weight_decay": 0.01,
        "train.max_grad_norm": 1.0,
        "lora.lora_dropout": 0.1,
        "out": "adapters/cosine",
    }
    print(" ", lk.train("data/intents/recipe.yaml", overrides={**changes, **SHORT, **limits}, replace=True).after)


def search(limits: dict[str, Any]) -> None:
    """Step 7: grid, random and Bayesian search."""
    for method, rates in (("grid", "1e-3,3e-3"), ("random", "1e-4..1e-2:log"), ("tpe", "1e-4..1e-2:log")):
        changes = {"base": BASE, "out": f"adapters/{method}", "train.max_steps": 10, **limits}
        over = {"train.learning_rate": rates}
        report = lk.sweep("labels.yaml", over, overrides={**changes, "data.validation": "data/intents/test.jsonl"},
                          method=method, trials=2, replace=True)  # fmt: skip
        print(f"  {method}: best {report.best.params}, loss {report.best.value:.3f}")


def stop_early(limits: dict[str, Any]) -> None:
    """Step 8: stop when the validation no longer gets better, and keep the best."""
    changes = {
        "train.eval_strategy": "steps",
        "train.eval_steps": 11,
        "train.metric_for_best_model": "accuracy",
        "train.early_stopping_patience": 2,
        "out": "adapters/best",
    }
    report = lk.train("data/intents/recipe.yaml", overrides={**changes, **limits}, replace=True)
    print(f"  stopped after {report.steps} steps; step {report.kept} was the best and is kept")


def measure() -> None:
    """Step 9: perplexity of answers, accuracy of labels, the base beside the adapter."""
    texts = lk.evaluate(BASE, [None, "questions"], "data/questions/validation.jsonl", metrics=["perplexity"])
    labels = lk.evaluate(BASE, ["intents", "cosine", "best"], "data/intents/test.jsonl", metrics=["accuracy"])
    for each in (*texts.results, *labels.results):
        print(f"  {each.name}: {each.metrics}")


def main(folder: Path, only: str = "", **limits: Any) -> None:
    """Run all steps, or the files alone, in a folder; `limits` are recipe keys that every training gets."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    transformers.utils.logging.disable_progress_bar()
    write_files()
    if only == "files":
        return
    prepare_data()
    for step in (create_follow_complete, classify, train_gpt2_with_a_trainer, compare_methods, schedule_and_regularize,
                 search, stop_early):  # fmt: skip
        print(f"\n{(step.__doc__ or '').strip()}", flush=True)
        step(limits)
    print("\nStep 9: perplexity and accuracy")
    measure()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "course"), *sys.argv[2:3])
