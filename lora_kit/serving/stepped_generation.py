"""transformers' `generate` of one batch, a token of each row at a time.

It runs in a thread of its own, which computes only while `advance` waits for it, so whoever calls that owns the model
in between. Tokens are chosen outside: a logits processor hands the logits out and the tokens in, and a stopping
criterion reports which rows have ended. Both are public pieces of transformers.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LogitsProcessorList, StoppingCriteriaList

Generate = Callable[["LogitsProcessorList", "StoppingCriteriaList"], object]
"""Calls `model.generate` with these."""
_JOIN_SECONDS: Final = 60.0


@dataclass(frozen=True)
class RowTokens:
    """What the rows of a batch go on with.

    Attributes:
        tokens: int64 (rows,); any token for a row that has ended.
        ended: bool (rows,).
    """

    tokens: Tensor
    ended: Tensor


class _StopGenerationError(Exception):
    """Leaves `generate`."""


class SteppedGeneration:
    """A generation that goes on when it is asked to.

    Args:
        generate: begins it, in the thread of the generation.
    """

    def __init__(self, generate: Generate) -> None:
        self._generate = generate
        self._inbox = queue.SimpleQueue[RowTokens | None]()
        self._outbox = queue.SimpleQueue[Tensor | Exception | None]()
        self._ended: Tensor | None = None
        self._thread = threading.Thread(target=self._run, name="lora-kit-generation", daemon=True)

    def advance(self, chosen: RowTokens | None) -> Tensor | None:
        """Compute up to the next tokens, and return their logits, float (rows, vocabulary); None after the last ones.

        Args:
            chosen: the tokens for the logits before; None to begin.

        Raises:
            Exception: whatever `generate` raised; it has ended then.
        """
        if chosen is None:
            self._thread.start()
        else:
            self._inbox.put(chosen)
        result = self._outbox.get()
        if not isinstance(result, Tensor):
            self._thread.join()
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        """End it in the middle; nothing happens to one that has not begun, or has ended."""
        if self._thread.is_alive():
            self._inbox.put(None)
            self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        from transformers import LogitsProcessorList, StoppingCriteriaList

        result: Exception | None = None
        try:
            with torch.inference_mode():
                self._generate(LogitsProcessorList([self._exchange]), StoppingCriteriaList([self._list_ended]))
        except _StopGenerationError:
            pass
        except Exception as error:  # the caller gets it
            result = error
        self._outbox.put(result)

    def _exchange(self, input_ids: Tensor, scores: Tensor, **options: Any) -> Tensor:
        """Hand the logits out, wait for tokens, and return logits of which these are the largest."""
        self._outbox.put(scores)
        chosen = self._inbox.get()
        if chosen is None:
            raise _StopGenerationError
        self._ended = chosen.ended
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter_(1, chosen.tokens.to(scores.device).unsqueeze(1), 0.0)

    def _list_ended(self, input_ids: Tensor, scores: object, **options: Any) -> Tensor:
        assert self._ended is not None
        return self._ended.to(input_ids.device)


def make_row_tokens(tokens: Sequence[int], ended: Sequence[bool]) -> RowTokens:
    """Return the tokens of rows, and which rows have ended."""
    return RowTokens(torch.tensor(tokens), torch.tensor(ended))
