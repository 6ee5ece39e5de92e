"""`generate`: several adapters complete one prompt, side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.adapter_like import AdapterLike
from lora_kit.bank.attach import attach
from lora_kit.bank.bank import AdapterBank
from lora_kit.errors import AdapterError, ConfigError, DataError, format_list
from lora_kit.generation.adapter_args import (
    build_adapter_labels,
    check_quantize,
    find_common_task,
    read_adapter,
)
from lora_kit.generation.decoding import Sampling, generate_batch
from lora_kit.generation.prompts import encode_prompt, resolve_styles
from lora_kit.generation.text_stream import TextStream
from lora_kit.models.loading import Base, load_base, load_input_spec
from lora_kit.models.tasks import SEQ2SEQ, TASKS, describe_peft_type, find_task_by_peft_type
from lora_kit.names import DEFAULT_STORE
from lora_kit.targets.legacy_names import convert_to_model_names


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The completion of one row.

    Attributes:
        name: the adapter's label, or `base`.
        prompt: the text that was given to the model.
        text: the generated text, without its end-of-text token.
        tokens: number of generated tokens, including the end-of-text token.
        ended: what ended it: `eos`; `max_new_tokens`; or `context`, if the context of the base was full.
    """

    name: str
    prompt: str
    text: str
    tokens: int
    ended: Literal["eos", "max_new_tokens", "context"]


def generate(
    base: str | Base,
    adapters: Sequence[AdapterLike | None],
    prompt: str,
    *,
    sampling: Sampling | None = None,
    template: Literal["adapter", "raw"] = "adapter",
    store: str | Path = DEFAULT_STORE,
    quantize: str | None = None,
    allow: Collection[str] = (),
    on_text: Callable[[int, str], None] | None = None,
) -> list[Generation]:
    """Complete a prompt with several adapters of one base, as one batch.

    Args:
        base: hub id, local folder, `kit-base`, or a loaded base; a loaded one is left as it was.
        adapters: one for each row: a folder, a name in `store`, a hub id, an Adapter, or None for the base itself.
        prompt: the prompt; for an adapter that was trained on conversations, the user's message.
        sampling: how the next token is chosen; greedily by default.
        template: `adapter` presents the prompt as each adapter saw prompts in training: in the chat template of its
            record, or followed by the separator there. The base gets what the first adapter beside it gets; alone, one
            that was merged or trained in every weight gets it as in training, any other as it is. `raw`: all as it is.
        store: where adapters are looked up by name.
        quantize: how to load the base, as in `load_base`.
        allow: as in `AdapterBank.load`.
        on_text: called with a row and its text so far each time the text grows.

    Returns:
        One result for each row, in the order of `adapters`.

    Raises:
        UnknownAdapterError: an adapter does not exist; nothing was loaded.
        AdapterError: an adapter does not generate text, cannot be read, or does not match the base.
        DataError: the prompt is blank without `raw`, has no token, is not text, or fills the base's context.
    """
    if not adapters:
        raise ConfigError("no row to generate was given", hint="name an adapter, or None for the base itself")
    _check_not_blank(prompt, template)
    sampling = sampling or Sampling()
    read = [read_adapter(adapter, store=store, allow=allow) for adapter in adapters]
    labels = build_adapter_labels(adapters, read)
    check_quantize(base, labels, read, quantize)
    loaded = load_for_generation(base, labels, read, quantize)
    styles = resolve_styles(loaded, read) if template == "adapter" else [""] * len(read)
    rows = [encode_prompt(loaded, prompt, style) for style in styles]
    limit, limited_by = _limit_new_tokens(loaded, max(len(row.ids) for row in rows), sampling.max_new_tokens)
    streamer = _RowStreamer(loaded, [row.ends for row in rows], on_text=on_text) if on_text else None
    by_label = dict(zip(labels, read, strict=True))
    with attach_adapters(loaded.model, by_label, allow=allow) as bank, route_rows(bank, labels):
        completions = generate_batch(loaded, rows, sampling=sampling, limit=limit, streamer=streamer)
    return [
        Generation(
            name=label,
            prompt=row.text,
            text=completion.text,
            tokens=len(completion.ids),
            ended="eos" if completion.ended else limited_by,
        )
        for label, row, completion in zip(labels, rows, completions, strict=True)
    ]


def _check_not_blank(prompt: str, template: str) -> None:
    if isinstance(prompt, str) and not prompt.strip() and template != "raw":
        hint = "a raw one (--raw) may be blank: the model goes on from its first token"
        raise DataError("the prompt is empty", hint=hint)


@contextlib.contextmanager
def attach_adapters(
    model: nn.Module, adapters: Mapping[str, Adapter | None], *, allow: Collection[str] = ()
) -> Iterator[AdapterBank | None]:
    """Attach a bank with these adapters to a model for the length of a block; yield None without any.

    Args:
        adapters: by label; None for the base.
        allow: as in `AdapterBank.load`.

    Raises:
        AdapterError, BaseMismatchError: an adapter does not match the model, which is left as it was.
    """
    # Converted first: a conversion may raise the rank that the bank needs.
    present = {
        label: convert_to_model_names(label, adapter, model)
        for label, adapter in adapters.items()
        if adapter is not None
    }
    if not present:
        yield None
        return
    bank = attach(model, slots=len(present), max_rank=max(1, *(a.config.largest_rank for a in present.values())))
    try:
        for label, adapter in present.items():
            bank.load(label, adapter, allow=allow)
        yield bank
    finally:
        bank.detach()


def route_rows(bank: AdapterBank | None, labels: Sequence[str]) -> contextlib.AbstractContextManager[None]:
    """Route each row of a batch to the adapter of its label for the length of a block; other labels to the base."""
    if bank is None:
        return contextlib.nullcontext()
    return bank.rows([label if label in bank.names else None for label in labels])


def load_for_generation(
    base: str | Base, labels: Sequence[str], adapters: Sequence[Adapter | None], quantize: str | None
) -> Base:
    """Load the base for the task of the adapters; a base alone for its own task."""
    for label, adapter in zip(labels, adapters, strict=True):
        task_type = adapter.config.task_type if adapter is not None else None
        spec = find_task_by_peft_type(task_type)
        if task_type is not None and not (spec and spec.is_generative):
            hint = "lora-kit predict" if spec else f"tasks: {format_list(TASKS)}"
            raise AdapterError(f"adapter {label!r} is for {describe_peft_type(task_type)}, and writes none", hint=hint)
    task = find_common_task(labels, adapters)
    if not isinstance(base, str):
        return base
    return load_base(base, task=task or load_input_spec(base).generative_task, quantize=quantize)


def _limit_new_tokens(base: Base, longest: int, requested: int) -> tuple[int, Literal["max_new_tokens", "context"]]:
    """Return how many tokens may be generated after prompts of at most `longest` tokens, and what limits them."""
    context = base.max_length
    if longest >= context:
        raise DataError(f"the prompt has {longest:,} tokens; the base reads {context:,}", hint="shorten the prompt")
    budget = context - (1 if base.task == SEQ2SEQ else longest)
    return (requested, "max_new_tokens") if requested <= budget else (budget, "context")


class _RowStreamer:
    """A streamer of transformers for a batch: decodes each row as it grows and reports its text so far."""

    def __init__(self, base: Base, ends: Sequence[Collection[int]], *, on_text: Callable[[int, str], None]) -> None:
        self._ends = ends
        self._texts = [TextStream(base.tokenizer) for _ in ends]
        self._open = set(range(len(ends)))
        self._on_text = on_text
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Receive the prompts, once, then one new token for each row: int64 (rows,)."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for row, token in enumerate(value.tolist()):
            if row in self._open:
                self._report(row, self._texts[row].push(token))
                if token in self._ends[row]:
                    self._close(row)

    def end(self) -> None:
        """Report what was held back of rows that were cut off: a character that no token will complete."""
        for row in sorted(self._open):
            self._close(row)

    def _close(self, row: int) -> None:
        self._open.remove(row)
        self._report(row, self._texts[row].finish())

    def _report(self, row: int, added: str) -> None:
        if added:
            self._on_text(row, self._texts[row].text)
