"""`data.streaming`: the same bytes as from memory, samples that a killed run has left, and what it does not go with."""

from __future__ import annotations

import logging
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_kit as lk
from lora_kit.data import row_stream
from lora_kit.data.encode import encode_and_count, encode_rows
from lora_kit.data.row_stream import StreamedSource
from lora_kit.data.rows import read_rows
from lora_kit.data.sample_format import SampleFormat
from lora_kit.data.sample_store import read_samples
from lora_kit.data.templates import chat_template
from lora_kit.errors import DataError, RecipeError
from lora_kit.training.job import recipe_rows
from lora_kit.training.job.job import Job
from lora_kit.training.job.recipe_rows import RecipeRows, encode_training_rows
from lora_kit.training.loop.checkpoints import RunFolder
from lora_kit.training.plan.plan import plan
from lora_kit.training.recipe.load import load_recipe
from tests.support import texts
from tests.support.training import PAIRS, At, base_of, recipe_of, weights_of

CHATS = [
    {"messages": [{"role": "user", "content": f"ask {n}"}, {"role": "assistant", "content": "b" * n}]}
    for n in range(1, 8)
]
TEXTS = [{"text": "one two three " * n} for n in range(1, 8)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_stream, "CHUNK_ROWS", 2)


def train(folder: Path, *, streaming: bool, packing: bool = False, **changes: Any) -> lk.TrainReport:
    folder.mkdir(exist_ok=True)
    overrides = {"data.streaming": streaming, "data.packing": packing}
    callbacks = changes.pop("callbacks", ())
    return lk.train(recipe_of(folder, **changes), base=base_of(), overrides=overrides, callbacks=callbacks)


def test_streamed_rows_that_are_packed_give_the_bytes_that_rows_in_memory_give(tmp_path: Path) -> None:
    reports = [train(tmp_path / str(streaming), streaming=streaming, packing=True) for streaming in (False, True)]
    assert weights_of(reports[0]) == weights_of(reports[1])
    assert reports[0].train_loss == reports[1].train_loss


@pytest.mark.parametrize("rows", [CHATS, TEXTS, PAIRS], ids=["chats", "texts", "pairs"])
def test_streamed_samples_are_those_of_rows_in_memory(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    stream = open_stream(tmp_path, rows)
    tokenizer = texts.tokenizer()
    form = SampleFormat(max_length=40, template=chat_template("plain", tokenizer, base="tiny"))
    samples, counts = encode_training_rows(stream, tokenizer, form, folder=None)
    whole, expected = encode_and_count(stream.train, tokenizer, form)
    names = ("ids", "labels", "offsets", "label_offsets")
    assert all(torch.equal(getattr(samples, name), getattr(whole, name)) for name in names)
    assert (counts, samples.kind, samples.num_labels) == (expected, whole.kind, whole.num_labels)


def open_stream(folder: Path, rows: list[dict[str, Any]]) -> RecipeRows:
    file = texts.write(folder / "rows.jsonl", rows)
    return RecipeRows(read_rows(file), None, StreamedSource.open(str(file), split="train", seed=0))


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_samples_to_the_same_bytes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = weights_of(train(tmp_path / "whole", streaming=False, train={"save_steps": 1}))

    def fail(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", streaming=True, train={"save_steps": 1}, callbacks=[At(2, fail)])
    samples = RunFolder(tmp_path / "cut" / "out").samples
    before = {path.name: path.stat().st_ino for path in samples.iterdir()}
    with caplog.at_level(logging.INFO, logger="lora_kit"):
        report = train(tmp_path / "cut", streaming=True, train={"save_steps": 1})
    assert len(before) == 5
    assert report.resumed == 1
    assert weights_of(report) == expected
    assert "where an earlier run has left them" in caplog.text
    assert not samples.parent.exists()


def test_a_run_from_memory_and_a_streamed_one_are_the_same_run(tmp_path: Path) -> None:
    recipe, base = recipe_of(tmp_path), base_of()
    jobs = [Job.open(load_recipe(recipe, overrides={"data.streaming": each}), base) for each in (False, True)]
    assert jobs[0].identity == jobs[1].identity


@pytest.fixture
def stream(tmp_path: Path) -> RecipeRows:
    return open_stream(tmp_path, PAIRS)


def test_samples_are_made_again_once_anything_that_decides_them_differs(
    stream: RecipeRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    encode_chunk = recipe_rows.encode_chunk
    monkeypatch.setattr(recipe_rows, "encode_chunk", lambda *args: made.append(1) or encode_chunk(*args))
    other = texts.tokenizer()
    other.add_tokens(["one"])
    settings = [
        (texts.tokenizer(), SampleFormat(max_length=32)),
        (texts.tokenizer(), SampleFormat(max_length=31)),
        (texts.tokenizer(), SampleFormat(max_length=31, separator=" ")),
        (other, SampleFormat(max_length=31, separator=" ")),
    ]
    for tokenizer, sample_format in settings:
        made.clear()
        for _ in range(2):
            samples, counts = encode_training_rows(stream, tokenizer, sample_format, folder=tmp_path / "samples")
        assert len(made) == 3  # chunks of 2 of 5 rows, once
        assert counts.rows == len(samples) == 5
        whole = encode_rows(stream.train, tokenizer, sample_format)
        assert all(torch.equal(getattr(samples, name), getattr(whole, name)) for name in ("ids", "labels", "offsets"))


def test_torn_samples_are_not_read(stream: RecipeRows, tmp_path: Path) -> None:
    folder, form = tmp_path / "samples", SampleFormat(max_length=32)
    samples, _ = encode_training_rows(stream, texts.tokenizer(), form, folder=folder)
    size = len(samples.ids)
    (folder / "ids.i32").write_bytes((folder / "ids.i32").read_bytes()[:-4])
    again, _ = encode_training_rows(stream, texts.tokenizer(), form, folder=folder)
    assert len(again.ids) == size
    assert read_samples(folder, made_from={}) is None


def test_encoding_takes_the_memory_of_a_chunk_whatever_the_rows(tmp_path: Path) -> None:
    peaks = []
    for count in (40, 400):
        file = texts.write(tmp_path / f"{count}.jsonl", [{"prompt": "p" * 400, "completion": "c" * 400}] * count)
        rows = RecipeRows(read_rows(file), None, StreamedSource.open(str(file), split="train", seed=0))
        tokenizer = texts.tokenizer()
        tracemalloc.start()
        encode_training_rows(rows, tokenizer, SampleFormat(max_length=1000), folder=tmp_path / f"samples-{count}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_a_plan_counts_streamed_rows_and_leaves_no_file(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, rows=TEXTS)
    plans = [plan(recipe, base=base_of(), overrides={"data.streaming": each}) for each in (False, True)]
    assert plans[0].data == plans[1].data
    assert plans[1].data.rows == len(TEXTS)
    assert not RunFolder(tmp_path / "out").folder.exists()


def list_rejected() -> Iterator[tuple[dict[str, Any], str]]:
    yield {"task": "classify"}, "data.streaming is for the tasks causal-lm and seq2seq"
    yield {"objective": "dpo"}, "data.streaming does not go with objective dpo"


@pytest.mark.parametrize(("changes", "message"), list(list_rejected()), ids=str)
def test_what_streaming_does_not_go_with_is_rejected_with_the_way_out(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        train(tmp_path, streaming=True, **changes)


def test_an_invalid_streamed_row_stops_the_training_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="jsonl:6: completion"):
        train(tmp_path, rows=[*PAIRS, {"prompt": "x", "completion": ""}], streaming=True)
    assert not (tmp_path / "out").exists()
    assert not RunFolder(tmp_path / "out").samples.exists()
