"""One base with its adapters, as a server offers it: the part of a server that knows nothing of HTTP."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lora_kit.adapter.adapter import Adapter
from lora_kit.bank.attach import attach
from lora_kit.data.cells import RowError
from lora_kit.data.messages import Conversation
from lora_kit.data.read_messages import read_open_conversation
from lora_kit.data.sample_format import PromptStyle
from lora_kit.data.templates import ChatTemplate, find_chat_template
from lora_kit.errors import ConfigError, DataError, LoraKitError, UnknownAdapterError
from lora_kit.generation.prompts import EncodedPrompt, encode_prompt, find_adapter_style, find_end_tokens
from lora_kit.models.loading import Base, load_base
from lora_kit.models.prompt_tokens import tokenize_prompt
from lora_kit.models.protocols import Tokenizer
from lora_kit.serving.access import AccessKeys, check_host, read_keys
from lora_kit.serving.adapter_labels import AdapterLabels, set_aliases
from lora_kit.serving.adapter_slots import AdapterSlots, SlotUse
from lora_kit.serving.engine import RequestError
from lora_kit.serving.model_worker import ModelWorker, QueueLimits
from lora_kit.serving.rate_limit import RateLimit
from lora_kit.serving.rows_engine import RowsEngine
from lora_kit.serving.scaled_adapter import scale_adapter
from lora_kit.serving.server_metrics import ServerMetrics

logger = logging.getLogger(__name__)

_DEFAULT_COMPLETION_TOKENS: Final = 16
"""What OpenAI's API takes for a completion whose request does not say."""
_CALL_SECONDS: Final = 120


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How a server is started.

    Attributes:
        base: hub id, local folder or `kit-base`.
        store: folder of the adapters.
        host: address to listen at; other than loopback only with keys.
        port: to listen at.
        dtype: of the base, as in `load_base`.
        quantize: of the base, as in `load_base`.
        slots: adapters that are ready at once.
        max_rank: the largest rank of an adapter.
        rows: requests that run at once.
        context: tokens of prompt and answer, at most; None for what the base reads.
        aliases: labels by alias.
        keys: file of keys; None for none.
        rate: requests of one key, such as `60/minute`; None for no limit.
        state: file that keeps what was loaded, aliased and pinned; None to forget it.
        limits: what may wait.
        body_bytes: of a request's body, at most.
        stuck_seconds: how long a step may take before `/health` says that the server is stuck.
    """

    base: str
    store: Path
    host: str = "127.0.0.1"
    port: int = 8000
    dtype: str = "auto"
    quantize: str | None = None
    slots: int = 16
    max_rank: int = 64
    rows: int = 32
    context: int | None = None
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    keys: Path | None = None
    rate: str | None = None
    state: Path | None = None
    limits: QueueLimits = dataclasses.field(default_factory=QueueLimits)
    body_bytes: int = 4 * 2**20
    stuck_seconds: float = 30.0

    @property
    def allowed_hosts(self) -> list[str]:
        """Names under which clients may call the server; others are what a hostile page would send."""
        return sorted({"127.0.0.1", "localhost", "[::1]", "::1", self.host} - {"0.0.0.0", "::"})


class ServedModel:
    """A base, its adapters and the thread that runs them.

    Attributes:
        settings: how it was started.
        keys: who may do what.
        rate: how often.
        labels: what clients call adapters.
        worker: runs requests.
        metrics: what happened.
    """

    def __init__(self, settings: ServerSettings) -> None:
        """Load the base and start the worker.

        Raises:
            ConfigError: the host is not of this machine and there are no keys, or a file of settings is wrong.
            BaseModelError: the base cannot be loaded, or does not generate.
        """
        self.settings = settings
        self.keys: AccessKeys = read_keys(settings.keys)
        check_host(settings.host, self.keys)
        self.rate = RateLimit(settings.rate)
        self._base: Base = load_base(settings.base, dtype=settings.dtype, quantize=settings.quantize)
        self.base_name = Path(settings.base).name or settings.base
        self.labels = AdapterLabels(settings.store, base_name=self.base_name, state_file=settings.state)
        set_aliases(settings.aliases, self.labels)
        bank = attach(self._base.model, slots=settings.slots, max_rank=settings.max_rank)
        self._engine = RowsEngine(self._base, bank, rows=settings.rows, positions=settings.context)
        self.worker = ModelWorker(self._engine, AdapterSlots(bank, slots=settings.slots), limits=settings.limits)
        self.metrics = ServerMetrics(self)
        self.fingerprint = _hash_fingerprint(self._base.fingerprint())
        self.worker.start()
        self._pin_again()

    def close(self) -> None:
        """Stop the worker; what runs is cancelled."""
        self.worker.stop()
        self.worker.join(timeout=_CALL_SECONDS)

    # Texts and tokens

    @property
    def tokenizer(self) -> Tokenizer:
        return self._base.tokenizer

    @property
    def context(self) -> int:
        """Tokens of prompt and answer, at most."""
        return self._engine.memory.positions

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a text of the base."""
        return find_end_tokens(self._base)

    def encode_text(self, prompt: str | Sequence[int]) -> list[int]:
        """Return the tokens of a prompt as it is; token ids stay what they are.

        Raises:
            RequestError: it has none, or is not text.
        """
        ids = list(prompt) if not isinstance(prompt, str) else tokenize_prompt(self.tokenizer, _check_text(prompt))
        if not ids:
            raise RequestError("the prompt has no token", field="prompt", code="empty_prompt")
        return ids

    def encode_messages(
        self, messages: Sequence[Mapping[str, Any]], adapter: Adapter | None, variables: Mapping[str, Any] | None
    ) -> EncodedPrompt:
        """Return a conversation as an adapter saw conversations in training; else as the base's template has it.

        Raises:
            RequestError: a message is not one, or there is no template, or it rejects the conversation.
        """
        try:
            conversation = read_open_conversation({"messages": messages, "chat_template_kwargs": variables})
            return encode_prompt(self._base, *self._present(conversation, adapter))
        except (RowError, DataError) as error:
            raise RequestError(str(error), field="messages", code="invalid_messages") from None

    def _present(self, conversation: Conversation, adapter: Adapter | None) -> tuple[str | Conversation, PromptStyle]:
        """Return a conversation, and the style to present it in; for an adapter trained on prompts, its one message.

        Raises:
            RequestError: there is no template, and it is more than one message.
        """
        own = find_chat_template(self.tokenizer)
        style = find_adapter_style(adapter) if adapter is not None else ""
        if isinstance(style, ChatTemplate):
            return conversation, style
        if own:
            return conversation, ChatTemplate(own, f"the chat template of {self.base_name}")
        if not style or len(conversation.messages) != 1:
            raise RequestError(
                "this model has no chat template", field="messages", code="no_chat_template", hint="/v1/completions"
            )
        return conversation.messages[0].content, style

    def tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the tokens of a text."""
        _check_text(text)
        ids = self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return [int(token) for token in ids]

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of tokens.

        Raises:
            RequestError: one is not a token.
        """
        wrong = next((token for token in ids if not 0 <= token < len(self.tokenizer)), None)
        if wrong is not None:
            raise RequestError(f"{wrong} is not a token of this base", field="tokens", code="invalid_token")
        return self.tokenizer.decode(list(ids))

    def choose_max_tokens(self, requested: int | None, *, longest: int, is_chat: bool) -> int:
        """Return how many tokens an answer may have: what was asked for, else as many as fit, or OpenAI's default.

        The engine rejects a prompt that leaves no position.
        """
        left = max(1, self.context - longest)
        if requested is not None:
            return requested
        return left if is_chat else min(left, _DEFAULT_COMPLETION_TOKENS)

    # Adapters

    def find_adapter(self, model: str, scale: float | None) -> Adapter | None:
        """Return the adapter of a label, an alias or `label@digest`; None for the base.

        Args:
            scale: factor of its update; a scaled adapter is another adapter, with a digest of its own.

        Raises:
            UnknownAdapterError: there is none; the base never stands in.
            AdapterError, ConfigError, StorageError: its folder cannot be read.
        """
        if model == self.base_name:
            if scale not in (None, 1.0):
                raise ConfigError("lora_scale is of an adapter; the base has none")
            return None
        adapter = self.labels.resolve(model)
        return adapter if scale in (None, 1.0) else scale_adapter(adapter, float(scale or 0.0))

    def load(self, label: str, name: str) -> dict[str, Any]:
        """Let a label stand for an adapter of the store, after a forward with it; a failure changes nothing.

        Raises:
            UnknownAdapterError: the store has none of that name.
            AdapterError, ConfigError, BankError: it cannot be read, does not match, or computes nothing finite.
        """
        adapter = self.labels.resolve(name) if name in self.labels.list_store() else None
        if adapter is None:
            raise UnknownAdapterError(name, self.labels.list_store())
        slots = self.worker.slots
        probing = self.worker.call(lambda: slots.probe(adapter, self._engine.forward.measure_effect))
        effect = probing.result(timeout=_CALL_SECONDS)
        self.labels.load(label, name)
        self._follow_pins()
        return {"status": "loaded", "label": label, "digest": adapter.digest, "largest_change_of_a_logit": effect}

    def pin(self, label: str, *, pinned: bool) -> None:
        """Keep an adapter in its slot, or let it leave again.

        Raises:
            UnknownAdapterError: no such label.
        """
        if pinned:
            self._pin_slot(label)
        else:
            self.labels.target_of(label)  # raises for a label that is none
        self.labels.pin(label, pinned=pinned)
        self._follow_pins()

    def unload(self, label: str) -> None:
        """Take a label away that was given at run time, or an alias; requests that have begun finish on its content.

        Raises:
            UnknownAdapterError, StorageError: as `AdapterLabels.unload`; nothing has changed.
        """
        self.labels.unload(label)
        self._follow_pins()

    def set_alias(self, alias: str, label: str) -> None:
        """Let an alias stand for a label from now on.

        Raises:
            ConfigError, UnknownAdapterError, StorageError: as `AdapterLabels.alias`; nothing has changed.
        """
        self.labels.alias(alias, label)
        self._follow_pins()

    def _pin_slot(self, label: str) -> str:
        """Pin what a label stands for, and return its digest."""
        adapter, slots = self.labels.resolve(label), self.worker.slots
        self.worker.call(lambda: slots.pin(adapter)).result(timeout=_CALL_SECONDS)
        return adapter.digest

    def _follow_pins(self) -> None:
        """Pin what pinned labels stand for now, and nothing else: a pin is of a label, a slot of a content."""
        digests, slots = set[str](), self.worker.slots
        for label in sorted(self.labels.state.pinned):
            try:
                digests.add(self._pin_slot(label))
            except LoraKitError as error:  # the change itself is done; it answers all the same, from any slot
                logger.warning("%s is pinned, and cannot be kept in a slot: %s", label, error)
        self.worker.call(lambda: slots.unpin_others(digests)).result(timeout=_CALL_SECONDS)

    def list_models(self) -> list[dict[str, Any]]:
        """Return what may be asked, as `/v1/models` lists it: `root` is the digest, once it is known."""
        base = {"id": self.base_name, "object": "model", "created": 0, "owned_by": "lora_kit"}
        models = [{**base, "root": self.base_name, "parent": None, "max_model_len": self.context}]
        for label in self.labels.names():
            adapter = self.labels.peek(label)
            root = adapter.digest if adapter is not None else None
            models.append({**base, "id": label, "root": root, "parent": self.base_name})
        return models

    def list_adapters(self) -> list[dict[str, Any]]:
        """Return every label with what is known of its adapter."""
        uses = self.worker.call(self.worker.slots.describe).result(timeout=_CALL_SECONDS)
        return [self._describe(label, uses) for label in self.labels.names()]

    def _describe(self, label: str, uses: Mapping[str, SlotUse]) -> dict[str, Any]:
        state, adapter = self.labels.state, self.labels.peek(label)
        use = uses.get(adapter.digest) if adapter is not None else None
        return {
            "label": label,
            "alias_of": state.aliases.get(label),
            "digest": adapter.digest if adapter is not None else None,
            "rank": adapter.config.largest_rank if adapter is not None else None,
            "bytes": adapter.nbytes if adapter is not None else None,
            "in_slot": use is not None,
            "leases": use.leases if use is not None else 0,
            "hits": use.hits if use is not None else 0,
            "pinned": label in state.pinned,
        }

    def _pin_again(self) -> None:
        """Pin what was pinned when the server ran before; what is gone by now is left out."""
        for label in sorted(self.labels.state.pinned - set(self.labels.names())):
            self.labels.pin(label, pinned=False)
        self._follow_pins()


def _check_text(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError("the text is not valid UTF-8", field="prompt", code="invalid_text") from None
    return text


def _hash_fingerprint(fingerprint: Mapping[str, Any]) -> str:
    text = json.dumps(fingerprint, sort_keys=True, default=str)
    return f"lk_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
