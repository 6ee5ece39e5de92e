"""Small examples of rows for each kind of task: what a file of one's own looks like, and enough to try a training."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from lora_kit.data.records import Row

_ORDERS: Final = {
    "delivery": ("Where is my {}?", "The {} has not arrived yet.", "When will the {} be here?"),
    "refund": ("I want my money back for the {}.", "Please refund the {}.", "The {} came twice, take one back."),
    "repair": ("The {} is broken.", "My {} does not switch on.", "The {} makes a strange noise."),
    "praise": ("I love the {}!", "The {} is better than I hoped.", "Thank you for the lovely {}."),
}
_THINGS: Final = ("lamp", "kettle", "radio", "chair", "clock")
_CITIES: Final = ("Oslo", "Lima", "Cairo", "Quito", "Turin", "Hanoi")
_NAMES: Final = ("Anna", "Omar", "Mei", "Paul", "Ines", "Ravi")


def _build_labeled_texts() -> list[Row]:
    return [
        {"text": text.format(thing), "label": label}
        for thing in _THINGS
        for label, texts in _ORDERS.items()
        for text in texts
    ]


def _build_answers() -> list[Row]:
    """An order in words becomes JSON."""
    return [
        {
            "prompt": f"{count} {thing}s to {city}, please.",
            "completion": json.dumps({"item": thing, "count": count, "city": city}),
        }
        for (thing, city), count in zip(itertools.product(_THINGS, _CITIES), itertools.cycle(range(2, 9)), strict=False)
    ]


def _build_conversations() -> list[Row]:
    system = {"role": "system", "content": "You are the voice of a small shop. Answer in one friendly sentence."}
    return [
        {
            "messages": [
                system,
                {"role": "user", "content": f"Do you have a {thing} in {color}?"},
                {"role": "assistant", "content": f"Yes, a {color} {thing} is waiting for you in our shop!"},
            ]
        }
        for thing in _THINGS
        for color in ("red", "green", "blue", "white", "black", "yellow")
    ]


def _build_tagged_words() -> list[Row]:
    return [
        {"words": f"{name} moved to {city} last year .".split(), "labels": ["B-PER", "O", "O", "B-LOC", "O", "O", "O"]}
        for name in _NAMES
        for city in _CITIES
    ]


@dataclass(frozen=True)
class Goal:
    """What a person wants an adapter to do.

    Attributes:
        summary: what it is, in a few words.
        formats: the formats of rows that it is learned from.
        build_example: returns rows.
    """

    summary: str
    formats: tuple[str, ...]
    build_example: Callable[[], list[Row]]


GOALS: Final[Mapping[str, Goal]] = {
    "classify": Goal("texts get a label: intents, sentiment", ("label",), _build_labeled_texts),
    "answer": Goal("a prompt gets an answer: extraction, questions, rewriting", ("completion", "text"), _build_answers),
    "chat": Goal("conversations in a voice", ("chat",), _build_conversations),
    "tag": Goal("words get a label: names, places", ("words",), _build_tagged_words),
}
"""Goals by name."""


def render_example(goal: str) -> bytes:
    """Return the example of a goal as lines of JSON."""
    return "".join(json.dumps(row) + "\n" for row in GOALS[goal].build_example()).encode()
