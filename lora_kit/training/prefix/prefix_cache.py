"""The states that a model's frozen layers give for each sample: computed once, kept in a folder beside the run.

    adapters/intents.run/prefix/
        train.safetensors  validation.safetensors      `states` (tokens, width): samples one after another, no padding
        prefix.json                                    what they were computed from, sha256 and size of the files, and
                                                       the digest of itself; written last

A folder that was computed from something else, or is damaged, is computed anew.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

import torch
from torch import Tensor

from lora_kit.data.batches import PREFIX_STATES, SAMPLE_WEIGHTS, Collator, EncodedDataset
from lora_kit.data.packing import PackedDataset
from lora_kit.errors import LoraKitError
from lora_kit.io.atomic_write import remove_leftovers, stage_folder
from lora_kit.io.read import exists, has_recorded_hash, hash_file, read_text
from lora_kit.io.safetensors import encode_header
from lora_kit.io.sealed_json import NO_DIGEST, SELF_DIGEST, is_intact, seal_json
from lora_kit.io.strict_json import parse_object
from lora_kit.models.frozen_prefix import FrozenPrefix, LayerOutput, PrefixStates, select_model_inputs
from lora_kit.torch_utils import use_eval_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

FOLDER: Final = "prefix"
MARKER: Final = "prefix.json"
_FORMAT: Final = 1
_MARKER_LIMIT: Final = 2**20
_STATES: Final = "states"
_BATCH_TOKENS: Final = 4096
"""Tokens of a batch, with padding, at most: without gradients, activations of one layer at a time are in memory."""

Samples: TypeAlias = EncodedDataset | PackedDataset
Facts: TypeAlias = Mapping[str, object]
"""What states were computed from, as JSON values."""


@dataclass(frozen=True)
class SamplesWithStates(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Samples with what frozen layers gave for them.

    Attributes:
        samples: without.
        states: of each sample.
    """

    samples: Samples
    states: PrefixStates

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return a sample with `prefix_states`, (length, width)."""
        return {**self.samples[index], PREFIX_STATES: self.states[index]}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True, kw_only=True)
class PrefixComputer:
    """Computes what a model's frozen layers give for samples.

    Attributes:
        model: with the adapter that is trained.
        prefix: its frozen layers.
        collator: joins samples into batches.
        autocast: enters the dtype that the training computes in.
        on_batch: called after each batch; what it raises ends the work.
    """

    model: PreTrainedModel
    prefix: FrozenPrefix
    collator: Collator
    autocast: Callable[[], AbstractContextManager[object]]
    on_batch: Callable[[], None]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def make_inputs(self, samples: Samples, indices: list[int]) -> dict[str, Tensor]:
        """Return samples as inputs of the model, without labels, with the mask also where the model gets none."""
        batch = self.collator([samples[index] for index in indices])
        left_out = ("labels", SAMPLE_WEIGHTS)
        return {name: tensor.to(self.device) for name, tensor in batch.items() if name not in left_out}

    def compute(self, samples: Samples, indices: list[int]) -> LayerOutput:
        """Return what the layers give for samples, padded on the right to the longest."""
        inputs = select_model_inputs(self.make_inputs(samples, indices))
        with use_eval_mode(self.model), torch.no_grad(), self.autocast():
            return self.prefix.compute_output(self.model, inputs)

    def fill(self, states: Tensor, samples: Samples, offsets: Tensor) -> None:
        """Compute the states of all samples, the longest first.

        Args:
            states: where they go, one sample after another: (tokens, width).
            offsets: index of the first token of each sample, and the number of tokens.
        """
        for indices in batch_by_tokens(offsets.diff(), _BATCH_TOKENS):
            rows = self.compute(samples, indices).states.to("cpu")
            for row, index in zip(rows, indices, strict=True):
                start, end = int(offsets[index]), int(offsets[index + 1])
                states[start:end] = row[: end - start]
            self.on_batch()


def batch_by_tokens(lengths: Tensor, most: int) -> Iterator[list[int]]:
    """Yield batches of indices, the longest samples first, of at most `most` tokens with padding, or one sample."""
    batch: list[int] = []
    for index in torch.argsort(lengths, descending=True, stable=True).tolist():
        if batch and (len(batch) + 1) * int(lengths[batch[0]]) > most:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def open_prefix_states(
    folder: Path, splits: Mapping[str, Samples], computer: PrefixComputer, facts: Facts
) -> dict[str, PrefixStates]:
    """Return the states of samples from a folder; where it does not hold them, compute and write them, all or nothing.

    Args:
        folder: where they are kept.
        splits: samples by the name of their file.
        facts: what decides the states, besides the layers.

    Raises:
        StorageError: the folder cannot be written.
    """
    first = computer.compute(next(iter(splits.values())), [0])
    width, dtype = first.states.shape[-1], first.states.dtype
    prefix = computer.prefix
    layers = {"path": prefix.path, "layers": len(prefix.layers), "width": width, "dtype": str(dtype)}
    expected = {
        "format": _FORMAT,
        **layers,
        **facts,
        "samples": {name: len(samples) for name, samples in splits.items()},
    }
    offsets = {name: _offset_samples(samples) for name, samples in splits.items()}
    if reason_not_usable(folder, expected) is not None:
        sizes = {name: (int(ends[-1]), width) for name, ends in offsets.items()}
        needed = sum(tokens * width for tokens, _ in sizes.values()) * dtype.itemsize
        with stage_folder(folder, replace=True, owned=_is_own, needed=needed) as staging:
            for name, samples in splits.items():
                states = _create_states(staging / f"{name}.safetensors", sizes[name], dtype)
                computer.fill(states, samples, offsets[name])
            _write_marker(staging, expected)
    return {
        name: PrefixStates(
            prefix, _map_states(folder / f"{name}.safetensors", (int(ends[-1]), width), dtype), ends, first.returned
        )
        for name, ends in offsets.items()
    }


def _offset_samples(samples: Samples) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), samples.lengths.cumsum(0)])


def _create_states(file: Path, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return states in a new file, whose space is reserved: writing to them cannot fail on a full disk."""
    header = encode_header([(_STATES, dtype, shape)])
    with open(file, "wb") as opened:
        opened.write(header)
        opened.flush()
        os.posix_fallocate(opened.fileno(), 0, len(header) + shape[0] * shape[1] * dtype.itemsize)
    return _map_states(file, shape, dtype)


def _map_states(file: Path, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return the states of a file, read and written where they are used."""
    start = len(encode_header([(_STATES, dtype, shape)])) // dtype.itemsize  # a header fills multiples of 8 bytes
    elements = torch.from_file(str(file), shared=True, size=start + shape[0] * shape[1], dtype=dtype)
    return elements[start:].view(shape)


def _write_marker(folder: Path, facts: Facts) -> None:
    files = {path.name: hash_file(path) for path in sorted(folder.iterdir())}
    record = {**facts, "files": files, SELF_DIGEST: NO_DIGEST}
    (folder / MARKER).write_text(seal_json(json.dumps(record, indent=2, sort_keys=True)), encoding="utf-8")


def reason_not_usable(folder: Path, facts: Facts) -> str | None:
    """Return why a folder does not hold the states that were computed from `facts`; None if it does."""
    if not exists(folder / MARKER):
        return "nothing was computed"
    try:
        text = read_text(folder / MARKER, limit=_MARKER_LIMIT)
        record = parse_object(text)
        files = record.pop("files", None)
        if not is_intact(record, text) or not isinstance(files, dict):
            return "it is damaged"
        record.pop(SELF_DIGEST)
        if record != json.loads(json.dumps(facts)):
            return "it was computed from something else"
        changed = [name for name, sums in files.items() if not has_recorded_hash(folder / name, sums)]
    except (LoraKitError, ValueError, OSError):
        return "it cannot be read"
    return "it is damaged" if changed else None


def remove_prefix_states(folder: Path) -> None:
    """Remove what was computed, and what a process that died left beside it; what is not ours stays."""
    if exists(folder.with_name(f".{folder.name}.lock")):
        remove_leftovers(folder)
    if _is_own(folder):
        for file in folder.glob("*.safetensors"):
            file.unlink()
        (folder / MARKER).unlink()  # last: what has the marker is ours
        folder.rmdir()


def _is_own(folder: Path) -> bool:
    return exists(folder / MARKER)
