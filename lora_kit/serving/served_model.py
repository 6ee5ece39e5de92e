"""One base with its adapters, as a server offers it: the part of a server that knows nothing of HTTP."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.folder import CARD
from lora_kit.adapter.store import to_json_value
from lora_kit.errors import ConfigError, LoraKitError
from lora_kit.evaluation.adapter_format import find_adapter_labels
from lora_kit.io.read import read_text
from lora_kit.io.strict_json import JsonObject
from lora_kit.serving.access import AccessKeys, check_host, read_keys
from lora_kit.serving.adapter_labels import AdapterLabels, list_adapter_folders, set_aliases
from lora_kit.serving.adapter_slots import AdapterSlots, SlotUse
from lora_kit.serving.model_worker import ModelWorker
from lora_kit.serving.open_base import choose_task, open_base
from lora_kit.serving.prompt_encoder import PromptEncoder
from lora_kit.serving.rate_limit import RateLimit
from lora_kit.serving.scaled_adapter import scale_adapter
from lora_kit.serving.server_metrics import ServerMetrics
from lora_kit.serving.server_settings import ServerSettings

logger = logging.getLogger(__name__)

_DEFAULT_COMPLETION_TOKENS: Final = 16
"""What OpenAI's API takes for a completion whose request does not say."""
_CALL_SECONDS: Final = 120
_CARD_BYTES: Final = 2**20


class ServedModel:
    """A base, its adapters and the thread that runs them.

    Attributes:
        settings: how it was started.
        keys: who may do what.
        rate: how often.
        labels: what clients call adapters.
        prompts: texts as tokens.
        heads: what classifiers predict; None for a base that generates.
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
        self.base_name = Path(settings.base).name or settings.base
        task = choose_task(settings, list_adapter_folders(settings.store))
        self.labels = AdapterLabels(settings.store, base_name=self.base_name, task=task, state_file=settings.state)
        set_aliases(settings.aliases, self.labels)
        opened = open_base(settings, task, [settings.store / name for name in self.labels.list_store()])
        self._base, self._engine, self.heads = opened.base, opened.engine, opened.heads
        self.prompts = PromptEncoder(self._base, base_name=self.base_name)
        slots = AdapterSlots(opened.bank, self._engine, slots=settings.slots)
        self.worker = ModelWorker(self._engine, slots, limits=settings.limits)
        self.metrics = ServerMetrics(self)
        self.fingerprint = _hash_fingerprint(self._base.fingerprint())
        self.worker.start()
        self._pin_again()

    def close(self) -> None:
        """Stop the worker; what runs is cancelled."""
        self.worker.stop()
        self.worker.join(timeout=_CALL_SECONDS)

    @property
    def task(self) -> str:
        """What the base is loaded for."""
        return self._base.task

    @property
    def context(self) -> int:
        """Tokens of prompt and answer, at most."""
        return self._engine.positions

    def choose_max_tokens(self, requested: int | None, *, longest: int, is_chat: bool) -> int:
        """Return how many tokens an answer may have: what was asked for, else as many as fit, or OpenAI's default.

        The engine rejects a prompt that leaves no position.
        """
        left = max(1, self._engine.count_left(longest))
        if requested is not None:
            return requested
        return left if is_chat else min(left, _DEFAULT_COMPLETION_TOKENS)

    # Adapters

    def find_adapter(self, model: str, scale: float | None, *, fitted: bool = True) -> Adapter | None:
        """Return the adapter of a label, an alias or `label@digest`; None for the base.

        Args:
            scale: factor of its update; a scaled adapter is another adapter, with a digest of its own.
            fitted: whether it is as `fit` returns it.

        Raises:
            UnknownAdapterError: there is none; the base never stands in.
            RequestError: it is for another task than the server's.
            AdapterError, ConfigError, StorageError: its folder cannot be read.
        """
        if model == self.base_name:
            if scale not in (None, 1.0):
                raise ConfigError("lora_scale is of an adapter; the base has none")
            return None
        adapter = self.labels.resolve(model)
        adapter = self.fit(adapter) if fitted else adapter
        return adapter if scale in (None, 1.0) else scale_adapter(adapter, float(scale or 0.0))

    def fit(self, adapter: Adapter) -> Adapter:
        """Return what comes into a slot for an adapter: of a classifier, with a head as wide as the base's.

        Raises:
            AdapterError: it has too many labels.
        """
        return adapter if self.heads is None else self.heads.fit(adapter)

    def load(self, label: str, name: str) -> JsonObject:
        """Let a label stand for an adapter of the store, after a forward with it; a failure changes nothing.

        Raises:
            UnknownAdapterError: the store has none of that name.
            RequestError: it is for another task than the server's.
            AdapterError, ConfigError, BankError: it cannot be read, does not match, or computes nothing finite.
        """
        self.labels.check_store(name)
        adapter = self.labels.resolve(name)
        slots, fitted = self.worker.slots, self.fit(adapter)
        probing = self.worker.call(lambda: slots.probe(fitted, self._engine.measure_effect))
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
        adapter, slots = self.fit(self.labels.resolve(label)), self.worker.slots
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

    def list_models(self) -> list[JsonObject]:
        """Return what may be asked, as `/v1/models` lists it: `root` is the digest, once it is known."""
        base = {"id": self.base_name, "object": "model", "created": 0, "owned_by": "lora_kit", "task": self._base.task}
        models = [{**base, "root": self.base_name, "parent": None, "max_model_len": self.context}]
        for label in self.labels.names():
            adapter = self.labels.peek(label)
            root = adapter.digest if adapter is not None else None
            models.append({**base, "id": label, "root": root, "parent": self.base_name})
        return models

    def list_adapters(self) -> list[JsonObject]:
        """Return every label with what is known of its adapter."""
        uses = self.worker.call(self.worker.slots.describe).result(timeout=_CALL_SECONDS)
        return [self._describe(label, uses) for label in self.labels.names()]

    def describe_adapter(self, label: str) -> JsonObject:
        """Return what is known of a label, with the model card in its folder and what was measured; it is read now.

        Raises:
            UnknownAdapterError, AdapterError, ConfigError, StorageError: as `AdapterLabels.resolve`.
        """
        adapter = self.labels.resolve(label)
        uses = self.worker.call(self.worker.slots.describe).result(timeout=_CALL_SECONDS)
        card = self.labels.store / self.labels.target_of(label) / CARD
        return {
            **self._describe(label, uses),
            "card": read_text(card, limit=_CARD_BYTES) if card.is_file() and not card.is_symlink() else "",
            "metrics": to_json_value(adapter.record.get("metrics") or {}),
            "labels": list(find_adapter_labels(adapter)),
        }

    def _describe(self, label: str, uses: Mapping[str, SlotUse]) -> JsonObject:
        state, adapter = self.labels.state, self.labels.peek(label)
        use = self._find_use(adapter, uses) if adapter is not None else None
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
            "is_loaded": label in state.loaded,
        }

    def _find_use(self, adapter: Adapter, uses: Mapping[str, SlotUse]) -> SlotUse | None:
        try:
            return uses.get(self.fit(adapter).digest)
        except LoraKitError:  # it cannot be in a slot
            return None

    def _pin_again(self) -> None:
        """Pin what was pinned when the server ran before; what is gone by now is left out."""
        kept = {*self.labels.names(), *self.labels.list_not_offered()}
        for label in sorted(self.labels.state.pinned - kept):
            self.labels.pin(label, pinned=False)
        self._follow_pins()


def _hash_fingerprint(fingerprint: Mapping[str, Any]) -> str:
    text = json.dumps(fingerprint, sort_keys=True, default=str)
    return f"lk_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
