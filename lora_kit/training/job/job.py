"""What a recipe names, read and checked before any work is done: the output, the rows, the base."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch

from lora_kit.adapter.folder import is_adapter_folder
from lora_kit.config.lora_config import LoraConfig
from lora_kit.data.batches import Collator, EncodedDataset
from lora_kit.data.chat import ChatTemplate, chat_template
from lora_kit.data.encode import encode_rows
from lora_kit.data.layouts import FORMATS
from lora_kit.data.packing import PackedDataset, pack, reason_not_packable
from lora_kit.data.rows import Rows, collect_label_names, read_rows
from lora_kit.data.sample_format import DEFAULT_MAX_LENGTH, SampleFormat
from lora_kit.errors import DataError, RecipeError, StorageError, format_list
from lora_kit.evaluation.generation_metrics import GenerationTask, build_generation_task, collect_eval_prompts
from lora_kit.evaluation.metrics import select_generation_metrics
from lora_kit.io.atomic_write import check_output, check_path
from lora_kit.io.text import escape_text
from lora_kit.models.heads import LABEL_TASKS, find_head_modules
from lora_kit.models.loading import Base
from lora_kit.models.prompt_tokens import DEFAULT_SEPARATOR
from lora_kit.targets.fingerprint import fingerprint
from lora_kit.training.job.base_model import prepare_base
from lora_kit.training.loop.checkpoints import hash_json
from lora_kit.training.recipe.peft_config import TASK_TYPES, can_save_modules
from lora_kit.training.recipe.recipe import HEAD, Recipe
from lora_kit.training.recipe.training_arguments import best_metric_of

logger = logging.getLogger(__name__)

RECIPE_FILE: Final = "recipe.yaml"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a training needs, checked.

    Attributes:
        sample_format: how the rows became samples.
        generation_task: the prompts of the validation rows, if the best model is chosen by what it writes.
        identity: what decides the result, see `lora_kit.training.loop.checkpoints`.
    """

    recipe: Recipe
    base: Base
    train: EncodedDataset | PackedDataset
    validation: EncodedDataset | None
    sample_format: SampleFormat
    generation_task: GenerationTask | None
    identity: Mapping[str, Any]

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the labels, in the order of their classes; empty for a task without labels."""
        return self.sample_format.labels

    @property
    def measured(self) -> dict[str, Any]:
        """What an evaluation is asked for besides the loss: see `lora_kit.evaluation.measure.measure`."""
        return {"metrics": (best_metric_of(self.recipe.train),), "labels": self.labels, "task": self.generation_task}

    @property
    def collator(self) -> Collator:
        return Collator(self.base.tokenizer.pad_token_id, self.base.decoder_inputs)

    def with_model(self, model: Any) -> Job:
        """The same job with its base inside another model, which is trained, measured and asked instead."""
        base = dataclasses.replace(self.base, model=model)
        task = self.generation_task and dataclasses.replace(self.generation_task, base=base)
        return dataclasses.replace(self, base=base, generation_task=task)

    @property
    def setting(self) -> dict[str, Any]:
        """What may change the last bits of the result."""
        packages = ["lora-kit", "torch", "transformers", *(["peft"] if self.recipe.method == "peft" else [])]
        versions = {name: metadata.version(name) for name in packages}
        return {"versions": versions, "threads": torch.get_num_threads()}


def _build_identity(
    recipe: Recipe, base: Base, train: EncodedDataset | PackedDataset, validation: EncodedDataset | None
) -> Mapping[str, Any]:
    """What decides the result: rows count by their content, not by their path."""
    fields = recipe.to_dict()
    del fields["out"], fields["data"]["train"], fields["data"]["validation"]
    rows = {"train": hash_samples(train), "validation": validation and hash_samples(validation)}
    found = fingerprint(base.model)
    sums = {"rows": rows, "base": hash_json({key: found[key] for key in ("structure", "weights")})}
    return fields | {"sha256": sums, "device": base.device.type}


def hash_samples(samples: EncodedDataset | PackedDataset) -> str:
    """sha256 of samples as the model sees them."""
    if isinstance(samples, PackedDataset):
        return hash_json({"samples": hash_samples(samples.samples), "rows": samples.rows})
    found = hashlib.sha256(samples.kind.encode())
    for tensor in (samples.offsets, samples.ids, samples.labels, samples.label_offsets):
        found.update(tensor.contiguous().numpy().data)
    return found.hexdigest()


def check_output_writable(recipe: Recipe) -> None:
    """Refuse an output without a name, and a place that cannot be written to: before hours of training, not after."""
    if not recipe.name:
        raise RecipeError(f"out {recipe.out!r} has no name", hint="its last part names the adapter")
    out = Path(recipe.out)
    check_path(out)
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir():
        raise StorageError(f"{escape_text(out)} lies in {escape_text(above)}, which is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise StorageError(f"{escape_text(out)} cannot be written: {escape_text(above)} may not be written to")


def check_output_available(recipe: Recipe, *, replace: bool) -> None:
    """Refuse an output that exists, or lies in the base's folder."""
    out, base = Path(recipe.out), Path(recipe.base).expanduser()
    check_output(out, replace=replace, owned=is_trained_model_folder if recipe.method == "full" else is_adapter_folder)
    if base.is_dir() and (out.resolve().is_relative_to(base.resolve()) or base.resolve().is_relative_to(out.resolve())):
        raise StorageError(f"{escape_text(out)} lies in the base's folder, or holds it", hint="choose another output")


def is_trained_model_folder(folder: Path) -> bool:
    """Whether a folder is a trained model of ours, which may be replaced."""
    return (folder / RECIPE_FILE).is_file() and (folder / "config.json").is_file()


def read_recipe_rows(recipe: Recipe) -> tuple[Rows, Rows | None]:
    """The rows of both files, of a format that the task can use."""
    files = {"train": recipe.data.train, "validation": recipe.data.validation}
    rows = [read_rows(file, split=side) if file else None for side, file in files.items()]
    for found in rows:
        if found is not None and found.format not in FORMATS[recipe.task]:
            other = next(task for task, formats in FORMATS.items() if found.format in formats)
            raise DataError(
                f"{found.path} has rows of the format {found.format}; task {recipe.task} takes "
                f"{format_list(FORMATS[recipe.task])}",
                hint=f"task: {other} uses these rows",
            )
    first, second = rows
    assert first is not None
    if second is not None and second.format != first.format:
        kinds = f"{first.path} has rows of the format {first.format}, {second.path} of the format {second.format}"
        raise DataError(kinds, hint="both files of a recipe have one format")
    return first, second


def prepare_job(recipe: Recipe, rows: tuple[Rows, Rows | None], given: Base | None) -> Job:
    """The base and the data, ready; the recipe with everything that was left open filled in."""
    names = collect_label_names(rows[0]) if recipe.task in LABEL_TASKS else ()
    label2id = {name: number for number, name in enumerate(names)}
    if given is not None and set(names) == set(given.model.config.label2id):
        # A head that knows these labels already keeps them in its own order.
        label2id = dict(given.model.config.label2id)
    base = prepare_base(recipe, given, label2id)
    template = _load_chat_template(recipe, rows[0], base)
    recipe = _resolve_recipe(recipe, rows[0], base, template)
    assert recipe.data.max_length is not None
    sample_format = SampleFormat(
        max_length=recipe.data.max_length,
        separator=recipe.data.separator,
        template=template,
        label2id=label2id,
        task=recipe.task,
    )
    train_set = encode_rows(rows[0], base.tokenizer, sample_format)
    validation = None if rows[1] is None else encode_rows(rows[1], base.tokenizer, sample_format)
    logger.info("%s: %d samples, %d labels", rows[0].path, len(train_set), train_set.num_labels)
    packed = _pack_samples(recipe, base, train_set) if recipe.data.packing else train_set
    if validation is None:
        logger.info("no evaluation: the recipe names no data.validation")
    return Job(
        recipe=recipe,
        base=base,
        train=packed,
        validation=validation,
        sample_format=sample_format,
        generation_task=_build_generation_task(recipe, rows[1], base, sample_format),
        identity=_build_identity(recipe, base, packed, validation),
    )


def _build_generation_task(
    recipe: Recipe, rows: Rows | None, base: Base, sample_format: SampleFormat
) -> GenerationTask | None:
    """Return the prompts of the validation rows, if the best model is chosen by what it writes."""
    if rows is None or not select_generation_metrics([best_metric_of(recipe.train)], recipe.task):
        return None
    return build_generation_task(base, collect_eval_prompts(rows), sample_format.style)


def _pack_samples(recipe: Recipe, base: Base, samples: EncodedDataset) -> PackedDataset:
    """Samples in rows, after it has been found out that the base keeps them apart."""
    reason = reason_not_packable(base.model)
    if reason:
        raise RecipeError(f"data.packing: {base.name} cannot keep samples apart: {reason}", hint="packing: false")
    assert recipe.data.max_length is not None
    packed = pack(samples, max_length=recipe.data.max_length, seed=recipe.seed)
    told = "%d samples in %d rows of %d tokens, %.1f%% of them filled"
    logger.info(told, len(samples), len(packed), packed.max_length, 100 * packed.filled)
    return packed


def _load_chat_template(recipe: Recipe, rows: Rows, base: Base) -> ChatTemplate | None:
    given = recipe.data.chat_template
    if rows.format == "chat":
        return chat_template(given, base.tokenizer, base=base.name)
    if given is not None:
        raise RecipeError(f"data.chat_template is for conversations; {rows.path} has rows of the format {rows.format}")
    return None


def _resolve_recipe(recipe: Recipe, rows: Rows, base: Base, template: ChatTemplate | None) -> Recipe:
    length = recipe.data.max_length or min(base.max_length, DEFAULT_MAX_LENGTH)
    if length > base.max_length:
        raise RecipeError(f"data.max_length is {length}; {base.name} sees {base.max_length} tokens at once")
    separator = recipe.data.separator
    if recipe.task == "seq2seq" and separator not in ("", DEFAULT_SEPARATOR):
        raise RecipeError("data.separator is for causal-lm: an encoder reads a prompt as it is", hint="leave it out")
    # A text of its own has no prompt, and nothing is to be put after one in generation; in a chat the template decides.
    if rows.format != "completion" or recipe.task == "seq2seq":
        separator = ""
    text = template.text if template else None
    data = dataclasses.replace(recipe.data, max_length=length, separator=separator, chat_template=text)
    recipe = recipe.replace(data=data)
    if recipe.method == "full":
        return recipe
    if recipe.method == "peft":
        return recipe.replace(peft=_resolve_peft_section(recipe, base))
    return recipe.replace(lora=_resolve_lora_config(recipe, base))


def _resolve_lora_config(recipe: Recipe, base: Base) -> LoraConfig:
    """The adapter's config with its head by name, and with labels for other tools."""
    return dataclasses.replace(
        recipe.lora,
        modules_to_save=_resolve_saved_modules(recipe, base, recipe.lora.modules_to_save),
        base_model_name_or_path=recipe.lora.base_model_name_or_path or base.name,
        task_type=TASK_TYPES[recipe.task],
    )


def _resolve_peft_section(recipe: Recipe, base: Base) -> dict[str, Any]:
    """The section with the head by name."""
    given = recipe.peft.get("modules_to_save") or ()
    saved = _resolve_saved_modules(recipe, base, (given,) if isinstance(given, str) else given)
    if saved and not can_save_modules(recipe.peft):
        kind = recipe.peft["peft_type"]
        raise RecipeError(f"task {recipe.task} trains a head, which {kind} does not save", hint="use another peft_type")
    return {**recipe.peft, "modules_to_save": list(saved)} if saved else dict(recipe.peft)


def _resolve_saved_modules(recipe: Recipe, base: Base, given: Sequence[str]) -> tuple[str, ...]:
    """What is trained and saved whole, the head by name.

    A head of a new task is random at first: an adapter that did not bring it would be of no use.
    """
    saved = [name for name in given if name != HEAD]
    if recipe.task in LABEL_TASKS or HEAD in given:
        head = [name for name in find_head_modules(base.model, recipe.task) if name not in saved]
        if head and recipe.method != "features":
            logger.info("the head is trained and saved whole: %s", format_list(head))
        saved += head
    return tuple(saved)
