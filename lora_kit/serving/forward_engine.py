"""The engine for classifiers and encoders: texts of many adapters in one forward, each row by its own adapter."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import torch
from torch import Tensor

from lora_kit.bank.bank import AdapterBank
from lora_kit.bank.routes import Lease
from lora_kit.models.loading import Base
from lora_kit.serving.engine import EngineRequest, Event, Finish, Wanted
from lora_kit.serving.waiting_requests import WaitingRequests, check_vocabulary, check_wanted, make_length_error

logger = logging.getLogger(__name__)

_PROBE_TOKENS: Final = 8


class ForwardEngine:
    """An `Engine` whose requests end with one forward: scores of labels, or an embedding.

    An embedding is the mean of the last layer's hidden states over the tokens of a text, padding left out.

    Attributes:
        needs_runs: its rows belong to adapters whole.
        failures: forwards that raised an exception so far.
    """

    needs_runs: Final = False

    def __init__(
        self, base: Base, bank: AdapterBank | None = None, *, rows: int = 32, positions: int | None = None
    ) -> None:
        """Prepare a base.

        Args:
            base: of task `classify`.
            bank: of its adapters; None to serve the base alone.
            rows: texts of a forward, at most.
            positions: tokens of a text, at most; None for what the base reads.
        """
        self._base, self._bank, self._rows = base, bank, rows
        self._positions = min(positions or base.max_length, base.max_length)
        is_encoder_decoder = bool(getattr(base.model.config, "is_encoder_decoder", False))
        self._known: tuple[Wanted, ...] = ("scores",) if is_encoder_decoder else ("scores", "embedding")
        self._waiting = WaitingRequests()
        self._cancelled = set[str]()
        self.failures = 0

    @property
    def positions(self) -> int:
        return self._positions

    @property
    def busy_contents(self) -> frozenset[str]:
        return frozenset()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return 0  # between two steps nothing is under way

    def count_left(self, prompt_tokens: int) -> int:
        return 0

    def close(self) -> None:
        """Do nothing: the model is as it was."""

    def submit(self, request: EngineRequest) -> None:
        """Take a request.

        Raises:
            RequestError: the id is in use, the text is empty, has a token that is not one, or is too long.
        """
        check_wanted(request, *self._known)
        check_vocabulary(request, vocabulary=self._base.model.config.get_text_config().vocab_size)
        if len(request.prompt) > self._positions:
            raise make_length_error(len(request.prompt), 0, self._positions)
        self._waiting.add(request)

    def cancel(self, request_id: str) -> None:
        if request_id in self._waiting:
            self._cancelled.add(request_id)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """End what was cancelled, and compute one batch of what waits."""
        ended = (self._waiting.cancel(request_id) for request_id in self._cancelled)
        events = [event for event in ended if event is not None]
        self._cancelled.clear()
        batch = self._waiting.take(self._rows, group=_group)
        if not batch:
            return events
        try:
            values = self._compute(batch)
        except Exception as error:  # whatever it is: those in this forward end, the others go on
            logger.exception("a forward failed")
            self.failures += 1
            message = f"{type(error).__name__}: {error}"
            return events + [_end(request, Finish("error", len(request.prompt), 0, 0, message)) for request in batch]
        return events + [_report(request, row) for request, row in zip(batch, values.tolist(), strict=True)]

    def measure_effect(self, lease: Lease) -> float:
        vocabulary = self._base.model.config.get_text_config().vocab_size
        tokens = [(place + 1) * vocabulary // (_PROBE_TOKENS + 2) for place in range(_PROBE_TOKENS)]
        with torch.inference_mode():
            with_adapter, without = (self._run([tokens], [()], [each], "scores") for each in (lease, None))
        return float((with_adapter - without).abs().max())

    def _compute(self, batch: Sequence[EngineRequest]) -> Tensor:
        prompts, types = [request.prompt for request in batch], [request.token_types for request in batch]
        return self._run(prompts, types, [request.lease for request in batch], batch[0].wanted)

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        types: Sequence[Sequence[int]],
        leases: Sequence[Lease | None],
        wanted: Wanted,
    ) -> Tensor:
        """Return the scores or the embeddings of texts, fp32 (texts, classes or width)."""
        inputs = self._pad(prompts, types)
        with self._route(leases):
            if wanted == "scores":
                scores: Tensor = self._base.model(**inputs).logits
                return scores.float().cpu()
            hidden: Tensor = self._base.model.base_model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        return ((hidden.float() * mask).sum(1) / mask.sum(1)).cpu()

    def _route(self, leases: Sequence[Lease | None]) -> AbstractContextManager[None]:
        if self._bank is None:
            return nullcontext()
        return self._bank.rows([None if lease is None else lease.digest for lease in leases])

    def _pad(self, prompts: Sequence[Sequence[int]], types: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Return a batch, int64 (texts, longest) each: padded on the right."""
        shape = len(prompts), max(map(len, prompts))
        ids = torch.full(shape, self._base.pad_token_id)
        mask, kinds = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, (prompt, kind) in enumerate(zip(prompts, types, strict=True)):
            ids[row, : len(prompt)], mask[row, : len(prompt)] = torch.tensor(prompt), 1
            kinds[row, : len(kind)] = torch.tensor(kind, dtype=torch.int64)
        batch = {"input_ids": ids, "attention_mask": mask}
        if self._base.takes_token_types:
            batch["token_type_ids"] = kinds
        return {name: tensor.to(self._base.device) for name, tensor in batch.items()}


def _group(request: EngineRequest) -> Hashable:
    """Return what requests of one batch have in common: what is wanted, and about the length."""
    return request.wanted, len(request.prompt).bit_length()


def _end(request: EngineRequest, finish: Finish) -> Event:
    return Event(request.request_id, finish=finish)


def _report(request: EngineRequest, values: Sequence[float]) -> Event:
    finish = Finish("stop", len(request.prompt), 0, 0)
    return Event(request.request_id, finish=finish, values=tuple(values))
