"""What does it save to compute the frozen layers below the trained ones once, and does it change the result?

A pretrained encoder learns banking77 with the head alone, and with LoRA on its top layer or its top two: by lora_kit
with frozen layers computed in every step and once, and by transformers.Trainer with PEFT. What is compared is the CPU
time of an epoch after the first, the accuracy on test rows, and the weights with and without.

    python -m benchmarks.frozen_prefix --data FOLDER --encoder FOLDER    # banking77/train.jsonl, test.jsonl
    … --only "LoRA, top layer"                                           # one row, beside those measured earlier
    python -m benchmarks.frozen_prefix --table                           # README.md from the result
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import transformers

import lora_kit as lk
from benchmarks.encoder_sides import HEAD, accuracy, read, start_of
from benchmarks.harness import README, fill, quiet, table, write
from benchmarks.harness import read as read_result

NAME: Final = "frozen_prefix"
SETTINGS: Final[Mapping[str, int]] = {"head alone": 0, "LoRA, top layer": 1, "LoRA, top two layers": 2}
"""Number of layers with adapters, from the top."""
RANK, BATCH, MAX_LENGTH, EPOCHS = 8, 32, 64, 4
CASES: Final = ("every step", "once", "peft")


class EpochTimes(transformers.TrainerCallback):
    """Records the CPU time of each epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.process_time()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time() - self._began)


def train_arguments(layers: int) -> dict[str, Any]:
    return {
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-3 if layers else 1e-2,
        "lr_scheduler_type": "linear",
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1000,
        "seed": 0,
    }


def lora_fields(layers: int, total: int) -> dict[str, Any]:
    top = list(range(total - layers, total))
    return {
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": ["query", "key", "value", "dense"],
        "layers_to_transform": top,
    }


def run_ours(start: Path, rows: Path, layers: int, total: int, out: Path, *, cache: str) -> dict[str, Any]:
    recipe: dict[str, Any] = {
        "base": str(start),
        "data": {"train": str(rows), "max_length": MAX_LENGTH},
        "task": "classify",
        "method": "lora" if layers else "features",
        "train": {**train_arguments(layers), "prefix_cache": cache},
        "out": str(out),
    }
    if layers:
        recipe["lora"] = lora_fields(layers, total)
    times, began = EpochTimes(), time.process_time()
    lk.train(recipe, callbacks=[times])
    whole = time.process_time() - began
    return {"epochs": times.seconds, "process": whole}


def run_peft(
    start: Path, rows: Path, layers: int, total: int, out: Path, label2id: Mapping[str, int]
) -> dict[str, Any]:
    import peft

    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(start, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(start)
    if layers:
        model = peft.get_peft_model(model, peft.LoraConfig(**lora_fields(layers, total), task_type="SEQ_CLS"))
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(HEAD))
    samples = [
        {**tokenizer(row["text"], truncation=True, max_length=MAX_LENGTH), "labels": label2id[str(row["label"])]}
        for row in read(rows)
    ]
    times = EpochTimes()
    with tempfile.TemporaryDirectory() as scratch:
        args = transformers.TrainingArguments(
            output_dir=scratch, use_cpu=True, disable_tqdm=True, **train_arguments(layers)
        )
        collator = transformers.DataCollatorWithPadding(tokenizer)
        trainer = transformers.Trainer(
            model=model, args=args, train_dataset=samples, data_collator=collator, callbacks=[times]
        )
        trainer.train()
    model.save_pretrained(out)
    return {"epochs": times.seconds}


def measure_setting(layers: int, start: Path, rows: Path, test: Path, label2id: Mapping[str, int]) -> dict[str, Any]:
    total = json.loads((start / "config.json").read_text("utf-8"))["num_hidden_layers"]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        outs = {case: Path(folder, case.replace(" ", "-")) for case in CASES}
        for case, cache in (("every step", "off"), ("once", "auto")):
            found[case] = run_ours(start, rows, layers, total, outs[case], cache=cache)
            base = lk.load_base(start, task="classify", label2id=dict(label2id), dtype="fp32")
            bank = lk.attach(base.model, slots=1)
            bank.load("trained", outs[case])
            with bank.using("trained"):
                found[case]["accuracy"] = accuracy(base.model, base.tokenizer, test, label2id)
        found["peft"] = run_peft(start, rows, layers, total, outs["peft"], label2id)
        one, other = (lk.Adapter.load(outs[case]).tensors for case in ("every step", "once"))
        found["largest_difference"] = max(float((one[name] - other[name]).abs().max()) for name in one)
    return found


def later_epochs(case: Mapping[str, Any]) -> float:
    """CPU seconds of an epoch after the first."""
    return median(case["epochs"][1:])


def render(result: Mapping[str, Any]) -> str:
    head = [
        "trained",
        "every step",
        "once",
        "peft",
        "quicker than every step",
        "than peft",
        "accuracy",
        "largest difference",
    ]
    lines = []
    for name, cell in result["settings"].items():
        every, once, theirs = (later_epochs(cell[case]) for case in CASES)
        lines.append(
            [
                name,
                f"{every:.2f} s",
                f"{once:.2f} s",
                f"{theirs:.2f} s",
                f"{every / once:.1f} ×",
                f"{theirs / once:.1f} ×",
                f"{cell['every step']['accuracy']:.3f}, {cell['once']['accuracy']:.3f}",
                f"{cell['largest_difference']:.0e}",
            ]
        )
    return table(head, lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, help="folder with banking77/train.jsonl and test.jsonl")
    parser.add_argument("--encoder", type=Path, help="folder of the encoder")
    parser.add_argument("--rows", type=int, default=2000, help="training rows")
    parser.add_argument("--only", choices=list(SETTINGS), help="measure this row alone")
    parser.add_argument("--table", action="store_true", help="write the table of README.md from the result")
    options = parser.parse_args(argv)
    if not options.table:
        if options.data is None or options.encoder is None:
            parser.error("--data and --encoder are needed")
        quiet()
        torch.set_num_threads(1)
        names = [options.only] if options.only else list(SETTINGS)
        result = measure(options.data / "banking77", options.encoder, options.rows, names)
        if options.only:
            rows = {**read_result(NAME)["settings"], **result["settings"]}
            result["settings"] = {name: rows[name] for name in SETTINGS if name in rows}
        write(NAME, result)
    fill(README, render(read_result(NAME)), mark=NAME)


def measure(data: Path, encoder: Path, count: int, names: Sequence[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        chosen = random.Random(0).sample(read(data / "train.jsonl"), count)
        rows = Path(folder, "train.jsonl")
        rows.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
        labels = tuple(sorted({str(row["label"]) for row in chosen}))
        label2id = {label: number for number, label in enumerate(labels)}
        start = start_of(encoder, labels, Path(folder, "encoder"), dropout=0.0)
        cells: dict[str, Any] = {}
        for name in names:
            cells[name] = measure_setting(SETTINGS[name], start, rows, data / "test.jsonl", label2id)
            print(name, json.dumps(cells[name]), flush=True)
        return {"rows": count, "epochs": EPOCHS, "batch": BATCH, "r": RANK, "settings": cells}


if __name__ == "__main__":
    main()
