"""The work of the demo: training, answering, swapping, mixing, merging. Nothing here prints."""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.folder import CARD, CONFIG, RECORD, WEIGHTS
from lora_kit.bank.attach import attach
from lora_kit.bank.bank import AdapterBank
from lora_kit.config.lora_config import LoraConfig
from lora_kit.demo.demo_results import Agreement, Merged, Mixed, MixedRow, Swaps, Trained
from lora_kit.demo.demo_tasks import TASKS, Split, Task
from lora_kit.merging.merge import merge
from lora_kit.models.loading import Base, load_base
from lora_kit.models.locate import KIT_BASE, silence_libraries
from lora_kit.models.prompt_tokens import render_prompt, tokenize_prompt
from lora_kit.training.recipe.recipe import DataSpec, Recipe
from lora_kit.training.results import TrainReport
from lora_kit.training.train import train

RANK: Final = 8
BATCH: Final = 8
STEPS: Final[Mapping[str, int]] = {"scene": 280, "pirate": 380, "mood": 200}
"""Optimiser steps of `BATCH` rows after which kit-base has learned each task."""
HELD_OUT: Final = 64
NEW_TOKENS: Final = 40
"""More than any right answer has."""
_CHUNK: Final = 64
"""Prompts answered in one batch."""


def load() -> Base:
    """kit-base in fp32: on a CPU the quickest, and the figures of the demo are then those of fp32 anywhere."""
    return load_base(KIT_BASE, dtype="fp32")


def recipe_for(data: Path, out: Path, *, steps: int, seed: int) -> Recipe:
    """The recipe of a demo adapter. Batches are small: what counts for so little a model is the number of steps."""
    return Recipe(
        base=KIT_BASE,
        data=DataSpec(train=str(data)),
        out=str(out),
        lora=LoraConfig(r=RANK, lora_alpha=2 * RANK),
        train={
            "max_steps": steps,
            "per_device_train_batch_size": BATCH,
            "learning_rate": 5e-3,
            "lr_scheduler_type": "linear",
            "warmup_steps": 10,
            "adam_beta2": 0.98,
            "weight_decay": 0.0,
            "logging_steps": min(10, steps),
            "seed": seed,
        },
    )


def train_all(
    base: Base,
    *,
    out: Path,
    seed: int,
    steps: Mapping[str, int] = STEPS,
    epochs: int = 1,
    held_out: int = HELD_OUT,
) -> Iterator[Trained]:
    """Train the adapter of every task, one after another, and score each beside the base as soon as it is there.

    Args:
        out: the adapters' folders are made here, each with its score in its record, and their rows in `data`.
        steps: of an epoch, by task; each takes `BATCH` rows not seen before.
        epochs: how often all rows are gone through.
        held_out: rows per task to score on.
    """
    for name, task in TASKS.items():
        split = task.split(train=BATCH * steps[name], held_out=held_out, seed=seed)
        file = _write_rows(split, out / "data" / name)
        recipe = recipe_for(file, out / name, steps=epochs * steps[name], seed=seed)
        report = train(recipe, base=base, replace=True)
        found = _compared(base, task, split, report)
        _record_score(found)
        yield found


@contextlib.contextmanager
def with_adapters(base: Base, folders: Mapping[str, Path]) -> Iterator[AdapterBank]:
    """A bank on the base with these adapters resident, the base in use; detached at the end of the block."""
    bank = attach(base.model, slots=len(folders), max_rank=RANK)
    try:
        for name, folder in folders.items():
            bank.load(name, folder)
        yield bank
    finally:
        bank.detach()


def answer(base: Base, prompts: Sequence[str]) -> list[str]:
    """What the model, as it stands, writes for each prompt, taking the likeliest token each time."""
    texts: list[str] = []
    for start in range(0, len(prompts), _CHUNK):
        texts += _written(base, batch(base, prompts[start : start + _CHUNK]))
    return texts


def batch(base: Base, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Prompts as training saw them, padded on the left: `input_ids` and `attention_mask`, int64 (prompts, longest)."""
    rows = [tokenize_prompt(base.tokenizer, render_prompt(prompt)) for prompt in prompts]
    longest, pad = max(map(len, rows)), base.tokenizer.pad_token_id
    ids = [[pad] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {
        "input_ids": torch.tensor(ids, device=base.device),
        "attention_mask": torch.tensor(mask, device=base.device),
    }


def time_swaps(bank: AdapterBank, *, count: int = 2000) -> Swaps:
    """Swap through all adapters of a bank and the base; the base is in use afterwards."""
    names = [*bank.names, None]
    seconds = []
    for turn in range(count):
        name = names[turn % len(names)]
        started = time.perf_counter()
        bank.use(name)
        seconds.append(time.perf_counter() - started)
    bank.use(None)
    return Swaps(count=count, median_seconds=statistics.median(seconds))


def mix(base: Base, bank: AdapterBank, prompts: Mapping[str, str]) -> Mixed:
    """One batch with two rows per prompt: one under the adapter of that name, one under the base.

    Every row is held against the same batch under its adapter alone.
    """
    names = [name for adapter in prompts for name in (adapter, None)]
    asked = [prompt for prompt in prompts.values() for _ in range(2)]
    inputs = batch(base, asked)
    with bank.rows(names):
        mixed = _logits(base, inputs)
        texts = _written(base, inputs)
    alone = torch.empty_like(mixed)
    for name in set(names):
        mine = torch.tensor([other == name for other in names], device=base.device)
        with bank.using(name):
            alone[mine] = _logits(base, inputs)[mine]
    differences = (mixed - alone).abs().amax(dim=(1, 2)).tolist()
    rows = tuple(
        MixedRow(adapter=name, prompt=prompt, text=text, difference=difference)
        for name, prompt, text, difference in zip(names, asked, texts, differences, strict=True)
    )
    agreement = Agreement(difference=max(differences), largest_logit=float(mixed.abs().max()))
    return Mixed(rows=rows, agreement=agreement)


def merge_one(base: Base, bank: AdapterBank, name: str, *, adapter: Path, out: Path, prompts: Sequence[str]) -> Merged:
    """Merge an adapter folder into a folder with the whole model, load that, and compare the two on prompts.

    Args:
        name: of the same adapter in the bank.
    """
    report = merge(KIT_BASE, adapter, out, dtype="float32", replace=True)
    whole = load_base(out, device=base.device)
    inputs = batch(base, prompts)
    with bank.using(name):
        wanted = _logits(base, inputs)
    return Merged(
        name=name,
        report=report,
        prompts=len(prompts),
        agreement=Agreement(
            difference=float((_logits(whole, inputs) - wanted).abs().max()), largest_logit=float(wanted.abs().max())
        ),
    )


def digest(base: Base) -> str:
    """sha256 of the base's weights as they lie in memory."""
    sha = hashlib.sha256()
    for parameter in base.model.parameters():
        sha.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def peak_bytes() -> int:
    """The most memory this process has had in use since it began."""
    import resource
    import sys

    # Linux counts in kilobytes, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def copy(source: Path, target: Path, *, record: Mapping[str, Any] | None = None) -> None:
    """Write an adapter folder again, with whatever else lies in it and further facts in its record."""
    own = (CARD, CONFIG, RECORD, WEIGHTS)
    others = {file.name: file.read_bytes() for file in sorted(source.iterdir()) if file.name not in own}
    Adapter.load(source).save(target, record=record, files=others, replace=True)


def _write_rows(split: Split, folder: Path) -> Path:
    """Write both parts of a split as prompt/completion JSONL; returns the file to train on."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", split.train), ("held_out", split.held_out)):
        lines = "".join(json.dumps(row.to_dict()) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder / "train.jsonl"


def _compared(base: Base, task: Task, split: Split, report: TrainReport) -> Trained:
    """Base and adapter on the held-out rows."""
    prompts = [row.prompt for row in split.held_out]
    base_texts = answer(base, prompts)
    with with_adapters(base, {task.name: report.out}) as bank, bank.using(task.name):
        texts = answer(base, prompts)
    return Trained(
        task=task,
        report=report,
        bytes=(report.out / WEIGHTS).stat().st_size,
        prompts=tuple(prompts),
        base_texts=tuple(base_texts),
        texts=tuple(texts),
        base_score=task.score(split.held_out, base_texts),
        score=task.score(split.held_out, texts),
    )


def _record_score(found: Trained) -> None:
    """Put the scores into the adapter's record and card."""
    metrics = Adapter.load(found.report.out).record["metrics"]
    scores = {"held_out_right": found.score, "held_out_right_base": found.base_score}
    copy(found.report.out, found.report.out, record={"metrics": {**metrics, **scores}})


@torch.no_grad()
def _logits(base: Base, inputs: Mapping[str, Tensor]) -> Tensor:
    """fp32 (rows, length, vocabulary); zero at padding, where they mean nothing."""
    logits = base.model(**inputs, use_cache=False).logits.float()
    return torch.where(inputs["attention_mask"][..., None].bool(), logits, 0.0)


def _written(base: Base, inputs: Mapping[str, Tensor]) -> list[str]:
    from transformers import GenerationConfig

    length = inputs["input_ids"].shape[1]
    config = GenerationConfig(
        do_sample=False,
        max_length=length + NEW_TOKENS,
        eos_token_id=base.tokenizer.eos_token_id,
        pad_token_id=base.tokenizer.pad_token_id,
    )
    with silence_libraries():
        written = base.model.generate(**inputs, generation_config=config)
    texts: list[str] = base.tokenizer.batch_decode(written[:, length:], skip_special_tokens=True)
    return texts
