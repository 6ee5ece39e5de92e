"""Rows of prompts that are prepared for answers of the model's own, which functions reward."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final

from lora_kit.data.preparation.examine import ReadOptions
from lora_kit.data.preparation.prepared_folder import PreparedFile
from lora_kit.data.prompt_rows import PROMPT_FORMATS
from lora_kit.errors import DataError

_MAX_ANSWER_TOKENS: Final = 256
"""Tokens of an answer, at most; half of those of a sample where these are fewer."""


def leave_room_for_answers(options: ReadOptions, rewards: Sequence[str]) -> ReadOptions:
    """Return options for prompts that the model answers: up to half of the tokens of a sample are the answer's."""
    if not rewards:
        return options
    answer_tokens = min(_MAX_ANSWER_TOKENS, options.sample_format.max_length // 2)
    sample_format = dataclasses.replace(options.sample_format, answer_tokens=answer_tokens)
    return dataclasses.replace(options, rewards=tuple(rewards), sample_format=sample_format)


def check_has_rewards(part: PreparedFile, rewards: Sequence[str]) -> None:
    """Raise DataError for rows without answers where no function rewards answers of the model's own."""
    if part.examined.rows.format in PROMPT_FORMATS and not rewards:
        what = f"{part.path} has prompts without answers"
        raise DataError(what, hint="functions that reward answers of the model's own: --rewards rewards.py:has_answer")


def describe_answers(options: ReadOptions) -> dict[str, object]:
    """Return the settings of answers that the model writes itself; none where the rows have them."""
    if not options.rewards:
        return {}
    names = list(options.rewards)
    tokens = options.sample_format.answer_tokens
    return {"rewards": names[0] if len(names) == 1 else names, "answer_tokens": tokens}
