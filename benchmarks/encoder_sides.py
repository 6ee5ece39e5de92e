"""One training of a text classifier, by lora_kit and by peft (or transformers alone): same start, rows and order."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers

import lora_kit as lk

MAX_LENGTH: Final = 64
R: Final = 16
HEAD: Final = "classifier"


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is trained on what.

    Attributes:
        start: folder of the encoder with a head that is random but written down, so that both begin with the same.
        rows: JSONL file in the order in which it is read: `batch` rows are a step.
        labels: their names, in the order of the head's rows.
        method: `features` (the head alone), `lora` or `full`.
        rate, head: learning rates, of everything and of the head; None for the same.
        log: steps between two entries of the log.
    """

    start: Path
    rows: Path
    labels: tuple[str, ...]
    method: str
    rate: float
    head: float | None
    steps: int
    batch: int
    seed: int
    bf16: bool = True
    log: int = 25

    @property
    def arguments(self) -> dict[str, Any]:
        """Names of transformers.TrainingArguments, which are the recipe's names too."""
        return {
            "max_steps": self.steps,
            "per_device_train_batch_size": self.batch,
            "learning_rate": self.rate,
            "lr_scheduler_type": "linear",
            "warmup_steps": max(1, self.steps // 20),
            "weight_decay": 0.0,
            "bf16": self.bf16,
            "train_sampling_strategy": "sequential",
            "logging_steps": self.log,
            "save_strategy": "no",
            "report_to": "none",
            "seed": self.seed,
        }

    @property
    def label2id(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.labels)}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training came to: elements trained, seconds of its loop by the clock and of the CPU, losses as logged."""

    trainable: int
    seconds: float
    cpu_seconds: float
    losses: tuple[float, ...]


class Watch(transformers.TrainerCallback):
    """Times the loop of a training, the same way whoever runs it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter(), time.process_time()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds, self.cpu_seconds = time.perf_counter() - self._began[0], time.process_time() - self._began[1]


# lora_kit


def ours(task: Training, out: Path) -> Trained:
    """Train by a recipe; the adapter, or the model, is in `out` afterwards."""
    recipe: dict[str, Any] = {
        "base": str(task.start),
        "data": {"train": str(task.rows), "max_length": MAX_LENGTH},
        "task": "classify",
        "method": task.method,
        "dtype": "fp32",
        "train": {**task.arguments, **({} if task.head is None else {"head_learning_rate": task.head})},
        "out": str(out),
    }
    if task.method == "lora":
        recipe["lora"] = {"r": R, "lora_alpha": 2 * R, "target_modules": "all-linear"}
    watch = Watch()
    report = lk.train(recipe, replace=True, callbacks=[watch])
    losses = tuple(entry["loss"] for entry in report.history if "loss" in entry)
    return Trained(trainable=report.trainable, seconds=watch.seconds, cpu_seconds=watch.cpu_seconds, losses=losses)


def our_accuracy(task: Training, out: Path, test: Path) -> float:
    """Of what `ours` saved, loaded again."""
    if task.method == "full":
        base = lk.load_base(out, task="classify", label2id=task.label2id)
        return accuracy(base.model, base.tokenizer, test, task.label2id)
    base = lk.load_base(task.start, task="classify", label2id=task.label2id, dtype="fp32")
    bank = lk.attach(base.model, slots=1)
    bank.load("trained", out)
    with bank.using("trained"):
        return accuracy(base.model, base.tokenizer, test, task.label2id)


# peft, and transformers alone where peft has nothing to do


def theirs(task: Training, out: Path) -> Trained:
    """The same by transformers.Trainer: of a PeftModel, of a model frozen below its head, of a model as it is."""
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(task.start, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(task.start)
    if task.method == "lora":
        model = with_peft(model, task)
    elif task.method == "features":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(HEAD))
    watch = Watch()
    with tempfile.TemporaryDirectory() as scratch:
        args = transformers.TrainingArguments(output_dir=scratch, use_cpu=True, **task.arguments)
        trainer = transformers.Trainer(
            model=model,
            args=args,
            optimizers=(None if task.head is None else with_two_rates(model, args, task.head), None),
            train_dataset=list(encoded(task, tokenizer)),
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            callbacks=[watch],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.remove_callback(transformers.ProgressCallback)
        trainer.train()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return Trained(
        trainable=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        seconds=watch.seconds,
        cpu_seconds=watch.cpu_seconds,
        losses=tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry),
    )


def with_two_rates(model: Any, args: transformers.TrainingArguments, head: float) -> torch.optim.Optimizer:
    """The optimizer that transformers.Trainer would make (there is no weight decay), the head in a group of its own."""
    kind, settings = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    of_head = [parameter for name, parameter in trained if HEAD in name.split(".")]
    others = [parameter for name, parameter in trained if HEAD not in name.split(".")]
    made: torch.optim.Optimizer = kind([{"params": others}, {"params": of_head, "lr": head}], **settings)
    return made


def with_peft(model: Any, task: Training) -> Any:
    """A PeftModel that begins with the A and B that lora_kit begins with."""
    import peft

    config = peft.LoraConfig(r=R, lora_alpha=2 * R, target_modules="all-linear", task_type="SEQ_CLS")
    made = peft.get_peft_model(model, config)
    peft.set_peft_model_state_dict(made, dict(initial_adapter(task)))
    return made


def initial_adapter(task: Training) -> Mapping[str, torch.Tensor]:
    """The tensors of a new adapter, under PEFT's keys."""
    base = lk.load_base(task.start, task="classify", label2id=task.label2id, dtype="fp32")
    transformers.set_seed(task.seed)
    config = lk.LoraConfig(r=R, lora_alpha=2 * R, target_modules="all-linear", modules_to_save=(HEAD,))
    return lk.attach(base.model, config, name="initial").snapshot("initial").tensors


def encoded(task: Training, tokenizer: Any) -> Iterator[dict[str, Any]]:
    for row in read(task.rows):
        given = tokenizer(row["text"], truncation=True, max_length=MAX_LENGTH)
        yield {**given, "labels": task.label2id[str(row["label"])]}


def their_accuracy(task: Training, out: Path, test: Path) -> float:
    """Of what `theirs` saved, loaded again."""
    kind = transformers.AutoModelForSequenceClassification
    tokenizer = transformers.AutoTokenizer.from_pretrained(task.start)
    if task.method != "lora":
        return accuracy(kind.from_pretrained(out, dtype=torch.float32), tokenizer, test, task.label2id)
    import peft

    base = kind.from_pretrained(task.start, dtype=torch.float32)
    return accuracy(peft.PeftModel.from_pretrained(base, str(out)), tokenizer, test, task.label2id)


# Both


def accuracy(model: Any, tokenizer: Any, file: Path, label2id: Mapping[str, int], *, batch: int = 64) -> float:
    """Share of rows whose likeliest label is right, in fp32, by code that is neither library's trainer."""
    rows = sorted(read(file), key=lambda row: len(row["text"]))
    model.eval()
    right = 0
    with torch.inference_mode():
        for start in range(0, len(rows), batch):
            chosen = rows[start : start + batch]
            texts = [row["text"] for row in chosen]
            given = tokenizer(texts, truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt")
            wanted = torch.tensor([label2id[str(row["label"])] for row in chosen])
            right += int((model(**given).logits.argmax(-1) == wanted).sum())
    return right / len(rows)


def read(file: Path) -> list[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def start_of(encoder: Path, labels: Sequence[str], folder: Path, *, dropout: float | None = None) -> Path:
    """The encoder with a new head, written to a folder; with another dropout where one is given."""
    label2id = {name: number for number, name in enumerate(labels)}
    base = lk.load_base(encoder, task="classify", label2id=label2id, dtype="fp32")
    if dropout is not None:
        base.model.config.hidden_dropout_prob = base.model.config.attention_probs_dropout_prob = dropout
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder
