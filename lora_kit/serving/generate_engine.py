"""The engine for bases that a packed forward does not cover: batches through `generate`, each row by its own adapter.

Every base that transformers generates with: soft caps, state spaces, biases by distance, an encoder before the decoder.
A batch goes on until its last row has ended, and requests that come meanwhile wait for the next one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from lora_kit.bank.bank import AdapterBank
from lora_kit.bank.routes import Lease
from lora_kit.errors import BaseModelError
from lora_kit.generation.text_stream import TextStream
from lora_kit.models.loading import Base
from lora_kit.models.tasks import SEQ2SEQ
from lora_kit.serving.engine import EngineRequest, Event, FinishReason
from lora_kit.serving.running_request import RunningRequest
from lora_kit.serving.sampler import Sampler
from lora_kit.serving.stepped_generation import SteppedGeneration, make_row_tokens
from lora_kit.serving.waiting_requests import (
    WaitingRequests,
    check_vocabulary,
    check_wanted,
    make_duplicate_error,
    make_length_error,
)

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

logger = logging.getLogger(__name__)

_UNKNOWN_CONTEXT: Final = 2048
"""Tokens of prompt and answer where neither the base nor its tokenizer says how many it reads."""
_UNKNOWN: Final = 2**30
_PROBE_LENGTHS: Final = (5, 11)
_PROBE_STEPS: Final = 3
_PROBE_TOLERANCE: Final = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class GenerateEngine:
    """An `Engine` over `generate`, for decoders and for encoders with a decoder.

    Attributes:
        needs_runs: its rows belong to adapters whole, so that any adapter can be in a batch.
        pads: whether prompts of different lengths share a batch: where padding does not change a row.
        failures: forwards that raised an exception so far.
    """

    needs_runs: Final = False

    def __init__(
        self, base: Base, bank: AdapterBank | None = None, *, rows: int = 32, positions: int | None = None
    ) -> None:
        """Find out how the base generates.

        Args:
            base: a base that generates.
            bank: of its adapters; None to serve the base alone.
            rows: requests of a batch, at most.
            positions: tokens of prompt and answer, at most; None for what the base reads.

        Raises:
            BaseModelError: it does not generate.
        """
        self._base, self._bank, self._rows = base, bank, rows
        most = base.max_length if base.max_length < _UNKNOWN else _UNKNOWN_CONTEXT
        self._positions = min(positions or most, base.max_length)
        self._waiting = WaitingRequests()
        self._batch = dict[str, RunningRequest]()  # every row, also those that have ended
        self._running = set[str]()
        self._cancelled = set[str]()
        self._generation: SteppedGeneration | None = None
        self.failures = 0
        self.pads = self._find_padding()

    @property
    def positions(self) -> int:
        return self._positions

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def busy_contents(self) -> frozenset[str]:
        return frozenset(running.request.content for running in self._batch.values())

    def count_left(self, prompt_tokens: int) -> int:
        # The decoder behind an encoder has positions of its own, and a token that begins its text.
        return self._positions - 1 if self._base.task == SEQ2SEQ else self._positions - prompt_tokens

    def close(self) -> None:
        """End the batch that runs."""
        self._leave_batch()

    def submit(self, request: EngineRequest) -> None:
        """Take a request.

        Raises:
            RequestError: the id is in use, the prompt is empty or has a token that is not one, or it is too long.
        """
        if request.request_id in self._running:
            raise make_duplicate_error(request.request_id)
        check_wanted(request, "tokens")
        check_vocabulary(request, vocabulary=self._base.model.config.get_text_config().vocab_size)
        is_too_long = request.settings.max_tokens > self.count_left(len(request.prompt))
        if len(request.prompt) > self._positions or is_too_long:
            raise make_length_error(len(request.prompt), request.settings.max_tokens, self._positions)
        self._waiting.add(request)

    def cancel(self, request_id: str) -> None:
        if request_id in self._waiting or request_id in self._running:
            self._cancelled.add(request_id)

    def step(self) -> list[Event]:
        """End what was cancelled, begin a batch where none runs, and compute the next token of each row."""
        events = self._end_cancelled()
        try:
            if not self._running:
                self._leave_batch()  # those that were left in it were cancelled just now
                self._begin_batch(self._waiting.take(self._rows, group=self._group))
            logits = self._advance()
        except Exception as error:  # whatever it is: the batch ends, others go on
            logger.exception("a batch failed")
            self.failures += 1
            message = f"{type(error).__name__}: {error}"
            events += [self._end(self._batch[each], "error", message) for each in list(self._running)]
            self._leave_batch()
            return events
        return events if logits is None else events + self._choose_all(logits)

    def _group(self, request: EngineRequest) -> int:
        return 0 if self.pads else len(request.prompt)

    def _end_cancelled(self) -> list[Event]:
        events = []
        for request_id in self._cancelled:
            if request_id in self._running:
                events.append(self._end(self._batch[request_id], "cancelled"))
            elif event := self._waiting.cancel(request_id):
                events.append(event)
        self._cancelled.clear()
        return events

    def _end(self, running: RunningRequest, reason: FinishReason, message: str = "") -> Event:
        self._running.discard(running.request.request_id)
        return running.end(reason, message)

    # One batch

    def _begin_batch(self, requests: Sequence[EngineRequest]) -> None:
        for row, request in enumerate(requests):
            sampler = Sampler(request.settings, request.prompt, request.end_tokens)
            stream = TextStream(self._base.tokenizer, request.settings.stop)
            running = RunningRequest(request, sampler, stream, row=row, read=len(request.prompt), reused=0)
            self._batch[request.request_id] = running
            self._running.add(request.request_id)
        if requests:
            prompts, leases = [request.prompt for request in requests], [request.lease for request in requests]
            most = max(request.settings.max_tokens for request in requests)
            self._generation = self._generate(prompts, leases, most)

    def _leave_batch(self) -> None:
        if self._generation is not None:
            self._generation.close()
        self._generation = None
        self._batch.clear()
        self._running.clear()

    def _advance(self) -> Tensor | None:
        """Return the logits of each row's next token; None where nothing runs."""
        if self._generation is None:
            return None
        rows = list(self._batch.values())
        if not any(running.answer for running in rows):
            return self._generation.advance(None)
        pad = self._base.pad_token_id
        ended = [running.request.request_id not in self._running for running in rows]
        tokens = [pad if end else running.answer[-1] for running, end in zip(rows, ended, strict=True)]
        return self._generation.advance(make_row_tokens(tokens, ended))

    def _choose_all(self, logits: Tensor) -> list[Event]:
        """Choose a token for each row that goes on, and return what came of it."""
        events = []
        for running, row in zip(self._batch.values(), logits, strict=True):
            if running.request.request_id in self._running:
                event = running.choose(row)
                events.append(event)
                if event.finish is not None:
                    self._running.discard(running.request.request_id)
        if not self._running:
            self._leave_batch()
        return events

    def _generate(
        self, prompts: Sequence[Sequence[int]], leases: Sequence[Lease | None], most: int
    ) -> SteppedGeneration:
        """Return a generation for these prompts, which has not begun."""
        inputs = self._pad(prompts)
        start = 1 if self._base.task == SEQ2SEQ else inputs["input_ids"].shape[1]

        def generate(processors: LogitsProcessorList, criteria: StoppingCriteriaList) -> object:
            routed = None if self._bank is None else [None if lease is None else lease.digest for lease in leases]
            with nullcontext() if self._bank is None or routed is None else self._bank.rows(routed):
                return self._base.model.generate(
                    **inputs,
                    generation_config=self._build_config(start + most),
                    logits_processor=processors,
                    stopping_criteria=criteria,
                )

        return SteppedGeneration(generate)

    def _pad(self, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask`, int64 (rows, longest): padded on the left for a decoder."""
        longest, pad = max(map(len, prompts)), self._base.pad_token_id
        ids = torch.full((len(prompts), longest), pad)
        mask = torch.zeros_like(ids)
        for index, prompt in enumerate(prompts):
            is_right = self._base.task == SEQ2SEQ
            own = slice(0, len(prompt)) if is_right else slice(longest - len(prompt), longest)
            ids[index, own] = torch.tensor(prompt)
            mask[index, own] = 1
        return {"input_ids": ids.to(self._base.device), "attention_mask": mask.to(self._base.device)}

    def _build_config(self, length: int) -> GenerationConfig:
        """Return what `generate` is to do: as many tokens as are asked for, whatever the base's own settings are.

        Those settings fill what is not given, so that each is given; of a decoder's first tokens they are kept.
        """
        from transformers import GenerationConfig

        never = int(self._base.model.config.get_text_config().vocab_size)  # no token: rows end by our own criterion
        own, options = self._base.model.generation_config, dict[str, Any]()
        if self._base.task == SEQ2SEQ:
            start = getattr(own, "decoder_start_token_id", None)
            options["decoder_start_token_id"] = (
                self._base.model.config.decoder_start_token_id if start is None else start
            )
        return GenerationConfig(
            max_length=length + 1,  # past the end, where some bases force their end token
            eos_token_id=never,
            pad_token_id=self._base.pad_token_id,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            min_length=0,
            min_new_tokens=0,
            repetition_penalty=1.0,
            encoder_repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            encoder_no_repeat_ngram_size=0,
            use_cache=True,
            **options,
        )

    # What the base does

    def measure_effect(self, lease: Lease) -> float:
        prompt = self._probe(_PROBE_LENGTHS[-1])
        with_adapter, without = (self._write(prompt, adapter, [])[0] for adapter in (lease, None))
        return float((with_adapter - without).abs().max())

    def _probe(self, length: int) -> list[int]:
        """Return a few tokens spread over the vocabulary."""
        vocabulary = self._base.model.config.get_text_config().vocab_size
        return [(place + 1) * vocabulary // (length + 2) for place in range(length)]

    def _write(self, prompt: Sequence[int], lease: Lease | None, tokens: Sequence[int]) -> list[Tensor]:
        """Return the logits after a prompt, and after each of some tokens that follow it, fp32 (vocabulary,)."""
        return self._write_all([prompt], [lease], [tokens])[0]

    def _write_all(
        self, prompts: Sequence[Sequence[int]], leases: Sequence[Lease | None], tokens: Sequence[Sequence[int]]
    ) -> list[list[Tensor]]:
        steps = len(tokens[0])
        generation = self._generate(prompts, leases, steps + 1)
        try:
            logits = [generation.advance(None)]
            for step in range(steps):
                chosen = make_row_tokens([row[step] for row in tokens], [False] * len(prompts))
                logits.append(generation.advance(chosen))
        finally:
            generation.close()
        return [[each[row].float() for each in logits if each is not None] for row in range(len(prompts))]

    def _find_padding(self) -> bool:
        """Return whether prompts of different lengths give in one batch what each gives alone."""
        prompts, tokens = [self._probe(length) for length in _PROBE_LENGTHS], self._probe(_PROBE_STEPS)
        try:
            alone = [self._write(prompt, None, tokens) for prompt in prompts]
            together = self._write_all(prompts, [None] * len(prompts), [tokens] * len(prompts))
        except Exception as error:  # a model may do anything
            raise BaseModelError(
                f"{self._base.name} cannot be served: it does not generate: {type(error).__name__}: {str(error)[:200]}",
                hint="a server needs a decoder, an encoder with one, or a classifier",
            ) from error
        expected, given = (torch.stack([torch.stack(row) for row in rows]) for rows in (alone, together))
        bound = _PROBE_TOLERANCE[self._base.model.dtype] * float(expected.abs().max().clamp(min=1.0))
        return bool((expected - given).abs().max() <= bound)
