"""What the documents speak of, in a folder: a store of adapters, bases, files of rows. All of it fits kit-base."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers

import lora_kit as lk
from tests.support import how_to_rows, sequences, texts
from tests.support.pages import ROOT

PAIRS = [{"prompt": f"all names of table {n}", "completion": f"select name from t{n};"} for n in range(8)]
TABLES = [{"prompt": f"all names of table {n}", "completion": f"select name from t{n};"} for n in range(40)]
"""Rows enough for `prepare` to set some aside."""
REWARDS = (
    "def has_answer(completions, answer, **kwargs): return [float(a in text) for text, a in zip(completions, answer)]\n"
)
LABELED = [{"text": f"where is card {n}", "label": "card"} for n in range(4)]
LABELED += [{"text": f"send {n} pounds", "label": "money"} for n in range(4)]
KIT = ROOT / "lora_kit" / "models" / "kit_base"


def build(folder: Path) -> Path:
    """Make the folder, once; pages work on copies of it."""
    shutil.copytree(ROOT / "adapters", folder / "adapters")
    shutil.copytree(KIT, folder / "base-folder", ignore=shutil.ignore_patterns("__pycache__", "*.py", "training.json"))
    _tuned(folder / "base-folder", folder / "tuned-folder")
    for seed, name in enumerate(("sql", "sql-small", "tone", "mine")):
        _adapter(folder / "adapters" / name, seed=seed)
    _classifier(folder / "adapters" / "intents")
    for name in ("train", "valid", "validation", "test", "rows"):
        texts.write(folder / f"{name}.jsonl", PAIRS)
    preferences = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no"} for row in PAIRS]
    texts.write(folder / "preferences.jsonl", preferences)
    questions = [{"prompt": row["prompt"], "answer": row["completion"]} for row in PAIRS]
    texts.write(folder / "questions.jsonl", questions)
    (folder / "rewards.py").write_text(REWARDS, "utf-8")
    _spreadsheet(folder / "rows.csv", ("prompt", "completion"), TABLES)
    _spreadsheet(folder / "answers.csv", ("Question", "Answer"), PAIRS)
    _spreadsheet(folder / "test.csv", ("text", "label"), LABELED)
    _loralib(folder / "lora.bin")
    for name, rows in how_to_rows.FILES.items():
        if name.endswith(".csv"):
            _spreadsheet(folder / name, tuple(rows[0]), rows)
        else:
            texts.write(folder / name, rows)
    _encoder(folder / "encoder-folder")
    _translator(folder / "t5-folder")
    return folder


def _adapter(folder: Path, *, seed: int) -> None:
    torch.manual_seed(seed)
    base = lk.load_base("kit-base")
    config = lk.LoraConfig(r=2, lora_alpha=4, target_modules=("q_proj", "v_proj"), init_lora_weights=False)
    lk.attach(base.model, config, name="made").save("made", folder)


def _classifier(folder: Path) -> None:
    base = lk.load_base("kit-base", task="classify", num_labels=2)
    config = lk.LoraConfig(target_modules=(), modules_to_save=("score",), task_type="SEQ_CLS")
    bank = lk.attach(base.model, config, name="made")
    bank.save("made", folder, record={"labels": ["card", "money"], "recipe": {"task": "classify"}})


def _encoder(folder: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    transformers.BertModel(config).save_pretrained(folder)
    texts.bert_tokenizer().save_pretrained(folder)


def _translator(folder: Path) -> None:
    sequences.t5().save_pretrained(folder)
    texts.tokenizer().save_pretrained(folder)


def _tuned(base: Path, folder: Path) -> None:
    """A fine-tune of a base: its first layer has learned something."""
    shutil.copytree(base, folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    key = next(name for name in weights if "layers.0.self_attn.q_proj" in name)
    weights[key] = weights[key] + torch.randn(weights[key].shape, dtype=weights[key].dtype) / 16
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _spreadsheet(file: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as out:
        written = csv.writer(out)
        written.writerow(columns)
        written.writerows(row.values() for row in rows)


def _loralib(file: Path) -> None:
    size = lk.load_base("kit-base").model.config.hidden_size
    path = "model.layers.0.self_attn.q_proj"
    torch.save({f"{path}.lora_A": torch.randn(2, size), f"{path}.lora_B": torch.randn(size, 2)}, file)
