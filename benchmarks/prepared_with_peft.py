"""A recipe's settings in PEFT with transformers.Trainer, as a careful user writes it: the other side of a comparison.

The tokens are those of `lora_kit.data`, so that both sides see the same; model, adapter, optimizer, schedule and
batches are PEFT's and transformers' own. Of a head with a rate of its own, the optimizer has a group.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn

from lora_kit.data.batches import IGNORE_INDEX, Collator
from lora_kit.models.tasks import CLASSIFY
from lora_kit.training.job.job import Job
from lora_kit.training.recipe.recipe import Recipe


def train_with_peft(recipe: Recipe, metric: str) -> tuple[float, int]:
    """Return accuracy or perplexity of the trained model on the validation rows, and the steps."""
    transformers.set_seed(recipe.seed)
    job = Job.open(recipe)
    recipe = job.recipe
    is_classifier = recipe.task == CLASSIFY
    config = LoraConfig(
        r=recipe.lora.r,
        lora_alpha=int(recipe.lora.lora_alpha),  # prepare writes whole numbers
        lora_dropout=recipe.lora.lora_dropout,
        target_modules="all-linear",
        modules_to_save=list(recipe.lora.modules_to_save or ()) or None,
        task_type=TaskType.SEQ_CLS if is_classifier else TaskType.CAUSAL_LM,
    )
    model = get_peft_model(job.base.model, config)
    train, collator = job.train, Collator(job.base.pad_token_id, takes_types=job.base.takes_token_types)
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            output_dir=folder,
            num_train_epochs=recipe.train["num_train_epochs"],
            per_device_train_batch_size=recipe.train["per_device_train_batch_size"],
            learning_rate=recipe.train["learning_rate"],
            warmup_steps=recipe.train.get("warmup_steps", 0),
            seed=recipe.seed,
            save_strategy="no",
            report_to="none",
            use_cpu=job.base.device.type == "cpu",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        optimizer = torch.optim.AdamW(_group_parameters(model, recipe.train), weight_decay=0.0)
        trainer = transformers.Trainer(
            model, args, train_dataset=train, data_collator=collator, optimizers=(optimizer, None)
        )
        trainer.train()
    return _measure(model, list(job.validation), collator, metric), trainer.state.global_step


def _group_parameters(model: nn.Module, train: Mapping[str, Any]) -> list[dict[str, object]]:
    """Return the trained parameters with their rates: those of saved modules have the head's."""
    trained = [(name, leaf) for name, leaf in model.named_parameters() if leaf.requires_grad]
    head = [leaf for name, leaf in trained if "modules_to_save" in name]
    rest = [leaf for name, leaf in trained if "modules_to_save" not in name]
    rate = train["learning_rate"]
    groups: list[dict[str, object]] = [{"params": rest, "lr": rate}]
    return [*groups, {"params": head, "lr": train.get("head_learning_rate") or rate}] if head else groups


@torch.no_grad()
def _measure(model: nn.Module, samples: Sequence[dict[str, Tensor]], collator: Collator, metric: str) -> float:
    """Return the accuracy over the samples, or the perplexity over their labels."""
    model.eval()
    right = loss = count = 0.0
    for start in range(0, len(samples), 8):
        batch = collator(samples[start : start + 8])
        labels = batch.pop("labels")
        logits = model(**batch).logits.float()
        if metric == "accuracy":
            right += float((logits.argmax(-1) == labels).sum())
            continue
        shifted, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        loss += float(nn.functional.cross_entropy(shifted, targets, ignore_index=IGNORE_INDEX, reduction="sum"))
        count += float((targets != IGNORE_INDEX).sum())
    return right / len(samples) if metric == "accuracy" else math.exp(loss / count)
