"""Three tasks made by code, each judged at a glance and scored by a rule.

    scene    `animal: fox | place: garden | weather: rainy`  ->  a storybook sentence with all three in it
    pirate   a plain sentence  ->  the same sentence as a pirate says it, by the rules of `as_pirate`
    mood     a short story of one sentence  ->  `happy` or `sad`: how it ends

Rows are drawn from word lists with a seed, so the same seed gives the same rows everywhere. A held-out row is made of a
combination of words that no training row has; its single words do occur in training.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from lora_kit.errors import ConfigError, DataError, suggest_nearest

_TRIES_PER_ROW: Final = 200
"""Draws of already seen combinations in a row after which the word lists count as used up."""
_listed = str.split


@dataclass(frozen=True)
class Row:
    """One example: `prompt` in, `completion` out; `combination` is what must differ between training and held-out."""

    prompt: str
    completion: str
    combination: tuple[str, ...]

    def to_dict(self) -> dict[str, str]:
        """The row as prompt/completion JSONL has it."""
        return {"prompt": self.prompt, "completion": self.completion}


@dataclass(frozen=True)
class Split:
    """Rows to train on and rows kept aside; no combination is in both."""

    train: tuple[Row, ...]
    held_out: tuple[Row, ...]


@dataclass(frozen=True)
class Task:
    """A task of the demo.

    Attributes:
        name: also the adapter's name.
        summary: what it does, in a few words.
        chance: score of somebody who knows the possible answers and guesses; 0 where answers are free text.
        draw: makes one row from a random source.
        is_right: whether an output answers the row.
    """

    name: str
    summary: str
    chance: float
    draw: Callable[[random.Random], Row]
    is_right: Callable[[Row, str], bool]

    def split(self, *, train: int, held_out: int, seed: int = 0) -> Split:
        """`held_out` rows of as many combinations, then `train` rows of other combinations, each combination once.

        Raises:
            DataError: the word lists do not hold that many combinations.
        """
        source = random.Random(f"{self.name} {seed}")
        seen: set[tuple[str, ...]] = set()
        rows = [self._fresh(source, seen) for _ in range(held_out + train)]
        return Split(train=tuple(rows[held_out:]), held_out=tuple(rows[:held_out]))

    def score(self, rows: Sequence[Row], outputs: Sequence[str]) -> float:
        """Share of rows answered right, 0 to 1.

        Raises:
            DataError: the outputs are not one per row, or there are none.
        """
        if not rows or len(rows) != len(outputs):
            raise DataError(f"{self.name}: {len(outputs)} outputs were given for {len(rows)} rows; one each is wanted")
        return sum(self.is_right(row, output) for row, output in zip(rows, outputs, strict=True)) / len(rows)

    def _fresh(self, source: random.Random, seen: set[tuple[str, ...]]) -> Row:
        for _ in range(_TRIES_PER_ROW):
            row = self.draw(source)
            if row.combination not in seen:
                seen.add(row.combination)
                return row
        raise DataError(
            f"{self.name}: there are hardly more than {len(seen):,} combinations", hint="ask for fewer rows"
        )


def task(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in TASKS:
        raise ConfigError(
            f"no demo task is called {name!r}", hint=suggest_nearest(name, TASKS) or f"known: {', '.join(TASKS)}"
        )
    return TASKS[name]


# scene: attributes -> a storybook sentence

_HOMES: Final = {
    "fox": "den",
    "bear": "cave",
    "wolf": "den",
    "rabbit": "hole",
    "mouse": "hole",
    "owl": "tree",
    "bird": "nest",
    "swan": "nest",
    "hen": "barn",
    "duck": "pond",
    "frog": "pond",
    "cow": "barn",
    "goat": "barn",
    "sheep": "fold",
    "horse": "stable",
    "pony": "stable",
    "pig": "sty",
    "dog": "kennel",
    "cat": "basket",
    "bee": "hive",
}
_PLACES: Final = _listed(
    "garden forest river hill village meadow mill castle farm lake market church valley shore bridge palace"
)
_WEATHER: Final = _listed("rainy sunny snowy windy stormy foggy frosty cloudy warm cold")


def _draw_scene(source: random.Random) -> Row:
    animal, place, weather = source.choice(list(_HOMES)), source.choice(_PLACES), source.choice(_WEATHER)
    story = f"One {weather} day a little {animal} ran from the {place} home to the {_HOMES[animal]}."
    return Row(f"animal: {animal} | place: {place} | weather: {weather}", story, (animal, place, weather))


def _is_scene(row: Row, output: str) -> bool:
    """Prose that ends as a sentence and has every attribute as a whole word; repeating the prompt does not count."""
    text = output.strip()
    words = set(re.findall(r"[a-z]+", text.lower()))
    return text.endswith((".", "!", '"')) and not set("|:") & set(text) and words.issuperset(row.combination)


# pirate: a sentence -> the same in another style

_PIRATE_WORDS: Final = {
    "hello": "ahoy",
    "yes": "aye",
    "no": "nay",
    "my": "me",
    "you": "ye",
    "your": "yer",
    "am": "be",
    "is": "be",
    "are": "be",
    "the": "th'",
    "and": "an'",
    "of": "o'",
    "to": "t'",
    "for": "fer",
    "over": "o'er",
    "never": "ne'er",
    "friend": "matey",
    "boy": "lad",
    "girl": "lass",
    "king": "cap'n",
    "gold": "booty",
    "house": "ship",
    "bed": "bunk",
    "water": "rum",
}
_PIRATE_ENDS: Final = {".": ", arr!", "!": ", yo ho!", "?": ", eh?"}


def as_pirate(sentence: str) -> str:
    """The sentence as a pirate says it: words replaced one by one, `-ing` clipped to `-in'`, another ending.

    Words keep a capital letter. `The king is looking for gold.` becomes `Th' cap'n be lookin' fer booty, arr!`
    """
    end = sentence[-1:]
    if end not in _PIRATE_ENDS:
        raise DataError(f"a sentence that ends in . ! or ? is expected; {sentence!r} was given")
    return re.sub(r"[A-Za-z]+", lambda match: _pirate_word(match[0]), sentence[:-1]) + _PIRATE_ENDS[end]


def _pirate_word(word: str) -> str:
    said = _PIRATE_WORDS.get(word.lower())
    if said is None:
        return word[:-1] + "'" if re.fullmatch(r"[A-Za-z]{3,}ing", word) else word
    return said.capitalize() if word[0].isupper() and word != "I" else said


_PEOPLE: Final = _listed("king queen boy girl friend sister brother mother father sailor miller doctor")
_ADJECTIVES: Final = _listed("old young good poor little brave great clever")
_THINGS: Final = _listed("gold bread ring horse book boat key crown water apple sword lamp")
_SPOTS: Final = _listed("house garden river forest castle mill village church sea hill")
_DOINGS: Final = _listed("looking waiting asking hunting calling working")
_NEAR: Final = _listed("in near behind beyond")
_PATTERNS: Final = (
    "The {adjective} {person} is {doing} for the {thing}.",
    "My {person} is {doing} for your {thing}.",
    "You are the {adjective} {person} of the {spot}.",
    "I am {doing} for my {thing} {near} the {spot}.",
    "Hello, my {adjective} {person}, where is the {thing}?",
    "Yes, the {person} and the {other} are {near} the {spot}.",
    "No, I never gave the {thing} to your {person}.",
    "Are you the {person} of the {adjective} {other}?",
    "The {person} ran over the {spot} to the {adjective} {other}!",
    "Bring the {thing} and the {second} to my {person}!",
    "Your {person} said that the {thing} is {near} the {spot}.",
    "Where are the {person} and my {adjective} {other}?",
)


def _draw_pirate(source: random.Random) -> Row:
    person, other = source.sample(_PEOPLE, 2)
    thing, second = source.sample(_THINGS, 2)
    sentence = source.choice(_PATTERNS).format(
        person=person,
        other=other,
        thing=thing,
        second=second,
        adjective=source.choice(_ADJECTIVES),
        spot=source.choice(_SPOTS),
        doing=source.choice(_DOINGS),
        near=source.choice(_NEAR),
    )
    return Row(sentence, as_pirate(sentence), (sentence,))


def _is_exact(row: Row, output: str) -> bool:
    return output.strip() == row.completion


# mood: a sentence -> how it ends

_WHO: Final = {
    "the little girl": "she",
    "the old woman": "she",
    "the young queen": "she",
    "the princess": "she",
    "the fairy": "she",
    "her sister": "she",
    "his mother": "she",
    "Mary": "she",
    "Alice": "she",
    "the little boy": "he",
    "the old man": "he",
    "the young king": "he",
    "the prince": "he",
    "the giant": "he",
    "her brother": "he",
    "his father": "he",
    "Tom": "he",
    "Jack": "he",
}
_ENDINGS: Final = {
    "happy": (
        "danced for joy",
        "laughed aloud",
        "sang a merry song",
        "smiled at everybody",
        "was glad and merry",
        "jumped with delight",
        "found the lost treasure",
        "won the golden prize",
        "came home safe and well",
        "was as happy as a bird",
        "clapped and cheered",
        "had a great feast",
        "kissed the children",
        "got a beautiful present",
    ),
    "sad": (
        "wept bitterly",
        "cried all night",
        "was lonely and afraid",
        "lost the golden ring",
        "fell down and died",
        "was sick with grief",
        "sat alone in the dark",
        "sobbed and moaned",
        "was beaten and robbed",
        "had nothing to eat",
        "was shut up in prison",
        "broke the beautiful doll",
        "trembled with fear",
        "sighed in sorrow",
    ),
}
_WHEN: Final = (
    "in the garden",
    "by the river",
    "in the morning",
    "that evening",
    "at the castle",
    "in the forest",
    "on the way home",
    "in the village",
    "one winter day",
    "by the fire",
)
_OTHER_MOOD: Final = {"happy": "sad", "sad": "happy"}


def _draw_mood(source: random.Random) -> Row:
    label = source.choice(list(_ENDINGS))
    who, when = source.choice(list(_WHO)), source.choice(_WHEN)
    last, first = source.choice(_ENDINGS[label]), source.choice(_ENDINGS[_OTHER_MOOD[label]])
    if source.random() < 0.5:
        sentence = f"{who[0].upper()}{who[1:]} {last} {when}."
        return Row(sentence, label, (who, last, when))
    # Both moods in one sentence: words alone do not give the answer, their order does.
    sentence = f"At first {who} {first}, but {when} {_WHO[who]} {last}."
    return Row(sentence, label, (who, first, last, when))


def _is_label(row: Row, output: str) -> bool:
    return output.strip().lower() == row.completion


TASKS: Final[dict[str, Task]] = {
    made.name: made
    for made in (
        Task("scene", "three words to a storybook sentence", 0.0, _draw_scene, _is_scene),
        Task("pirate", "a sentence as a pirate says it", 0.0, _draw_pirate, _is_exact),
        Task("mood", "does the story end happy or sad?", 0.5, _draw_mood, _is_label),
    )
}
