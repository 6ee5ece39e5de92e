"""What decides the result of a training, so that a checkpoint is not taken for that of another one."""

from __future__ import annotations

import hashlib
from typing import TypeAlias

from lora_kit.adapter.adapter import Adapter
from lora_kit.data.batches import EncodedDataset
from lora_kit.data.packing import PackedDataset
from lora_kit.data.preference_samples import PreferenceDataset
from lora_kit.data.prompt_samples import PromptDataset
from lora_kit.models.loading import Base
from lora_kit.targets.fingerprint import fingerprint
from lora_kit.training.loop.checkpoints import Identity, hash_json
from lora_kit.training.loop.run_differences import identify_batch
from lora_kit.training.recipe.recipe import Recipe

Samples: TypeAlias = EncodedDataset | PackedDataset | PreferenceDataset | PromptDataset
"""The samples of a training, as the loop of its objective takes them."""


def build_identity(
    recipe: Recipe,
    base: Base,
    train: Samples,
    validation: Samples | None,
    start: Adapter | None,
    *,
    processes: int,
) -> Identity:
    """Return everything that decides the result. Rows count by their content, not by their path."""
    fields = recipe.to_dict()
    for key in ("train", "validation", "streaming"):
        del fields["data"][key]
    del fields["out"]
    if recipe.rewards:
        fields["rewards"] = [[spec.function, spec.weight] for spec in recipe.rewards]
    if start is not None:
        fields["from"] = start.digest  # by its content, as the rows
    rows = {"train": hash_samples(train), "validation": validation and hash_samples(validation)}
    base_facts = fingerprint(base.model)
    sums = {"rows": rows, "base": hash_json({key: base_facts[key] for key in ("structure", "weights")})}
    batch = identify_batch(fields["train"], processes)
    return {**fields, **batch, "sha256": sums, "device": base.device.type}


def hash_samples(samples: Samples) -> str:
    """Return the sha256 of samples as the model sees them, in hex."""
    if isinstance(samples, PackedDataset):
        return hash_json({"samples": hash_samples(samples.samples), "rows": samples.rows})
    if isinstance(samples, PromptDataset):
        return hash_json({"samples": hash_samples(samples.samples), "rows": [row for _, row in samples.rows.values]})
    if isinstance(samples, PreferenceDataset):
        return hash_json({"samples": hash_samples(samples.samples), "verdicts": samples.verdicts})
    digest = hashlib.sha256(samples.kind.encode())
    further = [tensor for tensor in (samples.types, samples.weights) if tensor is not None]
    for tensor in (samples.offsets, samples.ids, samples.labels, samples.label_offsets, *further):
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
