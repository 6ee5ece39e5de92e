"""The exception family: one tree, each leaf also the builtin that it specializes.

LoraKitError
├── ConfigError (ValueError)            a LoraConfig or an adapter_config.json is wrong
│   └── RecipeError                     a recipe is wrong
├── TargetError (ValueError)            a config does not match the modules of a model
├── AdapterError (ValueError)           an adapter's files or tensors are wrong
│   └── BaseMismatchError               the adapter was made for another base
├── UnknownAdapterError (LookupError)   no adapter of that name
├── BankError (RuntimeError)            the bank cannot do this in its present state
├── RoutingError (ValueError)           the rows do not match the batch
├── BaseModelError (ValueError)         a base model cannot be found or read
├── DataError (ValueError)              training data is wrong
├── MergeError (ValueError)             a merge cannot be done as asked
├── ExportError (ValueError)            an adapter cannot be exported to this program
├── PublishError (OSError)              a repository of the hub cannot be written
├── StorageError (OSError)              the machine: disk, memory, permission, an output that exists
│   └── OutOfMemoryError (MemoryError)  memory ran out, or would
└── VerificationError (RuntimeError)    something written or computed is not what it should be
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

REPORTED_ELSEWHERE: Final = "reported_elsewhere"
"""The attribute of an error that another process reports."""


class LoraKitError(Exception):
    """What was given, what was expected and what to do about it.

    Attributes:
        message: one line (or, for a list of mismatches, one line each).
        hint: what to do about it, or an empty string.
        exit_code: of the command line: 2 the input is wrong, 3 the machine fails, 4 a verification failed.
    """

    exit_code = 2

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def __reduce__(self) -> tuple[Callable[..., LoraKitError], tuple[object, ...]]:
        # Subclasses make their message from other arguments, so a copy is not made by their constructor.
        return _rebuild_error, (type(self), self.args, dict(self.__dict__))


def _rebuild_error(kind: type[LoraKitError], args: tuple[object, ...], fields: Mapping[str, object]) -> LoraKitError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(fields)
    return error


class ConfigError(LoraKitError, ValueError):
    """A LoraConfig or an `adapter_config.json` is wrong."""


class RecipeError(ConfigError):
    """A recipe is wrong."""


class TargetError(LoraKitError, ValueError):
    """A config does not match the modules of a model."""


class AdapterError(LoraKitError, ValueError):
    """An adapter's files or tensors are wrong."""


class BaseMismatchError(AdapterError):
    """The adapter was made for another base."""


class UnknownAdapterError(LoraKitError, LookupError):
    """No adapter of that name."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        known = list(known)
        super().__init__(
            f"no adapter is called {name!r}", hint=suggest_nearest(name, known) or f"loaded: {format_list(known)}"
        )


class BankError(LoraKitError, RuntimeError):
    """The bank cannot do this in its present state."""


class RoutingError(LoraKitError, ValueError):
    """The rows do not match the batch."""


class BaseModelError(LoraKitError, ValueError):
    """A base model cannot be found or read."""


class DataError(LoraKitError, ValueError):
    """Training data is wrong."""


class MergeError(LoraKitError, ValueError):
    """A merge cannot be done as asked."""


class ExportError(LoraKitError, ValueError):
    """An adapter cannot be exported to this program."""


class PublishError(LoraKitError, OSError):
    """A repository of the hub cannot be written: access, a conflict, the connection."""

    exit_code = 3


class StorageError(LoraKitError, OSError):
    """The machine: disk, permission, an output that exists already."""

    exit_code = 3


class OutOfMemoryError(StorageError, MemoryError):
    """Memory ran out, of the machine or of a device; or it would, and nothing was allocated."""


class VerificationError(LoraKitError, RuntimeError):
    """Something written or computed is not what it should be."""

    exit_code = 4


_MAX_WORD: Final = 200
_TYPING_ERROR: Final = 0.8
_RESEMBLANCE: Final = 0.6
"""Share of the letters that two words have in common, by difflib's measure."""
_MAX_ITEM: Final = 160
"""Characters of an item of a list that are shown: it may be a name in a file of others."""
_MAX_LIST: Final = 320
"""Characters of a list that are shown, about."""


def suggest_nearest(word: str, known: Iterable[str]) -> str:
    """Return `did you mean 'x'?`, or an empty string where no known word is close; see `find_nearest`."""
    nearest = find_nearest(word, list(known))
    return "" if nearest is None else f"did you mean {nearest!r}?"


def sort_by_similarity(word: str, known: Iterable[str]) -> list[str]:
    """Return known words, those first that are most like a word."""
    if len(word) > _MAX_WORD:
        return sorted(known)
    return sorted(known, key=lambda name: (-difflib.SequenceMatcher(None, word, name).ratio(), name))


def find_nearest(word: str, known: Sequence[str]) -> str | None:
    """Return the known word that was meant; None where no one is close.

    Close is a word with a typing error, one with these initials (`lr` for `learning_rate`, `rank` for `r`), or one that
    this is a part of (`epochs` for `num_train_epochs`).
    """
    if not isinstance(word, str) or len(word) > _MAX_WORD:  # comparing takes time that grows with the square
        return None
    close = difflib.get_close_matches(word, known, n=1, cutoff=_TYPING_ERROR)
    plain = _split_words(word)
    close += sorted((name for name in known if plain and _are_initials(plain, _split_words(name))), key=len)
    close += [name for name in known if plain and f"_{'_'.join(plain)}_" in f"_{'_'.join(_split_words(name))}_"]
    close += difflib.get_close_matches(word, known, n=1, cutoff=_RESEMBLANCE)
    return close[0] if close else None


def _split_words(name: str) -> list[str]:
    return [part for part in re.split(r"[\W_]+", name.lower()) if part]


def _are_initials(one: Sequence[str], other: Sequence[str]) -> bool:
    """Return whether one of two names is the initials of the other: `lr` and `learning_rate`."""
    return any(
        len(short) == 1 and short[0] == "".join(part[0] for part in long)
        for short, long in ((one, other), (other, one))
        if short != long
    )


def format_list(items: Sequence[str], *, most: int = 8) -> str:
    """Return `a, b, c and 4 more`; `none` for no items.

    At most `most` items by name, fewer where they are long, each as one line and cut where it is very long.
    """
    shown: list[str] = []
    room = _MAX_LIST
    for item in items[:most]:
        text = escape_and_cut(item, most=_MAX_ITEM)
        room -= len(text)
        if shown and room < 0:
            break
        shown.append(text)
    left = len(items) - len(shown)
    return f"{', '.join(shown)} and {left} more" if left else ", ".join(shown) or "none"


def cut_text(text: str, *, most: int) -> str:
    """Return text, cut after `most` characters where it is longer."""
    return text if len(text) <= most else f"{text[:most]}…"


def escape_and_cut(text: str, *, most: int) -> str:
    """Return text as one line, `escape_unprintable`, cut after `most` characters where it is longer."""
    return cut_text(escape_unprintable(text[: most + 1]), most=most)


def escape_unprintable(text: str) -> str:
    r"""Return text with line breaks, control characters and surrogates as escapes: `\n`, `\x1b`, `\ud800`."""
    return (
        text
        if text.isprintable()
        else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    )
