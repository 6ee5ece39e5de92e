"""How much of a delta survived rounding is one definition, whether a merge is in memory or of files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lora_kit as lk
from lora_kit.errors import MergeError
from lora_kit.layers.fold import Retention, round_to_dtype
from lora_kit.merging.verification.verify import check_retention
from tests.support import tiny

LAYER = "model.layers.{}.self_attn.q_proj"


def make_base(folder: Path, dtype: torch.dtype) -> Path:
    """A base whose first two query projections are zero."""
    model = tiny.llama(dtype=dtype)
    for layer in (0, 1):
        model.get_submodule(LAYER.format(layer)).weight.data.zero_()
    model.save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path) -> Path:
    """An adapter of the query projections, whose delta is zero in the first layer."""
    config = lk.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    bank = lk.attach(AutoModelForCausalLM.from_pretrained(base), config, name="a")
    for path, pair in bank.snapshot("a").pairs().items():
        assert pair.b.any(), path
    with torch.no_grad():
        next(leaf for leaf in bank.parameters("a") if leaf.shape == (32, 4)).zero_()
    bank.save("a", folder)
    return folder


def merge_both_ways(base: Path, adapter: Path, out: Path) -> tuple[dict[str, Retention], dict[str, Retention]]:
    """What a merge in memory and one of files say of each layer."""
    bank = lk.attach(AutoModelForCausalLM.from_pretrained(base), dtype=torch.float32)
    bank.load("a", adapter)
    in_memory = {one.path: one for one in bank.merge("a")}
    return in_memory, {one.path: one for one in lk.merge(base, adapter, out, allow=["lost-delta"]).tensors}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_and_files_say_the_same_of_every_layer(tmp_path: Path, dtype: torch.dtype) -> None:
    base = make_base(tmp_path / "base", dtype)
    in_memory, from_files = merge_both_ways(base, make_adapter(base, tmp_path / "a"), tmp_path / "merged")
    assert in_memory.keys() == from_files.keys()
    for path, one in in_memory.items():
        other = from_files[path]
        assert one.relative == pytest.approx(other.relative, rel=1e-4), path
        assert one.retained == pytest.approx(other.retained, abs=1e-4), path


def test_zero_weights_and_zero_deltas_are_no_nan(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.float32)
    for found in merge_both_ways(base, make_adapter(base, tmp_path / "a"), tmp_path / "merged"):
        assert found[LAYER.format(0)] == Retention(LAYER.format(0), relative=0.0, retained=1.0)
        assert found[LAYER.format(1)] == Retention(LAYER.format(1), relative=math.inf, retained=1.0)


def test_rows_that_stay_zero_lose_nothing() -> None:
    zero = torch.zeros(3, 4)
    merged, retention = round_to_dtype("table", zero, zero.clone(), torch.bfloat16)
    assert torch.equal(merged, zero.bfloat16())
    assert retention == Retention("table", relative=0.0, retained=1.0)


def test_a_delta_that_buries_its_weight_is_refused_unless_allowed() -> None:
    huge, fine = Retention("q_proj", 1e12, 1.0), Retention("k_proj", 0.5, 1.0)
    with pytest.raises(MergeError, match=r"q_proj: the delta is 1e\+12 times its weight"):
        check_retention([fine, huge], dtype="float32", allow=())
    check_retention([fine, huge], dtype="float32", allow=("huge-delta",))
    check_retention([fine, Retention("zeros", math.inf, 1.0)], dtype="float32", allow=())
