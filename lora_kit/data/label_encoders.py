"""Texts and words with labels as samples.

    label        text with the tokenizer's own special tokens loss on the label, the labels or the number
    words        the words as one text, encoded like `label`  loss on the first token of each word that has a label

A text that is too long loses its end, and so do words, with their labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lora_kit.data.batches import IGNORE_INDEX
from lora_kit.data.cells import RowError
from lora_kit.data.layouts import RowValue
from lora_kit.data.row_encoders import EncodedRow
from lora_kit.data.rows import Rows
from lora_kit.data.sample_format import SampleFormat
from lora_kit.data.text_tokens import tokenize_texts, tokenize_words
from lora_kit.errors import format_list
from lora_kit.io.text import parse_number
from lora_kit.models.protocols import Tokenizer
from lora_kit.models.tasks import MULTI_LABEL, REGRESSION


def encode_labeled_texts(rows: Rows, tokenizer: Tokenizer, sample_format: SampleFormat) -> Iterator[EncodedRow]:
    """Encode texts, or pairs of texts, with what is to be predicted of each: a long one loses its end."""
    texts = tokenize_texts([value[0] for value in rows.values], tokenizer, max_length=sample_format.max_length)
    for value, text in zip(rows.values, texts, strict=True):
        try:
            target = _encode_target(value[1], sample_format)
        except RowError as error:
            yield EncodedRow(text.length, error=error)
            continue
        yield EncodedRow(text.length, [(text.ids, target)], cut=text.is_cut, types=text.types, weight=weight_of(value))


def weight_of(value: RowValue) -> float:
    """Return the weight of a labeled text, or of labeled words, in the loss."""
    return float(value[2]) if len(value) > 2 else 1.0


def _encode_target(label: object, sample_format: SampleFormat) -> list[float]:
    """Return what is to be predicted: a class, a 0 or 1 for each class, or a number.

    Raises:
        RowError: a label is unknown, or has another form than those of the training rows.
    """
    label2id = sample_format.label2id
    if sample_format.problem == REGRESSION:
        number = parse_number(label)
        if number is None:
            raise RowError(f"label must be a number; {label!r} was given")
        return [number]
    if isinstance(label, tuple) != (sample_format.problem == MULTI_LABEL):
        expected = "one label" if isinstance(label, tuple) else "a list of labels"
        raise RowError(f"{expected} is expected, as in the training rows; {label!r} was given")
    if isinstance(label, tuple):
        classes = {_find_class(each, label2id) for each in label}
        return [float(number in classes) for number in range(len(label2id))]
    return [_find_class(label, label2id)]


def _find_class(label: object, label2id: Mapping[str, int]) -> int:
    name = str(label)
    if name not in label2id:
        raise RowError(_describe_unknown_label(name, label2id))
    return label2id[name]


def encode_labeled_words(rows: Rows, tokenizer: Tokenizer, sample_format: SampleFormat) -> Iterator[EncodedRow]:
    """Encode words with one label each, joined by single spaces, as in the running text that a model is used on."""
    label2id = sample_format.label2id
    for value in rows.values:
        words, labels = value[:2]
        text = tokenize_words(words, tokenizer, max_length=sample_format.max_length)
        reason = _reason_not_labelable(words, labels, text.tokenless, label2id)
        if reason:
            yield EncodedRow(text.length, error=RowError(reason))
            continue
        token_labels = [IGNORE_INDEX] * len(text.ids)
        for number, token in text.first_tokens.items():
            token_labels[token] = label2id[str(labels[number - 1])]
        yield EncodedRow(text.length, [(text.ids, token_labels)], cut=text.is_cut, weight=weight_of(value))


def _reason_not_labelable(
    words: Sequence[str], labels: Sequence[str | int], tokenless: Sequence[int], label2id: Mapping[str, int]
) -> str | None:
    """Return which word has no token for its label, or which label is unknown; None if there is neither."""
    if tokenless:
        return f"word {tokenless[0]} ({words[tokenless[0] - 1]!r}) has no token of its own"
    unknown = next((str(label) for label in labels if str(label) not in label2id), None)
    return None if unknown is None else _describe_unknown_label(unknown, label2id)


def _describe_unknown_label(label: str, label2id: Mapping[str, int]) -> str:
    return f"label {label!r} is not one of {format_list(list(label2id))}, which are those of the training rows"
