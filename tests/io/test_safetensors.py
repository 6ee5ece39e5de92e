"""A header that was read before: what it says is used again, and every file is read by its own bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_kit.errors import AdapterError
from lora_kit.io import safetensors
from lora_kit.io.safetensors import WeightFileContents, encode_safetensors, read_safetensors


def write(path: Path, value: float) -> bytes:
    tensors = {"a": torch.full((2, 3), value), "b": torch.full((4,), -value)}
    path.write_bytes(b"".join(bytes(piece) for piece in encode_safetensors(tensors)))
    return path.read_bytes()


def read(path: Path) -> WeightFileContents:
    return read_safetensors(path, check_size=lambda size: None, seen=lambda piece: None)


def test_a_known_header_is_not_parsed_again_and_the_values_are_those_of_each_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "one", 1.0)
    write(tmp_path / "two", 2.0)
    assert read(tmp_path / "one").tensors["a"][0, 0] == 1
    monkeypatch.setattr(safetensors, "_parse_header", lambda *_: pytest.fail("parsed again"))
    contents = read(tmp_path / "two")
    assert contents.canonical
    assert contents.tensors["a"].shape == (2, 3)
    assert contents.tensors["b"].tolist() == [-2.0] * 4


@pytest.mark.parametrize("change", [lambda data: data[:-4], lambda data: data + b"\0" * 4], ids=["shorter", "longer"])
def test_a_known_header_over_other_bytes_than_it_describes_is_refused(
    tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    data = write(tmp_path / "whole", 3.0)
    read(tmp_path / "whole")
    (tmp_path / "other").write_bytes(change(data))
    with pytest.raises(AdapterError, match=r"truncated|after the last tensor"):
        read(tmp_path / "other")


def test_so_many_headers_are_remembered_and_no_more(tmp_path: Path) -> None:
    for number in range(3 * safetensors._MOST_KNOWN):
        tensors = {f"t{number}": torch.zeros(2)}
        (tmp_path / "file").write_bytes(b"".join(bytes(piece) for piece in encode_safetensors(tensors)))
        assert list(read(tmp_path / "file").tensors) == [f"t{number}"]
    assert len(safetensors._KNOWN_HEADERS) <= safetensors._MOST_KNOWN
