"""The files of rows that the how-tos speak of: small, made by code, and enough for `prepare` to set some aside."""

from __future__ import annotations

import json
from typing import Any, Final

_ASKED: Final = {
    "card": ("My {} has not arrived yet", "How long does a new {} take", "I want to order another {}"),
    "login": ("I cannot sign in with my {}", "The app does not accept my {}", "How do I reset my {}"),
    "refund": ("When do I get the money for the {} back", "Please refund the {}", "The shop has not refunded the {}"),
    "transfer": ("Send 20 pounds to {}", "Is my transfer to {} done", "How much does a transfer to {} cost"),
}
_THINGS: Final = {
    "card": ("card", "bank card", "debit card", "credit card", "gold card"),
    "login": ("password", "code", "phone number", "fingerprint", "email"),
    "refund": ("shoes", "ticket", "book", "lamp", "order"),
    "transfer": ("Anna", "my sister", "Spain", "the landlord", "Tom"),
}
TICKETS: Final = [
    {"text": pattern.format(_THINGS[label][number]), "label": label}
    for number in range(5)
    for row in range(3)
    for label, pattern in ((name, patterns[row]) for name, patterns in _ASKED.items())
]
"""Texts with one of four labels, in turn."""

_WARES: Final = ("lamp", "kettle", "chair", "clock", "scarf", "rug", "vase", "desk")
_COLORS: Final = ("red", "blue", "green", "white", "black")
ANSWERS: Final = [
    {
        "messages": [
            {"role": "user", "content": f"Do you have the {ware} in {color}?"},
            {"role": "assistant", "content": f"We do! One {color} {ware}, coming right up. Anything else, friend?"},
        ]
    }
    for ware in _WARES
    for color in _COLORS
]
"""Conversations of one exchange, answered in one voice."""

TEASERS: Final = [
    {
        "prompt": f"{color} {ware}, {price} pounds",
        "completion": f"Meet the {ware}. It is {color}. It is yours for {price}.",
    }
    for price, (ware, color) in enumerate(((ware, color) for ware in _WARES for color in _COLORS), start=10)
]
"""Facts, and the text of the house about them."""

_PEOPLE: Final = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana")
_CITIES: Final = ("Bonn", "Cork", "Lyon", "Oslo", "Riga")
CONTACTS: Final = [
    {"prompt": f"{name} from {city} called about order {number}.",
     "completion": json.dumps({"name": name, "city": city, "order": number})}
    for number, (name, city) in enumerate(((name, city) for name in _PEOPLE for city in _CITIES), start=100)
]  # fmt: skip
"""Sentences, and what they say as JSON."""

PASSAGES: Final = [
    {"prompt": f"{name} lives in {city}. {name} keeps a {ware}. Question: {question}", "completion": answer}
    for name, ware in zip(_PEOPLE, _WARES, strict=True)
    for city in _CITIES[:3]
    for question, answer in (
        (f"Where does {name} live?", city),
        (f"Who is {name}'s boss?", "The text does not say."),
    )
]
"""Passages with a question; some have no answer."""

PLACES: Final = [
    {"words": [name, "went", "to", city, "today"], "labels": ["B-PERSON", "O", "O", "B-PLACE", "O"]}
    for name in _PEOPLE
    for city in _CITIES
]
"""Words with a label each."""

_WORDS: Final = {"lamp": "Lampe", "clock": "Uhr", "vase": "Vase"}
_ADJECTIVES: Final = {"red": "rote", "blue": "blaue", "green": "grüne", "white": "weiße", "black": "schwarze"}
SENTENCES: Final = [
    {"prompt": f"translate English to German: {start} {color} {ware}", "completion": f"{begin} {farbe} {ding}"}
    for start, begin in (("the", "die"), ("my", "meine"), ("no", "keine"))
    for ware, ding in _WORDS.items()
    for color, farbe in _ADJECTIVES.items()
]
"""Short texts in two languages."""

FILES: Final[dict[str, list[dict[str, Any]]]] = {
    "tickets.csv": TICKETS,
    "answers.jsonl": ANSWERS,
    "teasers.jsonl": TEASERS,
    "contacts.jsonl": CONTACTS,
    "passages.jsonl": PASSAGES,
    "places.jsonl": PLACES,
    "sentences.jsonl": SENTENCES,
}
"""Rows by the name of their file; a CSV has the keys of its first row as its header."""
