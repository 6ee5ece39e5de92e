"""Columns that people name otherwise: which of them are probably the text, the label, the prompt and the completion."""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from lora_kit.io.text import format_path_argument

_WORDS: Final[Mapping[str, frozenset[str]]] = {
    "prompt": frozenset(
        {"ask", "input", "instruction", "prompt", "query", "question", "source", "user"}
        | {"anfrage", "anweisung", "eingabe", "frage"}
        | {"consigne", "demande", "entree", "requete"}
        | {"consulta", "entrada", "instruccion", "pregunta"}
    ),
    "completion": frozenset(
        {"answer", "assistant", "completion", "output", "reply", "response", "target"}
        | {"antwort", "ausgabe", "reponse", "sortie", "respuesta", "salida"}
    ),
    "text": frozenset(
        {"body", "comment", "complaint", "content", "description", "email", "feedback", "mail", "message", "post"}
        | {"review", "sentence", "subject", "text", "ticket", "tweet", "utterance"}
        | {"anfrage", "anliegen", "beschreibung", "beschwerde", "inhalt", "kommentar", "meldung", "nachricht", "satz"}
        | {"avis", "commentaire", "contenu", "courriel", "phrase", "plainte", "texte"}
        | {"comentario", "contenido", "correo", "descripcion", "frase", "mensaje", "queja", "resena", "texto"}
    ),
    "label": frozenset(
        {"category", "class", "department", "intent", "label", "mood", "polarity", "rating", "sentiment", "stars"}
        | {"tag", "team", "topic", "type"}
        | {"abteilung", "absicht", "art", "kategorie", "klasse", "stimmung", "thema", "typ"}
        | {"categorie", "classe", "etiquette", "intention", "theme"}
        | {"categoria", "clase", "departamento", "etiqueta", "intencion", "sentimiento", "tema", "tipo"}
    ),
}
"""Words in the names of columns in English, German, French and Spanish, without accents, by what these mostly hold."""
_PAIRS: Final = (("prompt", "completion"), ("text", "label"))
_COUNTERPARTS: Final = (("label", "text"), ("completion", "prompt"), ("text", "label"), ("prompt", "completion"))
"""What the other of two columns is, by what one is: from the clearest to the least clear."""


def suggest_renames(path: Path, row: Mapping[str, object]) -> str | None:
    """Return the command that gives columns the names of a layout; None where the names do not say which these are.

    Of two columns of text, one name is enough; where neither says anything, both readings are shown.
    """
    names = {name: _find_roles(name) for name in row}
    start = f"lora-kit prepare {shlex.quote(format_path_argument(path))} --rename"
    for pair in _PAIRS:
        found = [[name for name, roles in names.items() if role in roles] for role in pair]
        if all(len(candidates) == 1 for candidates in found) and found[0] != found[1]:
            return _format_command(start, {candidates[0]: role for candidates, role in zip(found, pair, strict=True)})
    if len(names) != 2 or not all(isinstance(value, str) for value in row.values()):
        return None
    for role, other_role in _COUNTERPARTS:
        known = [name for name, roles in names.items() if role in roles]
        if len(known) == 1:
            other = next(name for name in names if name != known[0])
            return _format_command(start, {known[0]: role, other: other_role})
    one, other = (shlex.quote(name) for name in names)
    return f"for texts with labels: {start} {one}=text {other}=label; for answers: {one}=prompt {other}=completion"


def find_text_column(row: Mapping[str, object]) -> str | None:
    """Return the one column whose name says that it holds the texts; None where none or several do."""
    found = [name for name in row if "text" in _find_roles(name)]
    return found[0] if len(found) == 1 else None


def _format_command(start: str, renames: Mapping[str, str]) -> str:
    return f"{start} {shlex.join(f'{old}={new}' for old, new in renames.items() if old != new)}"


def _find_roles(name: str) -> set[str]:
    words = _split_words(name)
    return {role for role, known in _WORDS.items() if known & words}


def _split_words(name: str) -> set[str]:
    """Return the words of a name in lower case without accents: `{"review", "text"}` for `ReviewText`."""
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", name) if not unicodedata.combining(letter))
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", plain)}
