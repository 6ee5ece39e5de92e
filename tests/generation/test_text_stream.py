"""The text of an answer as it grows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora_kit as lk
from lora_kit.generation.text_stream import TextStream
from lora_kit.models.protocols import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return lk.load_base("kit-base").tokenizer


def stream_all(tokenizer: Tokenizer, text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream, parts = TextStream(tokenizer, stop), list[str]()
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        parts.append(stream.push(token))
        if stream.stopped:
            break
    return [*parts, stream.finish()], stream


@given(text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=30))
def test_the_parts_are_the_whole_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    parts, stream = stream_all(tokenizer, text)
    assert "".join(parts) == stream.text == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_character_of_several_tokens_comes_whole(tokenizer: Tokenizer) -> None:
    parts, _ = stream_all(tokenizer, "a 🦊 b")
    assert "".join(parts) == "a 🦊 b"
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


@pytest.mark.parametrize("stop", ["fox", " fo", "n fox jum", "s\n", "x"])
def test_a_stop_text_over_the_borders_of_tokens_ends_the_answer(tokenizer: Tokenizer, stop: str) -> None:
    text = "The brown fox jumps\nover it"
    parts, stream = stream_all(tokenizer, text, (stop,))
    assert stream.stopped
    assert "".join(parts) == stream.text == text.partition(stop)[0]


def test_what_only_begins_like_a_stop_text_is_handed_out_in_the_end(tokenizer: Tokenizer) -> None:
    parts, stream = stream_all(tokenizer, "one two", ("two three",))
    assert not stream.stopped
    assert "".join(parts) == stream.text == "one two"


def test_nothing_of_a_stop_text_is_ever_shown(tokenizer: Tokenizer) -> None:
    parts, _ = stream_all(tokenizer, "one two three four", ("two three",))
    shown = ""
    for part in parts:
        shown += part
        assert "one ".startswith(shown)


def test_the_first_of_several_stop_texts_counts(tokenizer: Tokenizer) -> None:
    _, stream = stream_all(tokenizer, "one two three", ("three", "two"))
    assert stream.text == "one "
