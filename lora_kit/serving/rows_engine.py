"""Iteration-level batching: every step continues all running requests by a token, and reads chunks of new prompts.

One packed forward a step, on public pieces of transformers alone (see `kv_rows`), whatever adapters are in it: the bank
routes runs of tokens. A prompt's beginning is not computed where a row has the same tokens by the same adapter.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Hashable, Sequence
from typing import Final

import torch
from torch import Tensor

from lora_kit.bank.bank import AdapterBank
from lora_kit.bank.routes import Lease
from lora_kit.generation.text_stream import TextStream
from lora_kit.layers.token_runs import LONG_RUN
from lora_kit.models.loading import Base
from lora_kit.serving.engine import EngineRequest, Event, Finish, FinishReason
from lora_kit.serving.fair_turns import FairTurns
from lora_kit.serving.kv_rows import KeyValueRows, PackedStep, PromptChunk
from lora_kit.serving.packed_forward import PackedForward
from lora_kit.serving.running_request import RowContent, RunningRequest
from lora_kit.serving.sampler import Sampler
from lora_kit.serving.waiting_requests import (
    WaitingRequests,
    check_vocabulary,
    check_wanted,
    make_duplicate_error,
    make_length_error,
)

logger = logging.getLogger(__name__)

STEP_TOKENS: Final = 256
"""Tokens of a packed forward, at most: how long those who are generating wait for the prompts of others."""


class RowsEngine:
    """An `Engine` for decoders whose attention is plain, with a row of keys and values for each running request.

    Attributes:
        needs_runs: its batches are packed, so that adapters must tell tokens apart.
        forward: computes the logits of a step.
        memory: the keys and values.
        failures: forwards that raised an exception so far.
    """

    needs_runs: Final = True

    def __init__(
        self,
        base: Base,
        bank: AdapterBank | None = None,
        *,
        rows: int = 32,
        positions: int | None = None,
        step_tokens: int = STEP_TOKENS,
        reuse_prefixes: bool = True,
    ) -> None:
        """Prepare a base; `close` gives it back.

        Args:
            base: a decoder.
            bank: of its adapters; None to serve the base alone.
            rows: how many requests run at once.
            positions: tokens of prompt and answer, at most; None for what the base reads.
            step_tokens: see `STEP_TOKENS`; more than `rows`.
            reuse_prefixes: whether the beginning of a prompt may be taken from another row.
        """
        self.forward = PackedForward(base, bank)
        self.memory = KeyValueRows(rows, min(positions or base.max_length, base.max_length))
        self.failures = 0
        self._base, self._reuse_prefixes = base, reuse_prefixes
        self._step_tokens = max(step_tokens, rows + 1)
        self._contents = [RowContent() for _ in range(rows)]
        self._free = deque(range(rows))  # the one freed longest ago first: its beginning is the least likely to help
        self._waiting = WaitingRequests()
        self._running = dict[str, RunningRequest]()
        self._cancelled = set[str]()
        self._prefill_turns = FairTurns()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def positions(self) -> int:
        return self.memory.positions

    @property
    def busy_contents(self) -> frozenset[str]:
        return frozenset()  # leases are enough: between two steps nothing is under way

    def count_left(self, prompt_tokens: int) -> int:
        return self.positions - prompt_tokens

    def measure_effect(self, lease: Lease) -> float:
        return self.forward.measure_effect(lease)

    def close(self) -> None:
        """Give the model its own attention back."""
        self.forward.close()

    def submit(self, request: EngineRequest) -> None:
        """Take a request.

        Raises:
            RequestError: the id is in use, the prompt is empty or has a token that is not one, or prompt and answer are
                longer than a row.
        """
        if request.request_id in self._running:
            raise make_duplicate_error(request.request_id)
        check_vocabulary(request, vocabulary=self._base.model.config.get_text_config().vocab_size)
        if len(request.prompt) + request.settings.max_tokens > self.positions:
            raise make_length_error(len(request.prompt), request.settings.max_tokens, self.positions)
        check_wanted(request, "tokens")
        self._waiting.add(request)

    def cancel(self, request_id: str) -> None:
        if request_id in self._waiting or request_id in self._running:
            self._cancelled.add(request_id)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """End what was cancelled, admit what waits, and compute one packed forward."""
        events = self._end_cancelled()
        for request in self._waiting.take(len(self._free)):
            self._begin(request)
        if not self._running:
            return events
        generating = [running for running in self._running.values() if running.is_generating]
        generating.sort(key=lambda running: (running.request.content, running.row))
        chunks = self._plan_chunks(self._step_tokens - len(generating))
        members = [*generating, *(running for running, _ in chunks)]
        try:
            logits = self._compute(generating, chunks)
        except Exception as error:  # whatever it is: those in this forward end, the others go on
            logger.exception("a forward failed")
            self.failures += 1
            return [*events, *(self._end(running, "error", f"{type(error).__name__}: {error}") for running in members)]
        return events + self._take_logits(members, chunks, logits)

    # Who is next

    def _end_cancelled(self) -> list[Event]:
        events = []
        for request_id in self._cancelled:
            if request_id in self._running:
                events.append(self._end(self._running[request_id], "cancelled"))
            elif event := self._waiting.cancel(request_id):
                events.append(event)
        self._cancelled.clear()
        return events

    def _begin(self, request: EngineRequest) -> None:
        source, length = self._find_prefix(request)
        # The row itself if it is free, so that nothing is copied; else the one that was freed longest ago.
        row = source if source is not None and source in self._free else self._free[0]
        self._free.remove(row)
        if source is not None and source != row:
            self.memory.copy_prefix(source, row, length)
        self._contents[row] = RowContent(request.content, list(request.prompt[:length]))
        self._running[request.request_id] = RunningRequest(
            request,
            Sampler(request.settings, request.prompt, request.end_tokens),
            TextStream(self._base.tokenizer, request.settings.stop),
            row=row,
            read=length,
            reused=length,
        )

    def _find_prefix(self, request: EngineRequest) -> tuple[int | None, int]:
        """Return the row with the longest beginning of a prompt, by the same adapter, and how many tokens it has.

        The last token of a prompt is always computed, since its logits are needed.
        """
        best, longest = None, 0
        if self._reuse_prefixes:
            for row, held in enumerate(self._contents):
                if held.content == request.content:
                    length = _count_equal(held.tokens, request.prompt, most=len(request.prompt) - 1)
                    if length > longest:
                        best, longest = row, length
        return best, longest

    def _plan_chunks(self, budget: int) -> list[tuple[RunningRequest, int]]:
        """Divide a budget of tokens between the prompts that are read; adapters take turns."""
        reading = [running for running in self._running.values() if not running.is_generating]
        planned = dict.fromkeys((running.request.request_id for running in reading), 0)

        def read(content: Hashable, count: int) -> int:
            spent = 0
            for running in reading:
                if running.request.content == content and spent < count:
                    request_id = running.request.request_id
                    left = len(running.request.prompt) - running.read - planned[request_id]
                    planned[request_id] += min(left, count - spent)
                    spent += min(left, count - spent)
            return spent

        self._prefill_turns.divide(budget, (running.request.content for running in reading), read)
        chunks = [(running, planned[running.request.request_id]) for running in reading]
        # Short ones beside the single tokens, with which layers compute them together.
        return sorted(
            (chunk for chunk in chunks if chunk[1]), key=lambda chunk: (chunk[1] >= LONG_RUN, chunk[0].request.content)
        )

    # One forward

    def _compute(self, generating: Sequence[RunningRequest], chunks: Sequence[tuple[RunningRequest, int]]) -> Tensor:
        """Return the logits after the last token of each run, fp32 (runs, vocabulary), and keep keys and values."""
        tokens = [running.answer[-1] for running in generating]
        positions = [running.position for running in generating]
        last, spans = list(range(len(tokens))), []
        for running, count in chunks:
            spans.append(PromptChunk(running.row, running.read, count, len(tokens)))
            tokens += running.request.prompt[running.read : running.read + count]
            positions += range(running.read, running.read + count)
            last.append(len(tokens) - 1)
        rows = [running.row for running in generating]
        step = PackedStep(self.memory, rows, positions[: len(rows)], spans, self._base.device)
        runs = [(running.request.lease, 1) for running in generating]
        runs += [(running.request.lease, count) for running, count in chunks]
        return self.forward.compute(tokens, positions, last, step, runs)

    def _take_logits(
        self, members: Sequence[RunningRequest], chunks: Sequence[tuple[RunningRequest, int]], logits: Tensor
    ) -> list[Event]:
        """Choose a token for each request whose prompt is read, and return what came of it."""
        for running in members:
            if running.is_generating:  # its newest token's keys and values are there now
                self._contents[running.row].tokens.append(running.answer[-1])
        for running, count in chunks:
            self._contents[running.row].tokens += running.request.prompt[running.read : running.read + count]
            running.read += count
        ready = [(running, row) for running, row in zip(members, logits, strict=True) if running.is_generating]
        return [self._choose(running, row) for running, row in ready]

    def _choose(self, running: RunningRequest, logits: Tensor) -> Event:
        event = running.choose(logits)
        if event.finish is not None:
            self._release(running, event.finish)
        return event

    def _end(self, running: RunningRequest, reason: FinishReason, message: str = "") -> Event:
        event = running.end(reason, message)
        assert event.finish is not None
        self._release(running, event.finish)
        return event

    def _release(self, running: RunningRequest, finish: Finish) -> None:
        if finish.reason == "error":  # what was written of its keys and values is not known
            self._contents[running.row] = RowContent()
        del self._running[running.request.request_id]
        self._free.append(running.row)


def _count_equal(left: Sequence[int], right: Sequence[int], *, most: int) -> int:
    """Return how many tokens two sequences have in common at their beginning."""
    pairs = zip(left[:most], right[:most], strict=False)
    return next((count for count, (a, b) in enumerate(pairs) if a != b), min(len(left), most))
