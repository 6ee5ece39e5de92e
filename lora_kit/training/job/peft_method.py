"""Method `peft`: the base wrapped in a PeftModel, trained and saved."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.adapter_record import RECORD, encode_record
from lora_kit.adapter.folder import CARD, CONFIG, WEIGHTS, check_file_names, is_adapter_folder
from lora_kit.adapter.model_card import (
    format_checkpoint,
    format_code,
    format_front_matter,
    format_labels,
    format_metrics,
    format_table,
    list_adapter_front_matter,
    name_local_path,
    render_card,
    write_peft_loading_code,
)
from lora_kit.config.lora_config import LoraConfig
from lora_kit.data.batches import SAMPLE_WEIGHTS
from lora_kit.errors import LoraKitError, RecipeError, VerificationError
from lora_kit.io.atomic_write import write_folder
from lora_kit.io.portable_paths import make_folder_portable
from lora_kit.models.silence import silence_libraries
from lora_kit.models.tasks import CAUSAL_LM, GENERATIVE_TASKS
from lora_kit.torch_utils import is_out_of_memory, use_eval_mode
from lora_kit.training.job.job import Job
from lora_kit.training.loop.length_buckets import split_by_length
from lora_kit.training.recipe.coerce import Section
from lora_kit.training.recipe.peft_config import build_peft_config
from lora_kit.training.results import TrainedModules

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import GenerationConfig

logger = logging.getLogger(__name__)

_DESCRIPTIVE_FIELDS: Final = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
    "task_type",
)
"""Fields of a config that do not change what its tensors compute."""


class PeftAdapter:
    """The adapter of a job, attached by PEFT to the job's base, which stays changed.

    Attributes:
        model: the PeftModel. Its logits have no positions for virtual tokens that it puts before a text.
        kinds: the trained modules by name.
        count: number of trained parameters.
        parameters: number of parameters of the whole model.

    Raises:
        RecipeError: PEFT rejects the base or the section, or cannot run them together.
    """

    def __init__(self, job: Job) -> None:
        self._kind: str = job.recipe.peft["peft_type"]
        self._name, self._fingerprint = job.base.name, job.base.fingerprint()
        self._is_quantized = bool(getattr(job.base.model, "is_quantized", False))
        base_paths = {path for path, _ in job.base.model.named_modules()}
        config = build_peft_config(job.recipe.peft, task=job.recipe.task)
        with self._translate_errors():
            from peft import get_peft_model

            self.model: PeftModel = get_peft_model(job.base.model, config)
        self.count, self.parameters = self.model.get_nb_trainable_parameters()
        if not self.count:
            raise RecipeError(f"peft: {self._kind} trains nothing of {self._name}")
        self.kinds = _count_trained_modules(self.model, base_paths)
        with self._translate_errors():
            _drop_virtual_token_logits(self.model, job)
        self._warn_of_low_precision()

    def encode(
        self, name: str, *, record: Mapping[str, object], files: Mapping[str, bytes]
    ) -> tuple[dict[str, bytes], str]:
        """Return the files that PEFT writes, with our record beside them, and the adapter's digest: sha256 in hex.

        Args:
            name: of the adapter, for its card.
            record: of the training, as JSON values.
            files: contents of the further files, by name.
        """
        from safetensors.torch import save

        weights = save(self._collect_tensors(), metadata={"format": "pt"})
        facts = {
            "base": {**self._fingerprint, "name": make_folder_portable(self._name)},
            "method": "peft",
            "peft_type": self._kind,
        }
        return encode_peft_adapter(
            name, self._collect_config_fields(), weights, record={**record, **facts}, files=files
        )

    def save(self, folder: Path, *, record: Mapping[str, object], files: Mapping[str, bytes], replace: bool) -> str:
        """Write the adapter as PEFT does, with our record beside it, all or nothing, synced to disk.

        Args:
            record, files: as in `encode`.
            replace: whether an existing adapter may be replaced.

        Returns:
            The digest of the adapter: sha256 in hex.

        Raises:
            StorageError: the folder exists or cannot be written; an earlier adapter is unchanged.
        """
        contents, digest = self.encode(Path(os.path.abspath(folder)).name, record=record, files=files)
        write_folder(folder, contents, replace=replace, owned=is_adapter_folder)
        return digest

    def _collect_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that PEFT would save, without copies of the base's embeddings."""
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        tensors = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in sorted(state.items())}
        if not tensors:
            raise VerificationError(f"PEFT has no tensors to save for this {self._kind}")
        return tensors

    def _collect_config_fields(self) -> dict[str, object]:
        """Return the config as PEFT filled it in, as JSON values; sets are sorted."""
        fields = self.model.peft_config["default"].to_dict()
        changes = {"inference_mode": True, "base_model_name_or_path": make_folder_portable(self._name)}
        return {key: _convert_to_json(value) for key, value in {**fields, **changes}.items()}

    @contextlib.contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Raise PEFT's errors as RecipeError, and log its warnings."""
        try:
            with silence_libraries(), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("default")
                yield
            for line in dict.fromkeys(str(warning.message) for warning in caught):
                logger.info("peft: %s", line)
        except LoraKitError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            what = " ".join(str(error).split()) or type(error).__name__
            hint = "not every type works on quantized weights" if self._is_quantized else ""
            raise RecipeError(f"peft: {self._kind} does not work with {self._name}: {what}", hint=hint) from error

    def _warn_of_low_precision(self) -> None:
        dtypes = {p.dtype for p in self.model.parameters() if p.requires_grad and p.itemsize < 4}
        for dtype in dtypes:
            name = str(dtype).removeprefix("torch.")
            logger.warning("%s is trained in %s, where small updates are lost; use dtype: fp32", self._kind, name)


def encode_peft_adapter(
    name: str, fields: Section, weights: bytes, *, record: Section, files: Mapping[str, bytes]
) -> tuple[dict[str, bytes], str]:
    """Return the files of an adapter in PEFT's format, in the order in which they are written, and its digest.

    Args:
        name: of the adapter, for its card.
        fields: of its config, as JSON values.
        weights: the content of its weight file.
        record: facts of `lora_kit.json`.
        files: contents of the further files, by name.
    """
    from safetensors.torch import load

    tensors = load(weights)
    lora = _convert_to_lora(fields, tensors)
    digest = lora.digest if lora else _hash_adapter(fields, weights)
    contents = dict(files)
    check_file_names(contents)
    elements = sum(tensor.numel() for tensor in tensors.values())
    contents[CARD] = _render_card(name, fields, record, elements=elements, digest=digest, is_lora=lora is not None)
    contents[CONFIG] = f"{json.dumps(fields, indent=2, sort_keys=True)}\n".encode()
    contents[WEIGHTS] = weights
    # Last, because it holds the checksums of the others.
    contents[RECORD] = encode_record(record, contents, digest=digest)
    return contents, digest


def _count_trained_modules(model: nn.Module, base_paths: set[str]) -> tuple[TrainedModules, ...]:
    """Return the trained parameters, grouped by the last name of the base's module that they belong to."""
    sizes_by_name: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = name.removeprefix("base_model.").removeprefix("model.").split(".")
            prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
            path = next((prefix for prefix in prefixes if prefix in base_paths), parts[0])
            sizes = sizes_by_name.setdefault(path.rpartition(".")[2], {})
            sizes[path] = sizes.get(path, 0) + parameter.numel()
    return tuple(TrainedModules(name, len(sizes), sum(sizes.values())) for name, sizes in sizes_by_name.items())


def _drop_virtual_token_logits(model: PeftModel, job: Job) -> None:
    """Have a model return logits for the positions of its input only, and none for virtual tokens before them.

    One forward of a sample tells how many virtual tokens there are.
    """
    batch = {name: tensor.to(job.base.device) for name, tensor in job.collator([job.train[0]]).items()}
    inputs = split_by_length(batch)[0]
    labels = inputs.pop("labels")
    inputs.pop(SAMPLE_WEIGHTS, None)
    is_of_text = labels.ndim == 1 or labels.is_floating_point()
    options = {"use_cache": False} if job.recipe.task in GENERATIVE_TASKS else {}
    with use_eval_mode(model), torch.no_grad():
        shape = model(**inputs, **options).logits.shape
    before = 0 if is_of_text else shape[1] - labels.shape[1]
    if len(shape) != (2 if is_of_text else 3) or before < 0:
        kind = job.recipe.peft["peft_type"]
        raise RecipeError(f"peft: {kind} returns logits {tuple(shape)} for labels {tuple(labels.shape)}")

    def drop(module: nn.Module, inputs: object, output: Any) -> object:
        output.logits = output.logits[:, before:]
        return output

    if before:
        model.register_forward_hook(drop)
        if job.recipe.task == CAUSAL_LM:
            _generate_one_by_one(model)


def _generate_one_by_one(model: PeftModel) -> None:
    """Have a model's `generate` take the prompts of a batch one by one, without padding.

    In a batch, virtual tokens would come before the padding of a shorter prompt, whose positions would then differ from
    those in training.
    """
    generate_batch = model.generate

    def generate(
        *, input_ids: Tensor, attention_mask: Tensor, generation_config: GenerationConfig, **options: object
    ) -> Tensor:
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            padding = int((mask == 0).sum())
            config = copy.deepcopy(generation_config)
            config.max_length -= padding
            prompt = {"input_ids": ids[None, padding:], "attention_mask": mask[None, padding:]}
            rows.append(torch.cat([ids[:padding], generate_batch(**prompt, generation_config=config, **options)[0]]))
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=generation_config.pad_token_id)

    model.generate = generate  # type: ignore[method-assign]


def _convert_to_lora(fields: Section, tensors: Mapping[str, Tensor]) -> Adapter | None:
    """Return the same adapter as an `Adapter`; None where it is not a LoRA."""
    try:
        return Adapter(LoraConfig.from_dict(fields), tensors)
    except LoraKitError:
        return None


def _render_card(name: str, fields: Section, record: Section, *, elements: int, digest: str, is_lora: bool) -> bytes:
    """Return the model card.

    Args:
        fields: of the config.
        record: of the training, as JSON values.
        elements: number of values in the adapter's tensors.
        is_lora: whether it is a LoRA, which a bank loads as well.
    """
    base, kind, recipe = fields["base_model_name_or_path"], fields["peft_type"], record["recipe"]
    options = [(key, json.dumps(value)) for key, value in recipe["peft"].items() if key != "peft_type"]
    rows = [
        ("base", base),
        ("peft_type", kind),
        *options,
        *format_labels(record.get("labels")),
        *format_checkpoint(record.get("checkpoint")),
        ("elements", f"{elements:,}"),
        ("digest", digest),
    ]
    labels = len(record.get("labels", ()))
    loading = write_peft_loading_code(
        base, name_local_path(name), task=recipe["task"], labels=labels, problem=record.get("problem")
    )
    bank = (
        "A bank of lora_kit loads it as well."
        if is_lora
        else "lora_kit's own bank does not load it, and cannot merge it."
    )
    card = render_card(
        name,
        f"A {kind} adapter that PEFT made, trained with lora_kit (`method: peft`).",
        format_table([*rows, *format_metrics(record["metrics"])]),
        f"{format_code(loading)}\nIt is in PEFT's own format. {bank}",
    )
    return (format_front_matter(list_adapter_front_matter(base, tag=kind.lower())) + card).encode()


def _hash_adapter(fields: Section, weights: bytes) -> str:
    """Return the sha256 of the fields that give the tensors meaning and of the sha256 of the weight file, in hex."""
    meaning = {key: value for key, value in sorted(fields.items()) if key not in _DESCRIPTIVE_FIELDS}
    return hashlib.sha256(f"{json.dumps(meaning)}\n{hashlib.sha256(weights).hexdigest()}".encode()).hexdigest()


def _convert_to_json(value: object) -> object:
    """Return a config's value as JSON values; sets are sorted."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _convert_to_json(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(_convert_to_json, value), key=str)
    return [_convert_to_json(item) for item in value] if isinstance(value, (list, tuple)) else value
