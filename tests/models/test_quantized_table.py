"""Every way to quantize a base through bitsandbytes: what docs/quantized.md says of it is what happened here.

`python -m tests.models.test_quantized_table` rewrites the table.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import lora_kit as lk
from benchmarks.harness import replace_marked, table
from lora_kit.evaluation.evaluate import evaluate
from lora_kit.generation.generate import generate
from lora_kit.layers.introspect import is_quantized
from lora_kit.merging.merge import merge
from lora_kit.models.loading import Base, load_base
from lora_kit.models.quantization import QUANTIZATIONS
from lora_kit.training.results import TrainReport
from lora_kit.training.train import train
from tests.support import texts, tiny
from tests.support.interrupted import die_at
from tests.support.long_runs import take_few
from tests.support.merging import ALL, adapter_folder, base_folder
from tests.support.processes import in_child
from tests.support.quantized import FIELDS, adam, llama, swaps_and_rows, trained
from tests.support.training import PAIRS

PAGE = Path(__file__).parents[2] / "docs" / "quantized.md"
COLUMNS = (
    "`quantize`", "loads", "trains", "swaps", "rows", "resumes", "evaluates", "generates", "merges: `original`",
    "`dequantized`", "`requantized`",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What was seen of one kind; cells are `yes`, or what else there is to say."""

    loads: str
    trains: str
    swaps: str
    rows: str
    resumes: str
    evaluates: str
    generates: str
    original: str
    dequantized: str
    requantized: str


@functools.cache
def seen(kind: str) -> Row:
    """Everything that is asked of a kind, on one tiny Llama in bf16."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_kit.training.report.artifacts.plot_loss_curve", lambda *_, **__: None)
        patch.setattr("lora_kit.training.report.samples.SAMPLE_COUNT", 0)
        folder = Path(name)
        original = base_folder(folder / "original", llama())
        recipe = _recipe(folder, original, kind)
        return Row(
            _loads(original, folder / "base", kind),
            _trains(original, folder / "start", kind),
            *_swaps_and_rows(original, kind),
            *_resumes_and_evaluates(recipe),
            _generates(recipe),
            *(_merges(folder, choice) for choice in ("original", "dequantized", "requantized")),
        )


def _recipe(folder: Path, original: Path, kind: str) -> dict[str, Any]:
    file = str(texts.write(folder / "rows.jsonl", PAIRS))
    steps = {"max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "save_steps": 2}
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"}
    data = {"train": file, "validation": file}
    return {"base": str(original), "quantize": kind, "data": data, "out": str(folder / "a"), "train": steps,
            "lora": lora}  # fmt: skip


def _loads(original: Path, folder: Path, kind: str) -> str:
    base = load_base(original, quantize=kind)
    linear = [m for name, m in base.model.named_modules() if name.endswith("_proj")]
    assert len(linear) == 7 * base.model.config.num_hidden_layers
    assert all(is_quantized(module) for module in linear)
    found, exact = (tiny.logits(b.model, tiny.batch()).float().flatten() for b in (base, load_base(original)))
    assert not torch.equal(found, exact)
    assert torch.nn.functional.cosine_similarity(found, exact, dim=0) > 0.9
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    again = load_base(folder).model
    assert all(is_quantized(again.get_submodule(n)) for n, _ in base.model.named_modules() if n.endswith("_proj"))
    assert torch.equal(tiny.logits(again, tiny.batch()), tiny.logits(base.model, tiny.batch()))
    return "yes"


def _trains(original: Path, folder: Path, kind: str) -> str:
    model = load_base(original, quantize=kind, dtype="fp32").model
    bank = lk.attach(model, lk.LoraConfig(**FIELDS), name="a")
    bank.save("a", folder)
    before = {name: tensor.clone() for name, tensor in _frozen(model).items()}
    ours = trained(model, adam(bank.parameters("a")), range(5))
    assert ours[4] < ours[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in _frozen(model).items())
    judge = load_base(original, quantize=kind, dtype="fp32").model
    theirs: Any = peft.PeftModel.from_pretrained(judge, folder, is_trainable=True)
    judged = trained(theirs, adam([p for p in theirs.parameters() if p.requires_grad]), range(5))
    torch.testing.assert_close(ours, judged, rtol=1e-3, atol=0)
    return "yes"


def _frozen(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if not parameter.requires_grad}


def _swaps_and_rows(original: Path, kind: str) -> tuple[str, str]:
    model = load_base(original, quantize=kind, dtype="fp32").model
    bank = lk.attach(model, dtype=torch.float32)
    for name in ("a", "bb"):
        bank.add(name, lk.LoraConfig(**{**FIELDS, "r": 2 * len(name)}))
    return swaps_and_rows(model, bank, tiny.logits(model, tiny.batch()))


def _resumes_and_evaluates(recipe: dict[str, Any]) -> tuple[str, str]:
    report = train({**recipe, "out": f"{recipe['out']}.unbroken"})
    assert report.before is not None
    assert report.after is not None
    assert report.after.loss < report.before.loss
    assert in_child(lambda: train(recipe, callbacks=[die_at(5)])) < 0
    resumed = train(recipe)
    assert resumed.resumed == 4
    both = [Path(out, "adapter_model.safetensors").read_bytes() for out in (report.out, resumed.out)]
    assert both[0] == both[1]
    return "the same bytes", _evaluates(recipe, resumed)


def _evaluates(recipe: dict[str, Any], resumed: TrainReport) -> str:
    report = evaluate(
        recipe["base"], [recipe["out"], None], recipe["data"]["train"], quantize=recipe["quantize"], metrics=["loss"]
    )
    found, base = (result.metrics["loss"] for result in report.results)
    assert resumed.after is not None
    assert found == pytest.approx(resumed.after.loss, rel=1e-3)
    assert found < base
    return "yes"


def _generates(recipe: dict[str, Any]) -> str:
    rows: list[Any] = [recipe["out"], None]
    both = generate(recipe["base"], rows, "one", quantize=recipe["quantize"])
    base: Base = load_base(recipe["base"], quantize=recipe["quantize"])
    alone = [generate(base, [row], both[0].prompt, template="raw")[0].text for row in rows]
    assert [each.text for each in both] == alone
    assert alone[0] != alone[1]
    return "yes"


def _merges(folder: Path, choice: str) -> str:
    adapter = folder / "sql"
    if not adapter.exists():
        adapter_folder(folder / "base", adapter, target_modules=ALL)
    given: dict[str, Any] = {"original": folder / "original"} if choice == "original" else {}
    out = folder / f"merged.{choice}"
    report = merge(folder / "base", adapter, out, quantized=choice, **given)
    assert report.quantized == choice
    assert bool(getattr(load_base(out).model, "is_quantized", False)) == (choice == "requantized")
    return "yes"


def page() -> str:
    """docs/quantized.md, its table made of what is seen."""
    cells = [[f"`{kind}`", *astuple(seen(kind))] for kind in QUANTIZATIONS]
    return replace_marked(PAGE.read_text(encoding="utf-8"), table(COLUMNS, cells), mark="bitsandbytes")


@pytest.mark.parametrize("kind", take_few(QUANTIZATIONS, "nf4", "int8"))
def test_a_kind_loads_trains_swaps_serves_rows_resumes_evaluates_generates_and_merges(kind: str) -> None:
    assert seen(kind).loads == "yes"


@pytest.mark.slow
def test_the_page_says_what_was_seen() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.models.test_quantized_table"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
