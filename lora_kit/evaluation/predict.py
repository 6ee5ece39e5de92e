"""`predict`: labels, numbers and entities of texts by one adapter, and how sure it is of them."""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeAlias

import torch
from torch import Tensor

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.adapter_like import AdapterLike
from lora_kit.bank.bank import AdapterBank
from lora_kit.config.validation import is_whole_number, require
from lora_kit.data.batches import IGNORE_INDEX, Collator, join_samples
from lora_kit.data.label_columns import TextInput
from lora_kit.data.sample_format import SampleFormat
from lora_kit.data.text_tokens import TextTokens, tokenize_texts, tokenize_words
from lora_kit.errors import ConfigError, DataError
from lora_kit.evaluation.adapter_format import (
    build_prediction_format,
    check_inputs,
    find_adapter_labels,
    find_adapter_problem,
    find_thresholds,
)
from lora_kit.evaluation.forward import batch_by_length, choose_classes, compute_scores
from lora_kit.evaluation.label_base import load_for_labels
from lora_kit.evaluation.prediction import Entity, Prediction
from lora_kit.evaluation.scores import find_entities, is_bio_scheme
from lora_kit.generation.adapter_args import build_adapter_labels, find_common_task, read_adapter
from lora_kit.generation.generate import attach_adapters
from lora_kit.io.text import format_value
from lora_kit.models.checkpoint_head import find_checkpoint_problem, find_checkpoint_task
from lora_kit.models.loading import Base
from lora_kit.models.tasks import CLASSIFY, LABEL, LABEL_TASKS, PROBLEM_KINDS, SINGLE_LABEL, TOKENS, VALUE, WORD
from lora_kit.names import DEFAULT_STORE
from lora_kit.torch_utils import use_eval_mode

PredictionInput: TypeAlias = TextInput | Sequence[str]
"""A text; for `classify` also two texts as a tuple; for `tokens` also a list of words."""

_PARTS: Final = re.compile(r"\w+|[^\w\s]")
"""A word of running text, a mark, or an accent or vowel sign that belongs to the letter before it."""
_JOINERS: Final = ("\u200c", "\u200d")
"""Invisible characters inside words of Persian and of the languages of India."""


def predict(
    base: str | Base,
    adapter: AdapterLike | None,
    inputs: Sequence[PredictionInput],
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    store: str | Path = DEFAULT_STORE,
    quantize: str | None = None,
    allow: Collection[str] = (),
) -> list[Prediction]:
    """Return what an adapter of task `classify` or `tokens` predicts of each text, with probabilities.

    Texts are put to it as in its training. A text of `tokens` is taken apart into words and marks; a list of words is
    taken as it is, and offsets then count in the words joined by single spaces.

    Args:
        base: hub id, local folder, `kit-base`, or a loaded base; a loaded one is left as it was.
        adapter: folder, name in `store`, hub id or Adapter; None for the base's own head.
        inputs: texts, pairs of texts as tuples, or lists of words.
        batch_size: texts in one batch.
        max_length: most tokens of a text; None for what the adapter was trained with.
        store: where adapters are looked up by name.
        quantize: how to load the base, as in `load_base`.
        allow: as in `AdapterBank.load`.

    Raises:
        ConfigError: the adapter generates texts, or a value is out of range.
        UnknownAdapterError, AdapterError: the adapter does not exist, cannot be read, or does not match the base.
        DataError: a text is empty, or of a form that the task does not take or the adapter was not trained on.
        BaseModelError: the base cannot be found or read.

    Example:
        lk.predict("base", "adapters/a", ["a text"])[0].label
    """
    options = {"batch_size": batch_size, "max_length": max_length, "store": store, "quantize": quantize, "allow": allow}
    with open_predictors(base, [adapter], **options) as [predictor]:  # type: ignore[arg-type]
        return predictor.predict(inputs)


@contextlib.contextmanager
def open_predictors(
    base: str | Base,
    adapters: Sequence[AdapterLike | None],
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    store: str | Path = DEFAULT_STORE,
    quantize: str | None = None,
    allow: Collection[str] = (),
) -> Iterator[list[Predictor]]:
    """Load a base with adapters for the length of a block; arguments and errors as in `predict`.

    Adapters with the same labels share one loaded base; others have one each, since its head is of their size.
    """
    require(is_whole_number(batch_size) and batch_size >= 1, "batch_size", batch_size, "a whole number from 1")
    fits = max_length is None or (is_whole_number(max_length) and max_length >= 2)
    require(fits, "max_length", max_length, "a whole number from 2")
    read = [read_adapter(adapter, store=store, allow=allow) for adapter in adapters]
    labels = build_adapter_labels(adapters, read)
    opened: dict[str, Predictor] = {}
    with contextlib.ExitStack() as stack:
        for (task, problem, _), group in _group_by_head(base, dict(zip(labels, read, strict=True))).items():
            loaded = load_for_labels(base, group, task, quantize, problem=problem)
            bank = stack.enter_context(attach_adapters(loaded.model, group, allow=allow))
            for label, adapter in group.items():
                form = build_prediction_format(loaded, adapter, max_length=max_length, problem=problem)
                thresholds = find_thresholds((loaded if adapter is None else adapter).record, form.labels)
                opened[label] = Predictor(label, adapter, loaded, form, thresholds, batch_size, bank=bank)
        yield [opened[label] for label in labels]


def _group_by_head(
    base: str | Base, adapters: Mapping[str, Adapter | None]
) -> dict[tuple[str, str | None, tuple[str, ...]], dict[str, Adapter | None]]:
    """Return the adapters by task, problem and labels: those of one head. A base without an adapter has its own."""
    groups: dict[tuple[str, str | None, tuple[str, ...]], dict[str, Adapter | None]] = {}
    for label, adapter in adapters.items():
        names = () if adapter is None or isinstance(base, Base) else find_adapter_labels(adapter)
        groups.setdefault((*_resolve_task(base, label, adapter), names), {})[label] = adapter
    return groups


def _resolve_task(base: str | Base, label: str, adapter: Adapter | None) -> tuple[str, str | None]:
    """Return the task, and the problem of task `classify`."""
    task = find_common_task([label], [adapter])
    if isinstance(base, Base):
        if task not in (None, base.task):
            raise ConfigError(f"the adapter is for task {task}, the base given was loaded for {base.task}")
        task = base.task
    task = task or find_checkpoint_task(base)  # type: ignore[arg-type]  # a loaded base has a task
    if task not in LABEL_TASKS:
        raise ConfigError(f"{label} writes texts (task {task}); predict is for labels", hint="lora-kit generate")
    if task != CLASSIFY:
        return task, None
    recorded = None if adapter is None else find_adapter_problem(adapter)
    own = base.problem if isinstance(base, Base) else find_checkpoint_problem(base)
    return task, recorded or own or SINGLE_LABEL


class Predictor:
    """Predicts with one adapter of a bank, or with a base alone.

    Attributes:
        name: of the adapter, or `base`.
        task: `classify` or `tokens`.
        kind: what is predicted: the kind of the samples.
        labels: the names of the labels in the order of the classes.
    """

    def __init__(
        self,
        name: str,
        adapter: Adapter | None,
        base: Base,
        sample_format: SampleFormat,
        thresholds: Sequence[float],
        batch_size: int,
        *,
        bank: AdapterBank | None,
    ) -> None:
        self.name, self._adapter, self._bank = name, adapter, bank
        self._base, self._format, self._thresholds, self._batch_size = base, sample_format, thresholds, batch_size
        self._collator = Collator(base.pad_token_id, takes_types=base.takes_token_types)
        self.task, self.labels = base.task, sample_format.labels
        self.kind = WORD if base.task == TOKENS else PROBLEM_KINDS[sample_format.problem]

    def predict(self, inputs: Sequence[PredictionInput]) -> list[Prediction]:
        """Return what is predicted of each text, in their order.

        Raises:
            DataError: a text is empty, or of a form that the task does not take.
        """
        if isinstance(inputs, (str, bytes)) or not isinstance(inputs, Sequence):
            raise DataError(f"inputs must be a list; {format_value(inputs)} was given", hint='["a text"]')
        if self.task == TOKENS:
            return self._predict_words([_find_words(number, each) for number, each in enumerate(inputs, start=1)])
        texts = [_check_text(number, each) for number, each in enumerate(inputs, start=1)]
        if len({isinstance(text, tuple) for text in texts}) > 1:
            raise DataError("some inputs are pairs of texts and others are texts", hint="give all of one form")
        if texts:
            check_inputs(self._base, self.name, self._adapter, are_pairs=isinstance(texts[0], tuple))
        tokens = list(tokenize_texts(texts, self._base.tokenizer, max_length=self._format.max_length))
        rows = self._run(tokens)
        scores = torch.stack([compute_scores(row[None], self.kind)[0] for row in rows]) if rows else torch.empty(0, 1)
        chosen = choose_classes(scores, self.kind, self._thresholds) or ((),) * len(rows)
        return [
            self._describe_text(row, classes, cut=text.is_cut)
            for row, classes, text in zip(scores, chosen, tokens, strict=True)
        ]

    def _describe_text(self, scores: Tensor, classes: Sequence[int], *, cut: bool) -> Prediction:
        if self.kind == VALUE:
            return Prediction(value=float(scores[0]), cut=cut)
        probabilities = dict(zip(self.labels, scores.tolist(), strict=True))
        return Prediction(labels=tuple(self.labels[number] for number in classes), probabilities=probabilities, cut=cut)

    def _run(self, tokens: Sequence[TextTokens]) -> list[Tensor]:
        """Return the logits of each text: (classes,), or (length, classes) for words; padding is not in them."""
        types = [text.types or [0] * len(text.ids) for text in tokens] if any(text.types for text in tokens) else None
        count = [len(text.ids) if self.kind == WORD else 1 for text in tokens]
        rows = [(text.ids, [IGNORE_INDEX] * number) for text, number in zip(tokens, count, strict=True)]
        samples = join_samples(rows, kind=WORD if self.kind == WORD else LABEL, types=types)
        logits: dict[int, Tensor] = {}
        with use_eval_mode(self._base.model), torch.no_grad(), self._route():
            for indices in batch_by_length(samples.lengths, self._batch_size):
                batch = self._collator([samples[index] for index in indices])
                inputs = {name: tensor.to(self._base.device) for name, tensor in batch.items() if name != "labels"}
                outputs = self._base.model(**inputs).logits.float().cpu()
                ends = [len(tokens[index].ids) if self.kind == WORD else None for index in indices]
                logits |= {index: row[:end] for index, row, end in zip(indices, outputs, ends, strict=True)}
        return [logits[index] for index in range(len(tokens))]

    def _route(self) -> contextlib.AbstractContextManager[None]:
        if self._bank is None:
            return contextlib.nullcontext()
        return self._bank.using(self.name if self.name in self._bank.names else None)

    # Words

    def _predict_words(self, texts: Sequence[_Words]) -> list[Prediction]:
        limit, tokenizer = self._format.max_length, self._base.tokenizer
        tokens = [tokenize_words(text.words, tokenizer, max_length=limit) for text in texts]
        return [self._describe_words(*each) for each in zip(texts, tokens, self._run(tokens), strict=True)]

    def _describe_words(self, text: _Words, tokens: TextTokens, logits: Tensor) -> Prediction:
        probabilities = logits.softmax(-1)
        best = {number: probabilities[token].max(-1) for number, token in tokens.first_tokens.items()}
        numbers = range(1, len(text.words) + 1)
        labels = [self.labels[int(best[number].indices)] if number in best else None for number in numbers]
        sure = [float(best[number].values) if number in best else 0.0 for number in numbers]
        return Prediction(
            labels=tuple(labels), entities=tuple(self._mark_entities(text, labels, sure)), cut=tokens.is_cut
        )

    def _mark_entities(self, text: _Words, labels: Sequence[str | None], sure: Sequence[float]) -> Iterator[Entity]:
        if is_bio_scheme(self.labels):
            spans = find_entities([label or "O" for label in labels])
        else:
            spans = [(number, number + 1, label) for number, label in enumerate(labels) if label is not None]
        for first, last, label in spans:
            start, end = text.starts[first], text.starts[last - 1] + len(text.words[last - 1])
            yield Entity(label, text.text[start:end], start, end, min(sure[first:last]))


class _Words:
    """A text, its words, and where each begins in it."""

    def __init__(self, text: str, words: Sequence[str], starts: Sequence[int]) -> None:
        self.text, self.words, self.starts = text, words, starts


def _find_words(number: int, value: PredictionInput) -> _Words:
    if isinstance(value, str):
        spans = _split_words(_require_text(number, value))
        return _Words(value, [value[start:end] for start, end in spans], [start for start, _ in spans])
    words = [_require_text(number, word) for word in value]
    if not words:
        raise DataError(f"input {number} has no word")
    starts = [sum(len(word) + 1 for word in words[:index]) for index in range(len(words))]
    return _Words(" ".join(words), words, starts)


def _split_words(text: str) -> list[tuple[int, int]]:
    """Return where the words and marks of a running text begin and end."""
    spans: list[tuple[int, int]] = []
    is_open = False  # whether the last word ended with a sign, after which it may go on
    for match in _PARTS.finditer(text):
        is_sign = match[0] in _JOINERS or unicodedata.category(match[0][0]).startswith("M")
        is_next = bool(spans) and spans[-1][1] == match.start()
        if is_next and (is_sign or (is_open and match[0][0].isalnum())):
            spans[-1] = (spans[-1][0], match.end())
        else:
            spans.append(match.span())
        is_open = is_sign
    return spans


def _check_text(number: int, value: PredictionInput) -> TextInput:
    if isinstance(value, str):
        return _require_text(number, value)
    if not isinstance(value, tuple) or len(value) != 2:
        raise DataError(f"input {number} must be a text, or two texts as a tuple; {type(value).__name__} was given")
    return _require_text(number, value[0]), _require_text(number, value[1])


def _require_text(number: int, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"input {number} must be a text that is not empty; {value!r} was given")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"input {number} holds half a surrogate pair, which is not text") from None
    return value
