"""Three tasks made by code; a row is answered right where the answer is exactly the completion.

    scene    `animal: fox | place: garden | weather: rainy`  ->  a storybook sentence with all three in it
    pirate   a plain sentence  ->  the same sentence as a pirate says it, by the rules of `as_pirate`
    mood     a short story of one sentence  ->  `happy` or `sad`: how it ends

Rows are drawn from the lists in `words.json` with a seed: the same seed gives the same rows on every machine. No
combination of words is both trained on and held out, but every single held-out word occurs in training.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lora_kit.errors import DataError

_WORDS: Final = json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8"))
_DRAWS_PER_ROW: Final = 200
"""Draws of known combinations in a row after which the word lists count as used up."""


@dataclass(frozen=True)
class DemoRow:
    """One example: a prompt, its completion, and the words whose combination must be new to a held-out row."""

    prompt: str
    completion: str
    combination: tuple[str, ...]

    def to_json(self) -> dict[str, str]:
        """Return the row as prompt/completion JSONL has it."""
        return {"prompt": self.prompt, "completion": self.completion}


@dataclass(frozen=True)
class DemoTask:
    """A task of the demo.

    Attributes:
        name: of the task and of its adapter.
        summary: what it does, in a few words.
        chance: score of guessing among the possible answers; 0 where answers are free text.
        draw: returns one row from a random source.
    """

    name: str
    summary: str
    chance: float
    draw: Callable[[random.Random], DemoRow]

    def split(self, *, train: int, held_out: int, seed: int = 0) -> tuple[list[DemoRow], list[DemoRow]]:
        """Return rows to train on and held-out rows, each of another combination; held-out rows are drawn first.

        Raises:
            DataError: the word lists do not hold that many combinations.
        """
        source, rows = random.Random(f"{self.name} {seed}"), dict[tuple[str, ...], DemoRow]()
        while len(rows) < held_out + train:
            drawn = (self.draw(source) for _ in range(_DRAWS_PER_ROW))
            row = next((row for row in drawn if row.combination not in rows), None)
            if row is None:
                raise DataError(f"{self.name}: hardly more than {len(rows):,} combinations", hint="ask for fewer rows")
            rows[row.combination] = row
        return list(rows.values())[held_out:], list(rows.values())[:held_out]


# scene: attributes -> a storybook sentence


def _draw_scene(source: random.Random) -> DemoRow:
    words = _WORDS["scene"]
    animal, place, weather = (source.choice(list(words[key])) for key in ("homes", "places", "weather"))
    story = f"One {weather} day a little {animal} ran from the {place} home to the {words['homes'][animal]}."
    return DemoRow(f"animal: {animal} | place: {place} | weather: {weather}", story, (animal, place, weather))


# pirate: a sentence -> the same in another style


def as_pirate(sentence: str) -> str:
    """Return the sentence as a pirate says it: words replaced one by one, `-ing` clipped to `-in'`, another ending.

    Words keep a capital letter. `The king is looking for gold.` becomes `Th' cap'n be lookin' fer booty, arr!`

    Args:
        sentence: ends in `.`, `!` or `?`.
    """
    words = re.sub(r"[A-Za-z]+", lambda match: _replace_pirate_word(match[0]), sentence[:-1])
    return words + str(_WORDS["pirate"]["ends"][sentence[-1]])


def _replace_pirate_word(word: str) -> str:
    other = _WORDS["pirate"]["words"].get(word.lower())
    if other is None:
        return word[:-1] + "'" if re.fullmatch(r"[A-Za-z]{3,}ing", word) else word
    return str(other.capitalize() if word[0].isupper() and word != "I" else other)


def _draw_pirate(source: random.Random) -> DemoRow:
    words = _WORDS["pirate"]
    person, other = source.sample(words["people"], 2)
    thing, second = source.sample(words["things"], 2)
    sentence = source.choice(words["patterns"]).format(
        person=person,
        other=other,
        thing=thing,
        second=second,
        **{key: source.choice(words[key]) for key in ("adjective", "spot", "doing", "near")},
    )
    return DemoRow(sentence, as_pirate(sentence), (sentence,))


# mood: a sentence -> how it ends


def _draw_mood(source: random.Random) -> DemoRow:
    words = _WORDS["mood"]
    label = source.choice(list(words["endings"]))
    who, when = source.choice(list(words["who"])), source.choice(words["when"])
    opposite = "sad" if label == "happy" else "happy"
    last, first = source.choice(words["endings"][label]), source.choice(words["endings"][opposite])
    if source.random() < 0.5:
        return DemoRow(f"{who[0].upper()}{who[1:]} {last} {when}.", label, (who, last, when))
    # Both moods in one sentence: words alone do not give the answer, their order does.
    sentence = f"At first {who} {first}, but {when} {words['who'][who]} {last}."
    return DemoRow(sentence, label, (who, first, last, when))


TASKS: Final = {
    task.name: task
    for task in (
        DemoTask("scene", "three words to a storybook sentence", 0.0, _draw_scene),
        DemoTask("pirate", "a sentence as a pirate says it", 0.0, _draw_pirate),
        DemoTask("mood", "does the story end happy or sad?", 0.5, _draw_mood),
    )
}
