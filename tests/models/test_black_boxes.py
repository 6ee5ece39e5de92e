"""Quantized bases of other makes than bitsandbytes: a layer that maps (..., in) to (..., out) is all that is needed.

`python -m tests.models.test_black_boxes` rewrites the table of docs/quantized.md; rows of packages that are
missing stay.
"""

from __future__ import annotations

import functools
import gc
import tempfile
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lora_kit as lk
from benchmarks.harness import replace_marked, table
from lora_kit.errors import MergeError, TargetError
from lora_kit.layers.introspect import is_quantized, kind_of
from lora_kit.models.loading import load_base
from tests.support import tiny
from tests.support.black_boxes import BOXES, AwqLinear, Box, Codes, GptqLinear, compressed
from tests.support.quantized import FIELDS, adam, swaps_and_rows, trained

PAGE = Path(__file__).parents[2] / "docs" / "quantized.md"
COLUMNS = ("base", "from a folder", "trains", "swaps", "rows", "saved, loaded", "weight kept for the backward", "merge")
by_hand = pytest.mark.parametrize("kind", [GptqLinear, AwqLinear])


@dataclass(frozen=True)
class Row:
    """What was seen of one kind of base."""

    stored: str
    trains: str
    swaps: str
    rows: str
    saved: str
    kept: str
    merge: str


@functools.cache
def seen(name: str) -> Row:
    """Everything that is asked of a kind, on one tiny Llama."""
    box = BOXES[name]
    model = box.make()
    covered = [path for path, module in model.named_modules() if kind_of(module) == "linear" and "_proj" in path]
    assert len(covered) == 7 * model.config.num_hidden_layers
    assert all(is_quantized(model.get_submodule(path)) for path in covered)
    base = tiny.logits(model, tiny.batch())
    bank = lk.attach(model, lk.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), name="a")
    assert [target.path for target in bank.coverage("a").targets] == covered
    assert torch.equal(tiny.logits(model, tiny.batch()), base)
    with tempfile.TemporaryDirectory() as folder:
        trains = _trains(box, model, bank, Path(folder) / "start")
        bank.add("bb", lk.LoraConfig(**FIELDS))
        swaps, rows = swaps_and_rows(model, bank, base)
        saved = _saved(model, bank, box.make(), Path(folder) / "a")
    kept, merge = _kept(model), _merge(model, bank)
    bank.detach()
    assert torch.equal(tiny.logits(model, tiny.batch()), base)
    return Row("yes" if box.stored else "–", trains, swaps, rows, saved, kept, merge)


def _trains(box: Box, model: Any, bank: lk.AdapterBank, folder: Path) -> str:
    bank.save("a", folder)
    ours = trained(model, adam(bank.parameters("a")), range(5))
    assert ours[4] < ours[0]
    judge = box.plain() if box.plain else box.make()
    theirs: Any = peft.PeftModel.from_pretrained(judge, folder, is_trainable=True)
    judged = trained(theirs, adam([p for p in theirs.parameters() if p.requires_grad]), range(5))
    torch.testing.assert_close(ours, judged, rtol=1e-3, atol=0)
    return "as PEFT does" if box.plain is None else "as PEFT does on the dequantized weights"


def _saved(model: Any, bank: lk.AdapterBank, pristine: Any, folder: Path) -> str:
    bank.use("a")
    bank.save("a", folder)
    other = lk.attach(pristine, slots=1)
    other.load("a", folder)
    other.use("a")
    assert torch.equal(tiny.logits(pristine, tiny.batch()), tiny.logits(model, tiny.batch()))
    return "yes"


def _kept(model: Any) -> str:
    """Whether a dequantized weight waits for the backward."""
    linear = [m.base_layer for m in model.modules() if hasattr(m, "base_layer")]
    shapes = {(layer.in_features, layer.out_features) for layer in linear}
    shapes |= {shape[::-1] for shape in shapes}
    saved: list[Tensor] = []
    inputs = tiny.batch()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    gc.collect()
    alive = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    kept = [t for t in (*saved, *alive) if type(t) in (Tensor, nn.Parameter) and t.is_floating_point()]
    found = [t for t in kept if tuple(t.shape) in shapes]
    loss.backward()
    return "yes, by its package" if found else "no"


def _merge(model: Any, bank: lk.AdapterBank) -> str:
    before = tiny.logits(model, tiny.batch())
    with pytest.raises(MergeError, match="quantized") as caught:
        bank.merge("a")
    assert "16-bit original" in caught.value.hint
    assert torch.equal(tiny.logits(model, tiny.batch()), before)
    return "refused: merge into the 16-bit original"


def page() -> str:
    """docs/quantized.md with what is seen; what needs a missing package stays as it is there."""
    told = {line.split(" | ")[0].removeprefix("| "): line for line in PAGE.read_text(encoding="utf-8").splitlines()}
    missing = {name: told[name].strip("| ").split(" | ") for name, box in BOXES.items() if not box.is_here}
    cells = [missing.get(name) or [name, *astuple(seen(name))] for name in BOXES]
    return replace_marked(PAGE.read_text(encoding="utf-8"), table(COLUMNS, cells), mark="boxes")


@pytest.mark.parametrize("name", BOXES)
def test_a_base_that_is_a_black_box_trains_swaps_serves_rows_and_is_not_merged(name: str) -> None:
    if not BOXES[name].is_here:
        pytest.skip(f"{BOXES[name].needs} is not installed")
    assert seen(name).trains.startswith("as PEFT does")


def test_the_page_says_what_was_seen() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.models.test_black_boxes"


@by_hand
def test_what_needs_numbers_is_refused_by_name(kind: type[Codes]) -> None:
    model = nn.Sequential(kind(nn.Linear(64, 64)), nn.Linear(64, 32))
    with pytest.raises(TargetError, match="0: DoRA needs a linear layer whose weight is not quantized"):
        lk.attach(model, lk.LoraConfig(target_modules=["0"], use_dora=True))
    with pytest.raises(TargetError, match="quantized modules cannot be in modules_to_save: 0"):
        lk.attach(model, lk.LoraConfig(target_modules=["1"], modules_to_save=["0"]))


def test_a_layer_of_codes_is_told_from_one_of_floats() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features = self.out_features = 4
            self.weight = nn.Parameter(torch.eye(4))

    assert kind_of(GptqLinear(nn.Linear(64, 32))) == "linear"
    assert kind_of(Masked()) is None
    assert not is_quantized(nn.Linear(4, 4).bfloat16())
    assert is_quantized(
        nn.ParameterList([nn.Parameter(torch.zeros(4, dtype=torch.float8_e4m3fn), requires_grad=False)])
    )


def test_a_checkpoint_of_compressed_tensors_is_read_into_16_bits(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    expected = compressed(tmp_path / "base")
    model = load_base(tmp_path / "base").model
    bank = lk.attach(model, lk.LoraConfig(**FIELDS), name="a")
    assert torch.equal(tiny.logits(model, tiny.batch()), expected)
    losses = trained(model, adam(bank.parameters("a")), range(5))
    assert losses[4] < losses[0]
    assert {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name} == set()
    answered = tiny.logits(model, tiny.batch())
    bank.merge("a")
    torch.testing.assert_close(tiny.logits(model, tiny.batch()), answered, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
