"""Every family of models, on a tiny one of it: what docs/models.md says of it is what happened here.

`python -m tests.models.test_families` rewrites the table.
"""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lora_kit as lk
from lora_kit.errors import RoutingError
from lora_kit.layers.expert_linear import LoraExpert
from tests.support.families import FAMILIES, Family, loss, outputs

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
SCAN = Path(__file__).parents[2] / "benchmarks" / "results" / "models_scan.json"
RANK = 2
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
HEAD = """# Models

Made by `python -m tests.models.test_families`; a test fails when it is stale. Every cell is something that ran, on
a tiny model of the family with random weights, in transformers {transformers} and peft {peft}:

- **default targets**: what `target_modules="all-linear"` covers, and how many layers of the tiny model that are. Heads,
  embeddings and the routers of mixtures are left alone; name them to have them. Experts that are fused into one tensor
  are covered where `target_parameters` names them, convolutions (in one or two dimensions) where `target_modules` does.
- **trains**: four steps lower the loss; A and B of every layer get a gradient; nothing else changes.
- **loads, swaps**: saved, loaded into a fresh model, the same outputs; to another adapter and back, to the base and
  back, bit for bit.
- **rows**: a batch whose rows use two adapters and the base gives what each gives alone.
- **merges**: folded into the model, saved, read again by transformers: the same outputs.
- **PEFT**: reads what is saved here, and what it saves is read here, with the same outputs.

Other families: {working} of the {reached} model classes of transformers that were tried on tiny models work in the scan
of [every class](models-scan.md), which `make scan-models` writes.

What the table leaves open:

- **Mamba**: its mixer reads the weights of `dt_proj`, and on a GPU those of `x_proj` and `out_proj`, without calling
  the layers: LoRA weights there would be ignored, always or in training, so these are left alone, and rejected by
  name. PEFT rejects `out_proj` and `conv1d` for the same reason.
- **Weights that are only read**: where the source of a module's class shows that it reads the weight of a layer and
  never calls it (WavLM's attention, the relative positions of LayoutLM, DETR's maps of attention, `TDNNLayer`), or not
  in training (Gemma 3n's `correction_coefs`), or not with its settings (BLOOM's `slow_but_exact`), the layer is left
  alone, and rejected by name: an adapter there would do nothing.
- **Weights that are also read**: where a module calls a layer or reads its weight, as its inputs say (DeBERTa's
  `query_states`, Reformer's cache, CLIP's `interpolate_pos_encoding`), what it reads is the weight with the update
  of the adapter in use, as a merge would leave it, without dropout. Rows of different adapters are rejected there.
- **Weights that a model changes**: RWKV divides those of `attention.output` and `feed_forward.value` in evaluation, in
  place, while its config has `rescale_every` above 0. They are left alone then, and rejected by name.
- **Reformer** is used and merged, and not trained by `lora-kit train`: while it trains, its positions want batches
  exactly as long as the product of `axial_pos_shape`. In a loop of your own, call `model.enable_input_require_grads()`
  first: its reversible layers pass a gradient on only where their input requires one.
- **experts**: where fused experts say how they compute, as nearly all of transformers' classes do, their updates are
  added token by token: no changed weight is made, and rows may differ. Others (Llama 4, JetMoe) are given a changed
  weight for the length of a forward, as PEFT does it everywhere, and reject rows.
- **routers** of mixtures have LoRA weights where `target_parameters` names their weight (`mlp.gate.weight`).

| family | class | default targets | trains | loads, swaps | rows | merges | PEFT |
|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """What was seen of one family; cells are `yes`, or why not."""

    targets: str
    trains: str
    swaps: str
    rows: str
    merges: str
    peft: str


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, **CLOSE)


@functools.cache
def seen(family: Family) -> Row:
    """Everything that is asked of a family, on one model."""
    model, inputs = family.make(), family.inputs()
    base = outputs(model, inputs)
    pristine = copy.deepcopy(model)
    bank = lk.attach(model, lk.LoraConfig(r=RANK, lora_alpha=4, **family.more), name="a")
    targets = _targets(bank.coverage("a"))
    trains = _trains(model, bank, inputs)
    bank.add("b", lk.LoraConfig(r=3, init_lora_weights=False, **family.more))
    with tempfile.TemporaryDirectory() as folder:
        swaps = _swaps(model, bank, inputs, base)
        rows = _rows(family, model, bank, inputs, base)
        bank.save("a", Path(folder) / "a")
        trained = outputs(model, inputs)
        close(_loaded(copy.deepcopy(pristine), Path(folder) / "a", inputs), trained)
        judged = _in_peft(pristine, Path(folder), trained, inputs)
        merges = _merges(model, bank, trained, inputs, Path(folder) / "merged")
    return Row(targets, trains, swaps, rows, merges, judged)


def _targets(coverage: Any) -> str:
    names = list(dict.fromkeys(target.path.rpartition(".")[2] for target in coverage.targets))
    return f"{', '.join(names)} ({len(coverage.targets)})"


def _trains(model: nn.Module, bank: lk.AdapterBank, inputs: dict[str, Tensor]) -> str:
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    parameters, losses = bank.parameters("a"), []
    optimizer = torch.optim.AdamW(parameters, lr=2e-2)
    for step in range(4):
        value = loss(model, inputs)
        value.backward()
        if step == 1:  # B is no longer zero, so A gets one too
            silent = [p for p in parameters if p.grad is None or not p.grad.any()]
            experts = sum(isinstance(module, LoraExpert) for module in model.modules())
            assert len(silent) <= experts, "only experts that no token was sent to may get no gradient"
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    return "yes"


def _swaps(model: nn.Module, bank: lk.AdapterBank, inputs: dict[str, Tensor], base: Tensor) -> str:
    first = outputs(model, inputs)
    assert not torch.equal(first, base)
    bank.use("b")
    assert not torch.allclose(outputs(model, inputs), first)
    bank.use("a")
    assert torch.equal(outputs(model, inputs), first)
    with bank.using(None):
        assert torch.equal(outputs(model, inputs), base)
    return "yes"


def _rows(family: Family, model: nn.Module, bank: lk.AdapterBank, inputs: dict[str, Tensor], base: Tensor) -> str:
    if family.no_rows:
        reason, told = family.no_rows
        with bank.rows(["b", None, "a"]), pytest.raises(RoutingError, match=told):
            outputs(model, inputs)
        return f"refused: {reason}"
    alone = {"a": outputs(model, inputs), None: base}
    with bank.using("b"):
        alone["b"] = outputs(model, inputs)
    names = ["b", None, "a"]
    with bank.rows(names):
        close(outputs(model, inputs), torch.stack([alone[name][row] for row, name in enumerate(names)]))
    return "yes"


def _loaded(model: Any, folder: Path, inputs: dict[str, Tensor]) -> Tensor:
    bank = lk.attach(model, slots=1)
    bank.load("a", folder)
    bank.use("a")
    return outputs(model, inputs)


def _in_peft(pristine: Any, folder: Path, trained: Tensor, inputs: dict[str, Tensor]) -> str:
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(pristine), folder / "a").eval()
    close(outputs(theirs, inputs), trained)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.02)
    theirs.save_pretrained(folder / "theirs")
    close(_loaded(copy.deepcopy(pristine), folder / "theirs", inputs), outputs(theirs, inputs))
    return "yes"


def _merges(model: Any, bank: lk.AdapterBank, trained: Tensor, inputs: dict[str, Tensor], folder: Path) -> str:
    bank.merge("a")
    bank.detach()
    close(outputs(model, inputs), trained)
    model.save_pretrained(folder)
    close(outputs(type(model).from_pretrained(folder).eval(), inputs), trained)
    return "yes"


def page() -> str:
    """docs/models.md, from what is seen."""
    import transformers

    scan = [row["status"] for row in json.loads(SCAN.read_text())["classes"].values()]
    head = HEAD.format(
        transformers=transformers.__version__, peft=peft.__version__, working=scan.count("works"), reached=len(scan)
    )
    lines = [" | ".join([family.name, f"`{family.kind}`", *astuple(seen(family))]) for family in FAMILIES]
    return head + "".join(f"| {line} |\n" for line in lines)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_trains_swaps_serves_rows_merges_and_agrees_with_peft(family: Family) -> None:
    assert seen(family).trains == "yes"


def test_the_page_says_what_was_seen() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.models.test_families"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
