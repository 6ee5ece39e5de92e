"""Many prompts answered by several adapters of one base, in batches of similar lengths."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.adapter_like import AdapterLike
from lora_kit.bank.bank import AdapterBank
from lora_kit.data.messages import Conversation
from lora_kit.data.sample_format import PromptStyle
from lora_kit.data.templates import ChatTemplate, chat_template, find_chat_template
from lora_kit.errors import ConfigError, DataError
from lora_kit.generation.adapter_args import build_adapter_labels, check_quantize, read_adapter
from lora_kit.generation.decoding import Sampling, generate_batch
from lora_kit.generation.generate import Generation, attach_adapters, load_for_generation, route_rows
from lora_kit.generation.prompts import EncodedPrompt, encode_prompt, resolve_styles
from lora_kit.models.loading import Base
from lora_kit.models.tasks import SEQ2SEQ
from lora_kit.names import DEFAULT_STORE
from lora_kit.torch_utils import use_eval_mode


@dataclasses.dataclass(frozen=True)
class AskedRow:
    """A prompt for one adapter, encoded.

    Attributes:
        label: of the adapter.
        encoded: the prompt.
    """

    label: str
    encoded: EncodedPrompt


class BatchGenerator:
    """Answers prompts with the adapters of a bank.

    Attributes:
        base: the loaded base.
        adapters: by label; None for the base itself.
        labels: of the adapters, in the order in which they were given.
        sampling: how the next token is chosen.
    """

    def __init__(
        self,
        base: Base,
        adapters: Mapping[str, Adapter | None],
        labels: Sequence[str],
        styles: Mapping[str, PromptStyle],
        sampling: Sampling,
        bank: AdapterBank | None,
    ) -> None:
        self.base, self.adapters, self.labels, self.sampling = base, adapters, tuple(labels), sampling
        self._styles, self._bank = styles, bank

    def encode(self, prompt: str | Conversation, label: str) -> AskedRow:
        """Return a prompt as its adapter saw prompts in training.

        Raises:
            DataError: it has no token or fills the context, or is a conversation and there is no template for one.
        """
        style = self._styles[label]
        if isinstance(prompt, Conversation) and not isinstance(style, ChatTemplate):
            prompt = self._flatten(prompt)
            style = style if isinstance(prompt, str) else chat_template(None, self.base.tokenizer, base=self.base.name)
        encoded = encode_prompt(self.base, prompt, style)
        if len(encoded.ids) >= self.base.max_length:
            what = f"the prompt has {len(encoded.ids):,} tokens; the base reads {self.base.max_length:,}"
            raise DataError(what, hint="shorten the prompt")
        return AskedRow(label, encoded)

    def _flatten(self, conversation: Conversation) -> str | Conversation:
        """Return the one message of a conversation as a text; a longer one as it is where the base has a template."""
        if len(conversation.messages) == 1 and conversation.is_plain:
            return conversation.messages[0].content
        if find_chat_template(self.base.tokenizer) is None:
            hint = "an adapter that was trained on conversations brings one"
            raise DataError("the row is a conversation, and there is no chat template for it", hint=hint)
        return conversation

    def plan_batches(self, rows: Sequence[AskedRow], size: int) -> list[list[int]]:
        """Return the indices of rows in batches: long prompts first, and of similar lengths.

        A row whose answer could fill the context is a batch by itself, so that its neighbors do not shorten it.
        """
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index].encoded.ids))
        tight = [index for index in order if self._find_budget([rows[index]]) < self.sampling.max_new_tokens]
        roomy = [index for index in order if index not in set(tight)]
        return [[index] for index in tight] + [roomy[start : start + size] for start in range(0, len(roomy), size)]

    def answer(self, rows: Sequence[AskedRow], *, number: int = 0) -> list[Generation]:
        """Answer rows as one batch.

        Args:
            number: of the batch; where tokens are sampled, each batch has a seed of its own.
        """
        budget = self._find_budget(rows)
        limit = min(self.sampling.max_new_tokens, budget)
        cut: Literal["max_new_tokens", "context"] = (
            "context" if budget < self.sampling.max_new_tokens else "max_new_tokens"
        )
        sampling = dataclasses.replace(self.sampling, seed=(self.sampling.seed + number) % 2**63)
        with use_eval_mode(self.base.model), route_rows(self._bank, [row.label for row in rows]):
            completions = generate_batch(self.base, [row.encoded for row in rows], sampling=sampling, limit=limit)
        return [
            Generation(
                name=row.label,
                prompt=row.encoded.text,
                text=completion.text,
                tokens=len(completion.ids),
                ended="eos" if completion.ended else cut,
            )
            for row, completion in zip(rows, completions, strict=True)
        ]

    def _find_budget(self, rows: Sequence[AskedRow]) -> int:
        """Return how many tokens the longest prompt leaves for an answer."""
        longest = 1 if self.base.task == SEQ2SEQ else max(len(row.encoded.ids) for row in rows)
        return self.base.max_length - longest


@contextlib.contextmanager
def open_batch_generator(
    base: str | Base,
    adapters: Sequence[AdapterLike | None],
    *,
    sampling: Sampling | None = None,
    template: Literal["adapter", "raw"] = "adapter",
    store: str | Path = DEFAULT_STORE,
    quantize: str | None = None,
    allow: Collection[str] = (),
) -> Iterator[BatchGenerator]:
    """Load a base with adapters for the length of a block; arguments and errors as in `generate`."""
    if not adapters:
        raise ConfigError("no row to generate was given", hint="name an adapter, or None for the base itself")
    read = [read_adapter(adapter, store=store, allow=allow) for adapter in adapters]
    labels = build_adapter_labels(adapters, read)
    check_quantize(base, labels, read, quantize)
    loaded = load_for_generation(base, labels, read, quantize)
    styles = resolve_styles(loaded, read) if template == "adapter" else [""] * len(read)
    by_label = dict(zip(labels, read, strict=True))
    with attach_adapters(loaded.model, by_label, allow=allow) as bank:
        by_style = dict(zip(labels, styles, strict=True))
        yield BatchGenerator(loaded, by_label, labels, by_style, sampling or Sampling(), bank)
