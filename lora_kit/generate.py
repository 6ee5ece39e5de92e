"""One prompt, several adapters, side by side: the rows of one batch, each routed to its own adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor

from lora_kit.adapter import Adapter
from lora_kit.bank import attach
from lora_kit.data.chat import ChatTemplate
from lora_kit.errors import AdapterError, ConfigError, DataError
from lora_kit.inspect import STORE, find_adapter
from lora_kit.models import DEFAULT_SEPARATOR, Base, load_base, prompt_ids, render_prompt

if TYPE_CHECKING:
    from transformers import GenerationConfig

BASE_ROW: Final = "base"
"""What the row of the base itself is called."""
_GENERATES: Final = (None, "CAUSAL_LM")


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


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: most tokens a row may write.
        temperature: 0 takes the likeliest token; above 0 samples, after dividing the logits by it.
        top_p: samples from the likeliest tokens whose probabilities first add up to this.
        seed: of the sampling; the same seed and the same batch give the same text on one machine.

    Raises:
        ConfigError: on construction, for a value out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        finite = math.isfinite(self.temperature) and self.temperature >= 0
        _require(finite, "temperature", self.temperature, "0 or a finite number above it")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "from 0 to below 2^63")


def generate(
    base: str | Base,
    adapters: Sequence[str | Path | Adapter | None],
    prompt: str,
    *,
    sampling: Sampling | None = None,
    template: Literal["adapter", "raw"] = "adapter",
    store: str | Path = STORE,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Generation]:
    """Let several adapters of one base answer a prompt, as one batch.

    Args:
        base: hub id, local folder, `kit-base`, or a loaded base; a loaded one is left as it was.
        adapters: one per row: a folder, a name in `store`, an Adapter, or None for the base itself.
        prompt: what is asked; of an adapter that was trained on conversations, the user's message.
        sampling: how the next token is chosen; the likeliest one by default.
        template: `adapter` puts the prompt as each adapter saw prompts in training: in the chat template of its record,
            or followed by the separator there. The base itself gets what the first adapter beside it gets, so that only
            the adapter differs; alone it gets the prompt as it is. `raw` gives every row the prompt as it is.
        store: where adapters are looked up by name.
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
    values = [_read(adapter, store=store) for adapter in adapters]
    labels = _labels(adapters, values)
    loaded = load_base(base) if isinstance(base, str) else base
    asked = [_asked(loaded, prompt, style) for style in _styles(values, template=template)]
    rows = [row.ids for row in asked]
    limit, limited_by = _limit(loaded.max_length, rows, sampling.max_new_tokens)
    growing = _Growing(loaded, [row.ends for row in asked], on_text=on_text) if on_text else None
    written = _write(
        loaded,
        dict(zip(labels, values, strict=True)),
        labels,
        rows=rows,
        # Where rows end differently, each goes on until its own end and what follows that is cut off.
        ends=set.intersection(*(row.ends for row in asked)),
        sampling=sampling,
        limit=limit,
        streamer=growing,
    )
    results = []
    for label, row, ids in zip(labels, asked, written, strict=True):
        own, ended = _until_end(ids, row.ends)
        results.append(
            Generation(
                name=label,
                prompt=row.text,
                text=_text(loaded.tokenizer, own),
                tokens=len(own),
                ended="eos" if ended else limited_by,
            )
        )
    return results


def separator_of(adapter: Adapter) -> str:
    """The text between prompt and completion in the adapter's training.

    Empty for an adapter whose record does not say how it was trained: nothing is known of its prompts.
    """
    data = _data_of(adapter)
    if data is None:
        return ""
    separator = data.get("separator")
    return separator if isinstance(separator, str) else DEFAULT_SEPARATOR


def template_of(adapter: Adapter) -> ChatTemplate | None:
    """The chat template of the adapter's training, if it was trained on conversations."""
    text = (_data_of(adapter) or {}).get("chat_template")
    return ChatTemplate(text, "the chat template in the adapter's record") if isinstance(text, str) else None


def _data_of(adapter: Adapter) -> Mapping[str, Any] | None:
    """What the record says about the data of the training; None where it does not speak of one."""
    recipe: Any = adapter.record.get("recipe")
    if not isinstance(recipe, Mapping):
        return None
    data = recipe.get("data")
    return data if isinstance(data, Mapping) else {}


def _read(adapter: str | Path | Adapter | None, *, store: str | Path) -> Adapter | None:
    if adapter is None:
        return None
    value = adapter if isinstance(adapter, Adapter) else Adapter.load(find_adapter(adapter, store=store))
    if value.config.task_type not in _GENERATES:
        label, kind = _short_label(adapter, value), value.config.task_type
        raise AdapterError(
            f"adapter {label!r} was made for {kind}: it does not write text", hint="give one of a causal-lm task"
        )
    return value


def _labels(given: Sequence[str | Path | Adapter | None], values: Sequence[Adapter | None]) -> list[str]:
    """A short label per row: the folder's name where that is unique, else what was given."""
    digests: dict[str, set[str]] = {}
    short = [_short_label(item, value) for item, value in zip(given, values, strict=True)]
    for label, value in zip(short, values, strict=True):
        digests.setdefault(label, set()).add(value.digest if value else "")
    return [
        label if len(digests[label]) == 1 or value is None else f"{label}@{value.digest[:12]}"
        for label, value in zip(short, values, strict=True)
    ]


def _short_label(given: str | Path | Adapter | None, value: Adapter | None) -> str:
    if value is None:
        return BASE_ROW
    return value.digest[:12] if isinstance(given, Adapter) or given is None else Path(given).resolve().name


_Style = ChatTemplate | str
"""How a prompt is put: in a chat template, or followed by a separator."""


def _styles(adapters: Sequence[Adapter | None], *, template: str) -> list[_Style]:
    """Each adapter's own; the base's is that of the first adapter beside it."""
    if template == "raw":
        return [""] * len(adapters)
    own = [None if adapter is None else template_of(adapter) or separator_of(adapter) for adapter in adapters]
    first = next((style for style in own if style is not None), "")
    return [first if style is None else style for style in own]


@dataclass(frozen=True)
class _Asked:
    """A prompt as a row of the batch: its text, its tokens, and the tokens that end an answer to it."""

    text: str
    ids: list[int]
    ends: set[int]


def _asked(base: Base, prompt: str, style: _Style) -> _Asked:
    tokenizer, ends = base.tokenizer, set(_end_tokens(base))
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError("the prompt is not valid UTF-8") from None
    if isinstance(style, ChatTemplate):
        text = style.asked(tokenizer, [("user", prompt)])
        # The template has put a BOS where there is to be one.
        ids, ends = tokenizer(text, add_special_tokens=False)["input_ids"], ends | {style.end(tokenizer)}
    else:
        text = render_prompt(prompt, separator=style)
        ids = prompt_ids(tokenizer, text)
    if not ids:
        raise DataError("the prompt has no token", hint="give some text to go on from")
    return _Asked(text, ids, ends)


def _limit(
    context: int, rows: Sequence[Sequence[int]], wanted: int
) -> tuple[int, Literal["max_new_tokens", "context"]]:
    """How many tokens may be written, and what limits them."""
    longest = max(map(len, rows))
    if longest >= context:
        raise DataError(f"the prompt has {longest:,} tokens; the base reads {context:,}", hint="shorten the prompt")
    return (wanted, "max_new_tokens") if longest + wanted <= context else (context - longest, "context")


def _write(
    base: Base,
    adapters: Mapping[str, Adapter | None],
    labels: Sequence[str],
    *,
    rows: Sequence[Sequence[int]],
    ends: Collection[int],
    sampling: Sampling,
    limit: int,
    streamer: _Growing | None,
) -> list[list[int]]:
    """The tokens each row wrote, padding included."""
    values = {label: adapter for label, adapter in adapters.items() if adapter is not None}
    inputs = _left_padded(rows, _pad_token(base), device=base.device)
    with torch.random.fork_rng(devices=_cuda_index(base.device)):
        torch.manual_seed(sampling.seed)
        config = _generation_config(base, sampling, inputs["input_ids"].shape[1] + limit, ends=ends)
        if not values:
            out = base.model.generate(**inputs, generation_config=config, streamer=streamer)
        else:
            bank = attach(
                base.model, slots=len(values), max_rank=max(1, *(v.config.largest_rank for v in values.values()))
            )
            try:
                for label, adapter in values.items():
                    bank.load(label, adapter)
                with bank.rows([label if label in values else None for label in labels]):
                    out = base.model.generate(**inputs, generation_config=config, streamer=streamer)
            finally:
                bank.detach()
    written: list[list[int]] = out[:, inputs["input_ids"].shape[1] :].tolist()
    return written


def _left_padded(rows: Sequence[Sequence[int]], pad: int, *, device: torch.device) -> dict[str, Tensor]:
    """int64 (rows, longest): padding on the left, masked out."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def _generation_config(base: Base, sampling: Sampling, length: int, *, ends: Collection[int]) -> GenerationConfig:
    from transformers import GenerationConfig

    chosen: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        chosen = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return GenerationConfig(
        max_length=length, eos_token_id=sorted(ends) or None, pad_token_id=_pad_token(base), **chosen
    )


def _end_tokens(base: Base) -> list[int]:
    """The tokens that end a text: those of the model and that of the tokenizer."""
    own = getattr(base.model.generation_config, "eos_token_id", None)
    ids = own if isinstance(own, list) else [own]
    return sorted({int(token) for token in (*ids, base.tokenizer.eos_token_id) if token is not None})


def _pad_token(base: Base) -> int:
    ends = _end_tokens(base)
    pad = base.tokenizer.pad_token_id
    return int(pad) if pad is not None else ends[0] if ends else 0


def _until_end(ids: Sequence[int], ends: Collection[int]) -> tuple[list[int], bool]:
    """The tokens up to and with the first that ends the text, and whether there was one."""
    for index, token in enumerate(ids):
        if token in ends:
            return list(ids[: index + 1]), True
    return list(ids), False


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text


class _Growing:
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
        """Takes the prompt, once, then one new token per row."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for row, token in enumerate(value.tolist()):
            if not self._open[row]:
                continue
            self._ids[row].append(token)
            self._open[row] = token not in self._ends[row]
            # A character of several tokens decodes to a replacement mark until its last token is there.
            text = _text(self._tokenizer, self._ids[row])
            if text != self._shown[row] and not text.endswith("\N{REPLACEMENT CHARACTER}"):
                self._shown[row] = text
                self._on_text(row, text)

    def end(self) -> None:
        """Nothing is held back."""


def _cuda_index(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def _require(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{name} must be {expected}; {value!r} was given")
