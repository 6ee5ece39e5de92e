"""One prompt, several adapters, side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lora_kit.adapter.adapter import Adapter
from lora_kit.bank.bank import AdapterBank, attach
from lora_kit.errors import AdapterError, ConfigError, DataError
from lora_kit.generation.adapter_args import AdapterSource, check_quantize, labels_of, read_adapter, task_of
from lora_kit.generation.decoding import Sampling, decode_ids, generate_batch
from lora_kit.generation.prompts import encode_prompt, resolve_styles
from lora_kit.models.loading import Base, load_base, load_input_spec
from lora_kit.models.tasks import SEQ2SEQ, find_task_by_peft_type
from lora_kit.names import DEFAULT_STORE
from lora_kit.targets.legacy_names import convert_to_model_names


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one row answered.

    Attributes:
        name: the adapter's label, or `base`.
        prompt: the text the model was given.
        text: what it wrote, without its end-of-text token.
        tokens: how many it wrote, the end-of-text token included.
        ended: `eos`; `max_new_tokens`; or `context`, where the base can read no further.
    """

    name: str
    prompt: str
    text: str
    tokens: int
    ended: Literal["eos", "max_new_tokens", "context"]


def generate(
    base: str | Base,
    adapters: Sequence[AdapterSource],
    prompt: str,
    *,
    sampling: Sampling | None = None,
    template: Literal["adapter", "raw"] = "adapter",
    store: str | Path = DEFAULT_STORE,
    quantize: str | None = None,
    allow: Collection[str] = (),
    on_text: Callable[[int, str], None] | None = None,
) -> list[Generation]:
    """Let several adapters of one base answer a prompt, as one batch.

    Args:
        base: hub id, local folder, `kit-base`, or a loaded base; a loaded one is left as it was.
        adapters: one per row: a folder, a name in `store`, an id of the hub, an Adapter, or None for the base itself.
        prompt: what is asked; of an adapter that was trained on conversations, the user's message.
        sampling: how the next token is chosen; the likeliest one by default.
        template: `adapter` puts the prompt as each adapter saw prompts in training: in the chat template of its record,
            or followed by the separator there. The base itself gets what the first adapter beside it gets, so that only
            the adapter differs; alone it gets the prompt as it is. `raw` gives every row the prompt as it is.
        store: where adapters are looked up by name.
        quantize: how to load the base, as in `load_base`.
        allow: as in `AdapterBank.load`.
        on_text: called with a row and its text so far each time the text grows.

    Returns:
        One result per row, in the order of `adapters`.

    Raises:
        UnknownAdapterError: an adapter that is not there; nothing was loaded.
        AdapterError: an adapter that does not generate text, cannot be read, or does not fit the base.
        DataError: the prompt has no token, is not text, or fills the base's context.
    """
    if not adapters:
        raise ConfigError("no row to generate was given", hint="name an adapter, or None for the base itself")
    sampling = sampling or Sampling()
    values = [read_adapter(adapter, store=store, allow=allow) for adapter in adapters]
    labels = labels_of(adapters, values)
    check_quantize(base, labels, values, quantize)
    loaded = _load_for_generation(base, labels, values, quantize)
    own = resolve_styles(values, base_alone="") if template == "adapter" else [""] * len(values)
    rows = [encode_prompt(loaded, prompt, style) for style in own]
    limit, limited_by = _limit_new_tokens(loaded, max(len(row.ids) for row in rows), sampling.max_new_tokens)
    growing = _RowStreamer(loaded, [row.ends for row in rows], on_text=on_text) if on_text else None
    by_label = dict(zip(labels, values, strict=True))
    with attach_adapters(loaded.model, by_label, allow=allow) as bank, route_rows(bank, labels):
        written = generate_batch(loaded, rows, sampling=sampling, limit=limit, streamer=growing)
    return [
        Generation(
            name=label,
            prompt=row.text,
            text=found.text,
            tokens=len(found.ids),
            ended="eos" if found.ended else limited_by,
        )
        for label, row, found in zip(labels, rows, written, strict=True)
    ]


@contextlib.contextmanager
def attach_adapters(
    model: Any, adapters: Mapping[str, Adapter | None], *, allow: Collection[str] = ()
) -> Iterator[AdapterBank | None]:
    """A bank with these adapters beside a model for the length of a block; None where there are none.

    Raises:
        AdapterError, BaseMismatchError: one does not fit the model, which is as it was.
    """
    values = {
        label: convert_to_model_names(label, adapter, model)
        for label, adapter in adapters.items()
        if adapter is not None
    }
    if not values:
        yield None
        return
    bank = attach(model, slots=len(values), max_rank=max(1, *(v.config.largest_rank for v in values.values())))
    try:
        for label, adapter in values.items():
            bank.load(label, adapter, allow=allow)
        yield bank
    finally:
        bank.detach()


def route_rows(bank: AdapterBank | None, labels: Sequence[str]) -> contextlib.AbstractContextManager[None]:
    """Each row of a batch to the adapter of its label for the length of a block; a label without one is the base's."""
    if bank is None:
        return contextlib.nullcontext()
    return bank.rows([label if label in bank.names else None for label in labels])


def _load_for_generation(
    base: str | Base, labels: Sequence[str], values: Sequence[Adapter | None], quantize: str | None
) -> Base:
    """The base, loaded for what the adapters were made for; on its own for what it is."""
    for label, value in zip(labels, values, strict=True):
        kind = value.config.task_type if value is not None else None
        spec = find_task_by_peft_type(kind)
        if kind is not None and not (spec and spec.is_generative):
            hint = "`lora-kit eval FILE --out said.jsonl` says what it makes of texts"
            raise AdapterError(f"adapter {label!r} was made for {kind}: it does not write text", hint=hint)
    task = task_of(labels, values)
    if not isinstance(base, str):
        return base
    return load_base(base, task=task or load_input_spec(base).generative_task, quantize=quantize)


def _limit_new_tokens(base: Base, longest: int, wanted: int) -> tuple[int, Literal["max_new_tokens", "context"]]:
    """How many tokens may be written, and what limits them."""
    context = base.max_length
    if longest >= context:
        raise DataError(f"the prompt has {longest:,} tokens; the base reads {context:,}", hint="shorten the prompt")
    room = context - (1 if base.task == SEQ2SEQ else longest)
    return (wanted, "max_new_tokens") if wanted <= room else (room, "context")


class _RowStreamer:
    """A transformers streamer over a batch: decodes each row as it grows and passes its text on."""

    def __init__(self, base: Base, ends: Sequence[Collection[int]], *, on_text: Callable[[int, str], None]) -> None:
        self._tokenizer = base.tokenizer
        self._ends = ends
        self._ids: list[list[int]] = [[] for _ in ends]
        self._shown = [""] * len(ends)
        self._open = [True] * len(ends)
        self._on_text = on_text
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Takes what stands before the texts, once, then one new token per row."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for row, token in enumerate(value.tolist()):
            if not self._open[row]:
                continue
            self._ids[row].append(token)
            self._open[row] = token not in self._ends[row]
            # A character of several tokens decodes to a replacement mark until its last token is there.
            text = decode_ids(self._tokenizer, self._ids[row])
            if text != self._shown[row] and not text.endswith("\N{REPLACEMENT CHARACTER}"):
                self._shown[row] = text
                self._on_text(row, text)

    def end(self) -> None:
        """Nothing is held back."""
