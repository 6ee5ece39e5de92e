"""The rows that a recipe names: all of them in memory, or streamed from the disk."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from lora_kit.data.batches import EncodedDataset
from lora_kit.data.encode import RowCounts, encode_and_count, encode_chunk, log_counts
from lora_kit.data.layouts import FORMATS
from lora_kit.data.mixture import has_text_pairs, read_source
from lora_kit.data.preferences import describe_use
from lora_kit.data.row_stream import StreamedSource
from lora_kit.data.rows import Rows
from lora_kit.data.sample_format import SampleFormat
from lora_kit.data.sample_store import read_samples, write_samples
from lora_kit.errors import DataError, format_list
from lora_kit.io.text import escape_text
from lora_kit.models.protocols import Tokenizer
from lora_kit.training.loop.checkpoints import hash_json
from lora_kit.training.recipe.objectives import SFT, find_formats, find_layout_finder
from lora_kit.training.recipe.recipe import Recipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecipeRows:
    """The rows of a recipe.

    Attributes:
        train: of the training files; of a stream the first ones.
        validation: of the validation files; None without any.
        stream: the training rows on the disk, where the recipe says `data.streaming`.
    """

    train: Rows
    validation: Rows | None
    stream: StreamedSource | None = None

    def hash_train(self) -> str:
        """Return a digest of the training rows."""
        return hash_json({"rows": self.train.values if self.stream is None else self.stream.identity})


def read_recipe_rows(recipe: Recipe) -> RecipeRows:
    """Return the rows of the training and of the validation files.

    Raises:
        DataError: the task does not take their format, or they have different formats.
    """
    stream = None
    if recipe.data.streaming:
        stream = StreamedSource.open(recipe.data.train, split="train", seed=recipe.seed)
    find = find_layout_finder(recipe.objective)
    if stream is None:
        train = read_source(recipe.data.train, split="train", seed=recipe.seed, find=find)
    else:
        train = stream.first
    _check_format(train, recipe)
    if recipe.data.validation is None:
        logger.info("no evaluation: the recipe has no data.validation")
        return RecipeRows(train, None, stream)
    validation = read_source(recipe.data.validation, split="validation", seed=recipe.seed, find=find)
    _check_format(validation, recipe)
    if validation.format != train.format:
        formats = " and ".join(f"{rows.path} has rows of the format {rows.format}" for rows in (train, validation))
        raise DataError(formats, hint="both files of a recipe have one format")
    if has_text_pairs(validation) != has_text_pairs(train):
        which, other = (train, validation) if has_text_pairs(train) else (validation, train)
        what = f"{which.path} has pairs of texts, and {other.path} has single texts"
        raise DataError(what, hint="both files of a recipe have text_pair, or neither has")
    return RecipeRows(train, validation, stream)


def _check_format(rows: Rows, recipe: Recipe) -> None:
    """Raise DataError unless the recipe's task and objective take rows of this format."""
    formats = find_formats(recipe.objective, recipe.task)
    if rows.format not in formats:
        what = f"task {recipe.task}" if recipe.objective == SFT else f"objective {recipe.objective}"
        raise DataError(
            f"{rows.path} has rows of the format {rows.format}; {what} takes {format_list(formats)}",
            hint=describe_use(rows.format) or _describe_task(rows.format, recipe.objective),
        )


def _describe_task(row_format: str, objective: str) -> str:
    """Return what learns from rows of a format that holds no preferences."""
    task = next(task for task, formats in FORMATS.items() if row_format in formats)
    return f"task: {task} takes these rows" + ("" if objective == SFT else f", with objective: {SFT}")


def encode_training_rows(
    rows: RecipeRows, tokenizer: Tokenizer, sample_format: SampleFormat, *, folder: Path | None
) -> tuple[EncodedDataset, RowCounts]:
    """Return the training samples, mapped from the disk if the rows are streamed, and the counts of the rows.

    Args:
        folder: where the samples of a stream are kept, and found again by the next run of the same recipe; None for
            files that go with the process.
    """
    if rows.stream is None:
        return encode_and_count(rows.train, tokenizer, sample_format)
    made_from = _describe_origin(rows.stream, tokenizer, sample_format)
    if folder is not None:
        return _store_samples(rows.stream, tokenizer, sample_format, folder, made_from)
    with tempfile.TemporaryDirectory(prefix="lora-kit-") as scratch:  # what is mapped outlives its name
        return _store_samples(rows.stream, tokenizer, sample_format, Path(scratch, "samples"), made_from)


def _store_samples(
    stream: StreamedSource,
    tokenizer: Tokenizer,
    sample_format: SampleFormat,
    folder: Path,
    made_from: dict[str, object],
) -> tuple[EncodedDataset, RowCounts]:
    """Return the samples of a folder, after writing them where they are not there yet."""
    found = read_samples(folder, made_from=made_from)
    if found is not None:
        logger.info("%d samples from %s, where an earlier run has left them", len(found[0]), escape_text(folder))
        return found
    write_samples(folder, _encode_chunks(stream, tokenizer, sample_format), made_from=made_from)
    found = read_samples(folder, made_from=made_from)
    assert found is not None
    samples, counts = found
    logger.info("%d samples of %d streamed rows in %s", len(samples), counts.rows, escape_text(folder))
    log_counts(stream.first, counts, samples.kind, sample_format)
    return found


def _encode_chunks(
    stream: StreamedSource, tokenizer: Tokenizer, sample_format: SampleFormat
) -> Iterator[tuple[EncodedDataset, RowCounts]]:
    return (encode_chunk(rows, tokenizer, sample_format) for rows in stream.chunks())


def _describe_origin(stream: StreamedSource, tokenizer: Tokenizer, sample_format: SampleFormat) -> dict[str, object]:
    """Return everything that decides the samples of a stream."""
    template = sample_format.template
    packages = ("lora-kit", "transformers", "tokenizers")
    return {
        "rows": stream.identity,
        "format": {
            "max_length": sample_format.max_length,
            "separator": sample_format.separator,
            "template": None if template is None else [template.text, dict(template.variables)],
            "learn": sample_format.learn,
            "task": sample_format.task,
        },
        "tokenizer": _hash_tokenizer(tokenizer),
        "versions": {name: metadata.version(name) for name in packages},
    }


def _hash_tokenizer(tokenizer: Tokenizer) -> str:
    """Return the sha256 of the files that a tokenizer is saved as, in hex."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix="lora-kit-") as scratch:
        tokenizer.save_pretrained(scratch)
        for path in sorted(Path(scratch).rglob("*")):
            if path.is_file():
                digest.update(f"{path.relative_to(scratch)}\0{path.stat().st_size}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()
